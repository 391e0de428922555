"""How much work may be here: each request is admitted at its cost, against budgets, and fairly among tenants.

The cost of a request is the most tokens that it can make the engine hold: every choice's prompt and max_tokens. When
there are several tenants, one may have no more sequences here than there are places left (the dynamic threshold of
Choudhury and Hahne, 1998): a tenant alone gets half of the queue, two get a third each, and there is always room for
a new one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from fastserve.core.errors import QueueFullError, RequestError

_RETRY_SECONDS = 5.0


class Admission:
    """Budgets of one server.

    Args:
        max_request_tokens: largest cost of one request; 0 takes that of a full batch of full contexts.
        max_queued_tokens: largest cost of all requests that are here; 0 is no limit.
        is_shared: whether there are several tenants.
    """

    def __init__(self, max_request_tokens: int = 0, max_queued_tokens: int = 0, is_shared: bool = False) -> None:
        self._max_request_tokens = max_request_tokens
        self._max_queued_tokens = max_queued_tokens
        self._is_shared = is_shared
        self._tokens = 0
        self._sequences: Counter[str] = Counter()

    @property
    def num_tokens(self) -> int:
        """Cost of what is here."""
        return self._tokens

    def enter(
        self, tenant: str, num_sequences: int, num_tokens: int, capacity: int, full_batch: int
    ) -> Callable[[], None]:
        """Take a request in; call what is returned when it has ended, once or more.

        Args:
            num_tokens: its cost.
            capacity: most sequences that can be here at once.
            full_batch: cost of a full batch of full contexts.

        Raises:
            RequestError: it costs more than one request may, at any time.
            QueueFullError: there is no room for it, or for this tenant, now.
        """
        limit = self._max_request_tokens or full_batch
        if self._max_queued_tokens:
            limit = min(limit, self._max_queued_tokens)
        if num_tokens > limit:
            raise RequestError(
                f"this request can take {num_tokens} tokens (prompt and max_tokens, for each choice); the server "
                f"admits {limit}: lower max_tokens, n or best_of",
                "max_tokens",
            )
        if self._max_queued_tokens and self._tokens + num_tokens > self._max_queued_tokens:
            raise QueueFullError(
                f"the requests that are here can take {self._tokens} tokens, and this one {num_tokens} more; the "
                f"server admits {self._max_queued_tokens} (max_queued_tokens): try again later",
                _RETRY_SECONDS,
            )
        held, free = self._sequences[tenant], capacity - self._sequences.total()
        if self._is_shared and held and held + num_sequences > free:
            raise QueueFullError(
                f"{held} sequences of this API key are here, and the other {free} places are kept for other keys: "
                "try again later",
                _RETRY_SECONDS,
            )
        self._tokens += num_tokens
        self._sequences[tenant] += num_sequences
        has_left = False

        def leave() -> None:
            nonlocal has_left
            if not has_left:
                has_left = True
                self._tokens -= num_tokens
                self._sequences[tenant] -= num_sequences
                if not self._sequences[tenant]:
                    del self._sequences[tenant]

        return leave
