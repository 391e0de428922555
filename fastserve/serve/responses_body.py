"""The body of POST /v1/responses: OpenAI's items and tools in, those of the chat endpoint out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator

from fastserve.core.errors import RequestError
from fastserve.core.sampling_params import MAX_LOGPROBS
from fastserve.core.structured_outputs import StructuredOutputs
from fastserve.serve.openai import (
    MAX_MESSAGES,
    MAX_TOOL_CALLS,
    MAX_TOOLS,
    Body,
    ChatTemplateFields,
    FunctionName,
    FunctionSpec,
    GenerationBody,
    Message,
    Name,
    NamedTool,
    Tool,
    shown,
    structured,
)

LOGPROBS = "message.output_text.logprobs"
MAX_METADATA = 16
_TEXTS = ("input_text", "output_text", "text")
_Ignored = Annotated[list[Any], Field(max_length=1_000_000)]


class InputText(Body):
    """One piece of text in a message; answers that are sent back have more fields than those that are written."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: _Ignored | None = None


Texts = str | Annotated[list[InputText], Field(fail_fast=True, max_length=MAX_MESSAGES)]


class Item(Body):
    """What all items of a conversation may have besides their own fields."""

    id: Name | None = None
    status: Name | None = None


class MessageItem(Item):
    """One turn of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Texts
    phase: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_parts(cls, values: Any) -> Any:
        content = values.get("content") if isinstance(values, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") not in _TEXTS:
                raise RequestError(f"this model takes text only, not {str(part.get('type'))[:50]!r}", "input")
        return values


class CallItem(Item):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: str


class CallOutputItem(Item):
    """What a called function gave back."""

    type: Literal["function_call_output"]
    call_id: Name
    output: Texts


class ReasoningText(Body):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Item):
    """Thoughts that came before a message or a call."""

    type: Literal["reasoning"]
    summary: _Ignored | None = None
    content: Annotated[list[ReasoningText], Field(fail_fast=True, max_length=MAX_MESSAGES)] | None = None
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {"encrypted_content": ()}


_KINDS = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
}


def _kind(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise RequestError(f"input items of type {str(kind)[:50]!r} are not supported", "input")
    return kind


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]
_ITEM: TypeAdapter[Any] = TypeAdapter(InputItem)


class FunctionTool(FunctionSpec):
    """A function in the form of responses: its fields lie in the tool itself."""

    type: Literal["function"]


class FunctionChoice(Body):
    """`tool_choice` that names the function to be called."""

    type: Literal["function"]
    name: Name


class TextFormat(Body):
    """`text.format`."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @classmethod
    def known_names(cls) -> set[str]:
        return {"schema", *cls.model_fields}

    def wanted(self) -> StructuredOutputs | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputs(json_object=True)
        if self.schema_ is None or self.name is None:
            raise RequestError("text.format of type json_schema needs name and schema", "text")
        return structured(json=self.schema_)


class TextBody(Body):
    format: TextFormat | None = None


class ResponsesBody(GenerationBody, ChatTemplateFields):
    """POST /v1/responses, with the sampling fields of the other endpoints."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
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
    text: TextBody | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=MAX_METADATA),
        ]
        | None
    ) = None

    @model_validator(mode="before")
    @classmethod
    def _check_repeatable(cls, values: Any) -> Any:
        """The response repeats what it was asked with, so that must be what JSON can say: Python reads more."""
        for name, value in values.items() if isinstance(values, dict) else ():
            try:
                msgspec.json.encode(value)
            except (OverflowError, UnicodeEncodeError, RecursionError) as error:
                raise RequestError(f"{shown(name)} cannot be written as JSON ({error})", shown(name)) from error
        return values

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for name in ("n", "max_tokens", "prompt_logprobs"):
            if getattr(self, name) is not None:
                raise RequestError(f"{name} is not a field of responses; see /docs", name)
        if self.response_format is not None:
            raise RequestError("responses have text.format in place of response_format", "response_format")
        if unknown := set(self.include or ()) - {LOGPROBS}:
            raise RequestError(f"include takes {LOGPROBS} here, not {min(unknown)[:100]!r}", "include")
        if self.top_logprobs and self.num_logprobs is None:
            raise RequestError(f"top_logprobs needs include: [{LOGPROBS!r}]", "top_logprobs")
        if self.background and (self.stream or self.store is False):
            raise RequestError("a background response is stored and not streamed: get it by its id", "background")
        return self

    def items(self) -> list[dict[str, Any]]:
        """The new turns, as plain items."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return [item.model_dump(exclude_none=True) for item in self.input]

    def chat_tools(self) -> list[Tool]:
        """The tools as the chat endpoint knows them."""
        specs = (tool.model_dump(exclude={"type"}) for tool in self.tools or ())
        return [Tool(type="function", function=FunctionSpec(**spec)) for spec in specs]

    def chat_tool_choice(self) -> str | NamedTool | None:
        """`tool_choice` as the chat endpoint knows it."""
        choice = self.tool_choice
        if isinstance(choice, FunctionChoice):
            return NamedTool(type="function", function=FunctionName(name=choice.name))
        return choice

    def _form_of_answer(self) -> StructuredOutputs | None:
        return None if self.text is None or self.text.format is None else self.text.format.wanted()

    def _max_tokens(self) -> int | None:
        return self.max_output_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None


def messages_of(items: Iterable[dict[str, Any]]) -> list[Message]:
    """Items as the messages that chat templates know: calls and thoughts become part of an assistant's turn."""
    messages: list[dict[str, Any]] = []
    thoughts: str | None = None
    is_open = False  # whether the last message is an assistant's, which calls may still join
    for values in items:
        item = _ITEM.validate_python(values)
        if isinstance(item, ReasoningItem):
            thoughts = "".join(part.text for part in item.content or ()) or None
            is_open = False
            continue
        if isinstance(item, CallItem):
            if not is_open:
                messages.append({"role": "assistant", "reasoning_content": thoughts})
            call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
            calls = messages[-1].setdefault("tool_calls", [])
            calls.append(call)
            if len(calls) > MAX_TOOL_CALLS:
                raise RequestError(f"more than {MAX_TOOL_CALLS} calls follow one another", "input")
            is_open = True
        elif isinstance(item, CallOutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)})
            is_open = False
        else:
            is_open = item.role == "assistant"
            message = {"role": item.role, "content": _joined(item.content)}
            messages.append({**message, "reasoning_content": thoughts} if is_open else message)
        thoughts = None
    if not messages:
        raise RequestError("the input has thoughts only; give a message or the output of a call", "input")
    return [Message.model_validate(message) for message in messages]


def _joined(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
