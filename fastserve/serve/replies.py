"""What clients get back: chat completions and text completions in OpenAI's form, whole or as chunks of a stream.

One class per endpoint with the same four methods, so that `app.py` has one path for both. Replies are msgspec structs,
written straight to bytes; what stays the same in every chunk of a stream is encoded once.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from fastserve import __version__
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.request import TokenLogprobs
from fastserve.serve.generation import Answer, Choice, Delta, Usage
from fastserve.serve.reasoning import Piece
from fastserve.serve.tools import AnswerReader, describe_calls

_encode = msgspec.json.Encoder().encode
PromptLogprobs = list[dict[str, "PromptLogprob"] | None]


class PromptDetails(msgspec.Struct):
    cached_tokens: int


class UsageReply(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class PromptLogprob(msgspec.Struct):
    """One candidate at one position of the prompt (vLLM's form)."""

    logprob: float
    rank: int
    decoded_token: str


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ContentLogprob]
    refusal: None = None


class CallFunction(msgspec.Struct):
    arguments: str
    name: str | UnsetType = UNSET


class Call(msgspec.Struct):
    """A tool call; in a stream its first piece has the id and the name, all have the index."""

    function: CallFunction
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    index: int | UnsetType = UNSET


class ChatMessage(msgspec.Struct):
    role: str
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatDelta(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | UnsetType = UNSET
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Head(msgspec.Struct):
    """The beginning that every object of one reply shares."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class Reply(Protocol):
    """How one endpoint writes its replies."""

    id: str

    def first_chunk(self, choice: Choice, usage: Usage | None) -> bytes:
        """The event that opens a choice; b"" when the endpoint has none."""
        ...

    def chunk(self, delta: Delta, usage: Usage | None) -> bytes:
        """The event for one token output; `usage` is included when given."""
        ...

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event that ends a stream with its token counts."""
        ...

    def whole(self, answers: list[Answer], usage: Usage) -> bytes:
        """The body of a reply that is not streamed."""
        ...


class _BaseReply:
    """Ids, envelope and logprob forms that both endpoints share."""

    KIND = CHUNK_KIND = "text_completion"

    def __init__(self, reply_id: str, model: str, tokenizer: Tokenizer, num_top: int | None) -> None:
        """
        Args:
            num_top: alternatives per token in logprobs; None leaves logprobs out.
        """
        self.id = reply_id
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._prompts: dict[int, PromptLogprobs] = {}  # by the place of the prompt: its choices show the same
        head = Head(reply_id, self.KIND, int(time.time()), model, f"fastserve-{__version__}")
        chunk_head = Head(reply_id, self.CHUNK_KIND, head.created, model, head.system_fingerprint)
        # Without the closing brace: choices and usage follow.
        self._head = _encode(head)[:-1] + b',"choices":'
        self._chunk_head = b"data: " + _encode(chunk_head)[:-1] + b',"choices":'

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._chunk_head + b'[],"usage":' + _encode(_usage_reply(usage)) + b"}\n\n"

    def _event(self, choice: msgspec.Struct, usage: Usage | None) -> bytes:
        if usage is None:
            return self._chunk_head + b"[" + _encode(choice) + b"]}\n\n"
        return self._chunk_head + b"[" + _encode(choice) + b'],"usage":' + _encode(_usage_reply(usage)) + b"}\n\n"

    def _body(self, choices: list[Any], usage: Usage) -> bytes:
        return self._head + _encode(choices) + b',"usage":' + _encode(_usage_reply(usage)) + b"}"

    def _prompt_logprobs(self, choice: Choice) -> PromptLogprobs | UnsetType:
        if choice.prompt_logprobs is None:
            return UNSET
        if choice.prompt_index not in self._prompts:
            named = [None if item is None else self._named(item) for item in choice.prompt_logprobs]
            self._prompts[choice.prompt_index] = named
        return self._prompts[choice.prompt_index]

    def _named(self, item: TokenLogprobs) -> dict[str, PromptLogprob]:
        named: dict[str, PromptLogprob] = {}
        for place, (token_id, logprob) in enumerate(zip(item.token_ids, item.logprobs, strict=True)):
            if str(token_id) not in named:
                rank = item.rank if place == 0 else place
                named[str(token_id)] = PromptLogprob(_finite(logprob), rank, self._tokenizer.token_text(token_id))
        return named


class ChatReply(_BaseReply):
    """Replies of /v1/chat/completions.

    Args:
        make_reader: tells thoughts and tool calls from text, one for each choice; None when all is text.
    """

    KIND = "chat.completion"
    CHUNK_KIND = "chat.completion.chunk"

    def __init__(
        self,
        reply_id: str,
        model: str,
        tokenizer: Tokenizer,
        num_top: int | None,
        make_reader: Callable[[], AnswerReader | None] | None = None,
    ) -> None:
        super().__init__(reply_id, model, tokenizer, num_top)
        self._make_reader = make_reader or (lambda: None)
        self._readers: dict[int, AnswerReader | None] = {}

    def first_chunk(self, choice: Choice, usage: Usage | None) -> bytes:
        return self._event(ChatChunkChoice(choice.index, ChatDelta(role="assistant", content="")), usage)

    def chunk(self, delta: Delta, usage: Usage | None) -> bytes:
        choice = delta.choice
        reader = self._reader(choice)
        logprobs = self._logprobs(delta.logprobs) or UNSET
        if reader is None:
            item = ChatChunkChoice(choice.index, ChatDelta(content=delta.text), logprobs)
            item.finish_reason = choice.finish_reason
        else:
            pieces = reader.push(delta.text, choice.finish_reason is not None)
            if not pieces and usage is None and self._num_top is None and choice.finish_reason is None:
                return b""
            item = ChatChunkChoice(choice.index, _chat_delta(pieces), logprobs)
            item.finish_reason = reader.finish_reason(choice.finish_reason)
        if choice.stop_reason is not None:
            item.stop_reason = choice.stop_reason
        return self._event(item, usage)

    def whole(self, answers: list[Answer], usage: Usage) -> bytes:
        choices = [
            ChatChoice(
                index=answer.choice.index,
                message=self._message(answer),
                logprobs=self._logprobs(answer.logprobs),
                finish_reason=self._finish_reason(answer.choice),
                stop_reason=answer.choice.stop_reason,
                prompt_logprobs=self._prompt_logprobs(answer.choice),
            )
            for answer in answers
        ]
        return self._body(choices, usage)

    def _reader(self, choice: Choice) -> AnswerReader | None:
        if choice.index not in self._readers:
            self._readers[choice.index] = self._make_reader()
        return self._readers[choice.index]

    def _finish_reason(self, choice: Choice) -> str | None:
        reader = self._reader(choice)
        return choice.finish_reason if reader is None else reader.finish_reason(choice.finish_reason)

    def _message(self, answer: Answer) -> ChatMessage:
        reader = self._reader(answer.choice)
        if reader is None:
            return ChatMessage("assistant", answer.text)
        pieces = reader.push(answer.text, True)
        calls = [
            Call(CallFunction(call["arguments"], call["name"]), _call_id(), "function")
            for call in describe_calls(pieces)
        ]
        content = _text(pieces, "content")
        message = ChatMessage("assistant", None if calls and not content else content)
        message.reasoning_content = _text(pieces, "reasoning") or UNSET
        message.tool_calls = calls or UNSET
        return message

    def _logprobs(self, items: list[TokenLogprobs]) -> ChatLogprobs | None:
        if self._num_top is None:
            return None
        return ChatLogprobs([self._content(item, self._num_top) for item in items])

    def _content(self, item: TokenLogprobs, num_top: int) -> ContentLogprob:
        top = [TopLogprob(*self._token(token_id, logprob)) for token_id, logprob in most_probable(item, num_top)]
        return ContentLogprob(*self._token(item.token_ids[0], item.logprobs[0]), top)

    def _token(self, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        tokenizer = self._tokenizer
        return tokenizer.token_text(token_id), _finite(logprob), list(tokenizer.token_bytes(token_id))


class CompletionReply(_BaseReply):
    """Replies of /v1/completions.

    Args:
        echoed: the prompts' texts, to be shown before the answers; their log probabilities too, when asked for.
    """

    def __init__(
        self,
        reply_id: str,
        model: str,
        tokenizer: Tokenizer,
        num_top: int | None,
        echoed: Sequence[str] | None = None,
    ) -> None:
        super().__init__(reply_id, model, tokenizer, num_top)
        self._offsets: dict[int, int] = {}
        self._echoed = echoed

    def first_chunk(self, choice: Choice, usage: Usage | None) -> bytes:
        if self._echoed is None:
            return b""
        item = CompletionChoice(choice.index, self._echoed[choice.prompt_index], self._logprobs(choice, []))
        return self._event(item, usage)

    def chunk(self, delta: Delta, usage: Usage | None) -> bytes:
        choice = delta.choice
        logprobs = self._logprobs(choice, delta.logprobs)
        item = CompletionChoice(choice.index, delta.text, logprobs, choice.finish_reason, choice.stop_reason)
        return self._event(item, usage)

    def whole(self, answers: list[Answer], usage: Usage) -> bytes:
        choices = [
            CompletionChoice(
                index=answer.choice.index,
                text=answer.text if self._echoed is None else self._echoed[answer.choice.prompt_index] + answer.text,
                logprobs=self._logprobs(answer.choice, answer.logprobs),
                finish_reason=answer.choice.finish_reason,
                stop_reason=answer.choice.stop_reason,
                prompt_logprobs=self._prompt_logprobs(answer.choice),
            )
            for answer in answers
        ]
        return self._body(choices, usage)

    def _logprobs(self, choice: Choice, items: list[TokenLogprobs]) -> CompletionLogprobs | None:
        if self._num_top is None:
            return None
        reply = CompletionLogprobs([], [], [], [])
        positions: list[tuple[int, TokenLogprobs | None]] = [(item.token_ids[0], item) for item in items]
        if choice.index not in self._offsets and self._echoed is not None:
            prompt = zip(choice.request.prompt_ids, choice.prompt_logprobs or (), strict=True)
            positions = [*prompt, *positions]
        offset = self._offsets.get(choice.index, 0)
        for token_id, item in positions:
            reply.tokens.append(self._spell(token_id))
            reply.text_offset.append(offset)
            if item is None:  # the first token of a prompt follows nothing
                reply.token_logprobs.append(None)
                reply.top_logprobs.append(None)
            else:
                top = most_probable(item, self._num_top)
                reply.token_logprobs.append(_finite(item.logprobs[0]))
                reply.top_logprobs.append({self._spell(other): _finite(logprob) for other, logprob in top})
            # Characters that begin in this token: all bytes but UTF-8's continuation bytes; none in special tokens.
            if token_id not in self._tokenizer.special_ids:
                offset += sum(byte & 0xC0 != 0x80 for byte in self._tokenizer.token_bytes(token_id))
        self._offsets[choice.index] = offset
        return reply

    def _prompt_logprobs(self, choice: Choice) -> PromptLogprobs | UnsetType:
        # With echo they are among the logprobs.
        return UNSET if self._echoed is not None and self._num_top is not None else super()._prompt_logprobs(choice)

    def _spell(self, token_id: int) -> str:
        """A token's text; parts of characters are spelled out in bytes, as OpenAI does, so that they stay distinct."""
        text = self._tokenizer.token_text(token_id)
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._tokenizer.token_bytes(token_id))


def _chat_delta(pieces: list[Piece]) -> ChatDelta:
    delta = ChatDelta()
    delta.content = _text(pieces, "content") or UNSET
    delta.reasoning_content = _text(pieces, "reasoning") or UNSET
    calls: dict[int, Call] = {}
    for piece in pieces:
        if piece.kind == "call":
            calls[piece.index] = Call(CallFunction("", piece.text), _call_id(), "function", piece.index)
        elif piece.kind == "arguments":
            calls.setdefault(piece.index, Call(CallFunction(""), index=piece.index)).function.arguments += piece.text
    delta.tool_calls = list(calls.values()) or UNSET
    return delta


def _text(pieces: list[Piece], kind: str) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def most_probable(item: TokenLogprobs, count: int) -> list[tuple[int, float]]:
    """The `count` most probable tokens at a position, best first; the chosen token counts if it is one of them."""
    candidates = dict(zip(item.token_ids, item.logprobs, strict=True))
    if item.rank > count:
        del candidates[item.token_ids[0]]
    return sorted(candidates.items(), key=lambda pair: -pair[1])[:count]


def _usage_reply(usage: Usage) -> UsageReply:
    total = usage.prompt_tokens + usage.completion_tokens
    return UsageReply(usage.prompt_tokens, usage.completion_tokens, total, PromptDetails(usage.cached_tokens))


def _finite(logprob: float) -> float:
    """JSON has no -inf; a token that was masked out gets a value that is as good as none, as in vLLM."""
    return max(logprob, -9999.0)
