"""What /v1/responses answers: the response object in its states, and the events of a stream.

A response has one output item here, the assistant's message, with one part, its text.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec

from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.request import FINISH_LENGTH, TokenLogprobs
from fastserve.core.sampling_params import SamplingParams
from fastserve.serve.errors import ApiError
from fastserve.serve.generation import Choice, Usage
from fastserve.serve.replies import most_probable
from fastserve.serve.responses_body import ResponsesBody

_PLACE = {"output_index": 0, "content_index": 0}


class ResponseReply:
    """One response in the making. `body` is the response object in its present state."""

    def __init__(self, body: ResponsesBody, model: str, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self.text = ""
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._tokenizer = tokenizer
        self._num_top = body.num_logprobs
        self._logprobs: list[dict[str, Any]] = []
        self._num_events = 0
        self.body: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "queued" if body.background else "in_progress",
            "background": bool(body.background),
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": body.previous_response_id,
            "store": body.store is not False,
            "temperature": float(sampling.temperature),
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": float(sampling.top_p),
            "truncation": "disabled",
        }

    def take(self, text: str, logprobs: list[TokenLogprobs]) -> list[dict[str, Any]]:
        """Add to the answer; returns the log probabilities of what was added."""
        self.text += text
        added = [] if self._num_top is None else [self._logprob(item, self._num_top) for item in logprobs]
        self._logprobs += added
        return added

    def finish(self, choice: Choice, usage: Usage) -> None:
        """The answer is whole."""
        is_cut = choice.finish_reason == FINISH_LENGTH
        self.body |= {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [self._item("incomplete" if is_cut else "completed")],
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }
        if not is_cut:
            self.body["completed_at"] = int(time.time())

    def fail(self, error: ApiError) -> None:
        """It ended before the answer was whole."""
        self.body |= {"status": "failed", "error": {"code": "server_error", "message": str(error)}}

    def cancel(self) -> None:
        """The client does not want it any more."""
        self.body["status"] = "cancelled"

    # Events

    def opening(self) -> Iterator[bytes]:
        """Before the first token."""
        yield self._event("response.created", response=self.body)
        yield self._event("response.in_progress", response=self.body)

    def item_opening(self) -> Iterator[bytes]:
        """With the first token."""
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", parts=[]))
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._event("response.content_part.added", item_id=self._item_id, **_PLACE, part=part)

    def delta(self, text: str, logprobs: list[TokenLogprobs]) -> bytes:
        """More text."""
        added = self.take(text, logprobs)
        return self._event(
            "response.output_text.delta", item_id=self._item_id, **_PLACE, delta=text, logprobs=_without_bytes(added)
        )

    def closing(self) -> Iterator[bytes]:
        """After `finish`."""
        item = self.body["output"][0]
        part = item["content"][0]
        place = {"item_id": self._item_id, **_PLACE}
        logprobs = _without_bytes(self._logprobs)
        yield self._event("response.output_text.done", **place, text=self.text, logprobs=logprobs)
        yield self._event("response.content_part.done", **place, part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{self.body['status']}", response=self.body)

    def failing(self, error: ApiError) -> Iterator[bytes]:
        """After `fail`."""
        yield self._event("error", code=error.code, message=str(error), param=error.param)
        yield self._event("response.failed", response=self.body)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = msgspec.json.encode({"type": kind, "sequence_number": self._num_events, **fields})
        self._num_events += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _item(self, status: str, parts: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        if parts is None:
            parts = [{"type": "output_text", "text": self.text, "annotations": [], "logprobs": self._logprobs}]
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": parts}

    def _logprob(self, item: TokenLogprobs, num_top: int) -> dict[str, Any]:
        top = [self._token(token_id, logprob) for token_id, logprob in most_probable(item, num_top)]
        return {**self._token(item.token_ids[0], item.logprobs[0]), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        tokenizer = self._tokenizer
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": max(logprob, -9999.0),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }


def _without_bytes(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The form of events, which leave the bytes out."""
    return [
        {
            "token": item["token"],
            "logprob": item["logprob"],
            "top_logprobs": [{"token": top["token"], "logprob": top["logprob"]} for top in item["top_logprobs"]],
        }
        for item in items
    ]
