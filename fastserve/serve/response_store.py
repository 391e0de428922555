"""Responses that clients may come back to, in memory: bounded in bytes, the oldest are forgotten first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fastserve.serve.errors import ApiError

# What an entry takes besides its texts.
_ENTRY_BYTES = 2048
MAX_PAGE = 100


@dataclass(slots=True)
class StoredResponse:
    """One response.

    Attributes:
        tenant: who may see it.
        body: the response object.
        items: the input items of this turn, as they are listed.
        history: items of the whole conversation before the answer, without instructions.
    """

    tenant: str
    body: dict[str, Any]
    items: list[dict[str, Any]]
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        history = 4 * len(msgspec.json.encode(self.history))
        return _ENTRY_BYTES + history + len(msgspec.json.encode((self.body, self.items)))


class ResponseStore:
    """Responses by id.

    Args:
        max_bytes: about how much they may take; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, response: StoredResponse) -> None:
        """Keep a response, or its new state."""
        response_id = response.body["id"]
        self._drop(response_id)
        size = response.num_bytes
        if size > self.max_bytes:
            return
        self._entries[response_id] = (response, size)
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def get(self, response_id: str, tenant: str, param: str | None = None) -> StoredResponse:
        """The response of this id.

        Raises:
            ApiError: 404, also for one that belongs to someone else.
        """
        entry = self._entries.get(response_id)
        if entry is None or entry[0].tenant != tenant:
            raise ApiError(
                f"there is no response {response_id[:100]!r}: it was not stored, was deleted, or had to make room",
                404,
                param=param,
                code="response_not_found",
            )
        return entry[0]

    def delete(self, response_id: str, tenant: str) -> None:
        """Forget a response. Raises ApiError (404) where `get` does."""
        self.get(response_id, tenant)
        self._drop(response_id)

    def _drop(self, response_id: str) -> None:
        _, size = self._entries.pop(response_id, (None, 0))
        self.num_bytes -= size


def page(items: Sequence[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """A part of a list in OpenAI's form: `limit` items after the one with the id `after`.

    Raises:
        ApiError: 400, there is no such item, or the limit is out of its range.
    """
    if not 1 <= limit <= MAX_PAGE:
        raise ApiError(f"limit must be between 1 and {MAX_PAGE}, not {limit}", param="limit")
    start = 0
    if after is not None:
        start = next((index + 1 for index, item in enumerate(items) if item["id"] == after), -1)
        if start < 0:
            raise ApiError(f"after: there is no item {after[:100]!r} in this list", param="after")
    shown = list(items[start : start + limit])
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": start + limit < len(items),
    }
