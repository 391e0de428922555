"""The body of POST /v1/responses: OpenAI's items in, messages for the chat template out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fastserve.core.errors import RequestError
from fastserve.core.sampling_params import MAX_LOGPROBS
from fastserve.serve.openai import MAX_MESSAGES, Body, ChatTemplateFields, GenerationBody, Message, Name

LOGPROBS = "message.output_text.logprobs"
MAX_METADATA = 16


class InputText(Body):
    """One piece of text in a message; answers that are sent back have more fields than those that are written."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=1_000_000)] | None = None


class InputItem(Body):
    """One turn of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputText], Field(fail_fast=True, max_length=MAX_MESSAGES)]
    id: Name | None = None
    status: Name | None = None
    phase: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_kinds(cls, values: Any) -> Any:
        if isinstance(values, dict):
            kind = values.get("type", "message")
            if kind != "message":
                raise RequestError(f"input items of type {str(kind)[:50]!r} are not supported yet", "input")
            content = values.get("content")
            for part in content if isinstance(content, list) else ():
                if isinstance(part, dict) and part.get("type") not in ("input_text", "output_text", "text"):
                    raise RequestError(f"this model takes text only, not {str(part.get('type'))[:50]!r}", "input")
        return values

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def message(self) -> Message:
        """The turn as the chat endpoint knows it."""
        return Message(role=self.role, content=self.text)


class ResponsesBody(GenerationBody, ChatTemplateFields):
    """POST /v1/responses, with the sampling fields of the other endpoints."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "tool_choice": ("auto", "none"),
        "text": ({}, {"format": {"type": "text"}}),
        "reasoning": ({},),
        "truncation": ("disabled",),
        "max_tool_calls": (),
        "conversation": (),
        "prompt": (),
        "context_management": (),
        "moderation": (),
    }

    input: str | Annotated[list[InputItem], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    previous_response_id: Name | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    include: Annotated[list[Name], Field(fail_fast=True, max_length=16)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    store: bool | None = None
    background: bool | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=MAX_METADATA),
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for name in ("n", "max_tokens", "prompt_logprobs"):
            if getattr(self, name) is not None:
                raise RequestError(f"{name} is not a field of responses; see /docs", name)
        if unknown := set(self.include or ()) - {LOGPROBS}:
            raise RequestError(f"include takes {LOGPROBS} here, not {min(unknown)[:100]!r}", "include")
        if self.top_logprobs and self.num_logprobs is None:
            raise RequestError(f"top_logprobs needs include: [{LOGPROBS!r}]", "top_logprobs")
        if self.background and (self.stream or self.store is False):
            raise RequestError("a background response is stored and not streamed: get it by its id", "background")
        return self

    def items(self) -> list[InputItem]:
        """The new turns."""
        return [InputItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    def _max_tokens(self) -> int | None:
        return self.max_output_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None
