"""What /v1/responses answers: the response object in its states, and the events of a stream.

The output is a list of items that grows while the answer is read: thoughts, messages, calls of functions. Each change
is an event; who does not stream takes the same changes and drops the events.
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
from fastserve.serve.generation import Delta, Generation
from fastserve.serve.reasoning import Piece
from fastserve.serve.replies import most_probable
from fastserve.serve.responses_body import ResponsesBody
from fastserve.serve.tools import AnswerReader

Event = dict[str, Any]
# Item type -> (prefix of its ids, what its pieces are called in events).
_ITEM_KINDS = {"reasoning": ("rs", "reasoning_text"), "message": ("msg", "output_text"), "function_call": ("fc", "")}
_ITEM_OF_PIECE = {"reasoning": "reasoning", "content": "message", "call": "function_call", "arguments": "function_call"}


class ResponseReply:
    """One response in the making. `body` is the response object in its present state.

    Args:
        reader: tells thoughts and calls from text; None when all is text.
    """

    def __init__(
        self,
        body: ResponsesBody,
        model: str,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        reader: AnswerReader | None,
    ) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self.body = _empty_response(self.id, body, model, sampling)
        self._items: list[dict[str, Any]] = []
        self._reader = reader
        self._tokenizer = tokenizer
        self._num_top = body.num_logprobs
        self._unplaced: list[TokenLogprobs] = []  # of tokens whose text the reader still holds back
        self._num_events = 0

    def opening(self) -> Iterator[Event]:
        """Before the first token."""
        yield {"type": "response.created", "response": self.body}
        yield {"type": "response.in_progress", "response": self.body}

    def take(self, delta: Delta) -> Iterator[Event]:
        """Add what one token output brought."""
        is_last = delta.choice.finish_reason is not None
        if self._reader is not None:
            pieces = self._reader.push(delta.text, is_last)
        else:
            pieces = [Piece("content", delta.text)] if delta.text or delta.logprobs else []
        if self._num_top is not None:
            self._unplaced += delta.logprobs
        for piece in pieces:
            yield from self._take_piece(piece)

    def finish(self, generation: Generation) -> Iterator[Event]:
        """The answer is whole."""
        usage = generation.usage
        is_cut = generation.choices[0].finish_reason == FINISH_LENGTH
        status = "incomplete" if is_cut else "completed"
        if not self._items:
            yield from self._open("message")
        yield from self._close(status)
        self.body |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self._items,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": self._count_thoughts()},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }
        if not is_cut:
            self.body["completed_at"] = int(time.time())
        yield {"type": f"response.{status}", "response": self.body}

    def fail(self, error: ApiError) -> Iterator[Event]:
        """It ended before the answer was whole."""
        self.body |= {"status": "failed", "error": {"code": "server_error", "message": str(error)}}
        yield {"type": "error", "code": error.code, "message": str(error), "param": error.param}
        yield {"type": "response.failed", "response": self.body}

    def cancel(self) -> None:
        """The client does not want it any more."""
        self.body["status"] = "cancelled"

    def encode(self, event: Event) -> bytes:
        """An event of the stream, with its number."""
        kind: str = event["type"]
        data = msgspec.json.encode({"type": kind, "sequence_number": self._num_events, **event})
        self._num_events += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    # Items

    def _take_piece(self, piece: Piece) -> Iterator[Event]:
        wanted = _ITEM_OF_PIECE[piece.kind]
        if not self._items or self._items[-1]["type"] != wanted or piece.kind == "call":
            yield from self._close("completed")
            yield from self._open(wanted, piece)
        item = self._items[-1]
        if piece.kind == "arguments":
            item["arguments"] += piece.text
            yield {"type": "response.function_call_arguments.delta", **self._place(), "delta": piece.text}
        elif piece.kind != "call":
            part = item["content"][0]
            part["text"] += piece.text
            event = {"type": f"response.{part['type']}.delta", **self._place(0), "delta": piece.text}
            if wanted == "message":
                added = self._placed(piece.text)
                part["logprobs"] += added
                event["logprobs"] = _without_bytes(added)
            yield event

    def _open(self, kind: str, piece: Piece | None = None) -> Iterator[Event]:
        prefix, part_type = _ITEM_KINDS[kind]
        item: dict[str, Any] = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress"}
        if kind == "function_call":
            assert piece is not None
            item |= {"call_id": f"call_{uuid.uuid4().hex[:24]}", "name": piece.text, "arguments": ""}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        else:
            item |= {"role": "assistant", "content": []}
        self._items.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self._items) - 1, "item": {**item}}
        if part_type:
            part: dict[str, Any] = {"type": part_type, "text": ""}
            if kind == "message":
                part |= {"annotations": [], "logprobs": []}
            item["content"] = [part]
            yield {"type": "response.content_part.added", **self._place(0), "part": {**part}}

    def _close(self, status: str) -> Iterator[Event]:
        """End the item that is open."""
        if not self._items:
            return
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            ended = {"name": item["name"], "arguments": item["arguments"]}
            yield {"type": "response.function_call_arguments.done", **self._place(), **ended}
        else:
            [part] = item["content"]
            event = {"type": f"response.{part['type']}.done", **self._place(0), "text": part["text"]}
            if item["type"] == "message":
                event["logprobs"] = _without_bytes(part["logprobs"])
            yield event
            yield {"type": "response.content_part.done", **self._place(0), "part": part}
        yield {"type": "response.output_item.done", "output_index": len(self._items) - 1, "item": item}

    def _place(self, content_index: int | None = None) -> dict[str, Any]:
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return place if content_index is None else {**place, "content_index": content_index}

    # Tokens

    def _placed(self, text: str) -> list[dict[str, Any]]:
        """Log probabilities of the tokens of `text`, the last ones of those that came; those before were no text."""
        if self._num_top is None:
            return []
        taken, first, num_characters = self._unplaced, len(self._unplaced), 0
        while first > 0 and (self._reader is None or num_characters < len(text)):
            first -= 1
            num_characters += len(self._tokenizer.decode([taken[first].token_ids[0]]))
        self._unplaced = []
        return [self._logprob(item, self._num_top) for item in taken[first:]]

    def _count_thoughts(self) -> int:
        thoughts = [item["content"][0]["text"] for item in self._items if item["type"] == "reasoning"]
        return sum(len(self._tokenizer.encode(text, add_special_tokens=False)) for text in thoughts)

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


def _empty_response(reply_id: str, body: ResponsesBody, model: str, sampling: SamplingParams) -> dict[str, Any]:
    """The response object before its first token."""
    text_format = None if body.text is None else body.text.format
    choice = body.tool_choice or ("auto" if body.tools else "none")
    return {
        "id": reply_id,
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
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "store": body.store is not False,
        "temperature": float(sampling.temperature),
        "text": {"format": text_format.model_dump(by_alias=True, exclude_none=True) if text_format else _PLAIN_TEXT},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [{"parameters": None, "strict": None, **tool.model_dump()} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": float(sampling.top_p),
        "truncation": "disabled",
    }


_PLAIN_TEXT = {"type": "text"}


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
