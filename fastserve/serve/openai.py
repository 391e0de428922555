"""Bodies of requests in OpenAI's form, with the extra sampling fields that users of vLLM know.

Types are checked here, strictly; ranges are checked once, by SamplingParams. A field that we do not know, or do not
support yet, is refused by name: nothing that would change the answer is ignored silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fastserve.core.errors import RequestError
from fastserve.core.sampling_params import MAX_LOGPROBS, SamplingParams
from fastserve.core.structured_outputs import StructuredOutputs

MAX_PROMPTS = 2048
MAX_MESSAGES = 4096
MAX_TEMPLATE_ARGUMENTS = 32
MAX_ENTRIES = 4096
MAX_TIMEOUT_SECONDS = 7 * 86400
MAX_TOOLS = 128
MAX_TOOL_CALLS = 1024

Name = Annotated[str, Field(max_length=1024)]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]
# Lists stop at their first fault: an error for each of a million items would take all memory.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True, min_length=1)]

# Bookkeeping of OpenAI's own service: taken and not used, because it cannot change the answer.
_WITHOUT_EFFECT = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "parallel_tool_calls", "prediction"),
    }
)
# Known fields that are not supported yet, with the values that ask for nothing.
_NOT_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
    "tool_calls": ([],),
    "refusal": (),
    "annotations": ([],),
}


class Body(BaseModel):
    """Base of all bodies: strict types; see the module docstring about unknown fields."""

    model_config = ConfigDict(strict=True, extra="ignore")
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # more fields of one body, with values that ask for nothing

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, value in values.items():
            if isinstance(value, dict) and len(value) > MAX_ENTRIES:
                raise RequestError(
                    f"{shown(name)} has {len(value)} entries; at most {MAX_ENTRIES} are read", shown(name)
                )
        for name in values.keys() - cls.known_names() - _WITHOUT_EFFECT:
            value = values[name]
            neutral = cls.NEUTRAL.get(name, _NOT_SUPPORTED.get(name))
            if value is None or value in (neutral or ()):
                continue
            reason = "is not a known field" if neutral is None else "is not supported yet"
            raise RequestError(f"{shown(name)} {reason}", shown(name))
        return values

    @classmethod
    def known_names(cls) -> set[str]:
        """Fields as clients write them."""
        return set(cls.model_fields)


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class JsonSchemaFormat(Body):
    """`response_format.json_schema`. Every schema is followed strictly, whatever `strict` says."""

    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    name: Name | None = None
    description: str | None = None
    strict: bool | None = None

    @classmethod
    def known_names(cls) -> set[str]:
        return {"schema", *cls.model_fields}


class ResponseFormat(Body):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def wanted(self) -> StructuredOutputs | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputs(json_object=True)
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise RequestError("response_format of type json_schema needs json_schema.schema", "response_format")
        return structured(json=self.json_schema.schema_)


class StructuredOutputsBody(Body):
    """vLLM's `structured_outputs`."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None

    @classmethod
    def known_names(cls) -> set[str]:
        return {"json", *cls.model_fields}

    def wanted(self) -> StructuredOutputs:
        values = self.model_dump(exclude_none=True, exclude={"json_"})
        return structured(**values) if self.json_ is None else structured(json=self.json_, **values)


def structured(**values: Any) -> StructuredOutputs:
    """StructuredOutputs of values that came with a body: a schema may be an object, choices a list."""
    return StructuredOutputs(**values)


class GenerationBody(Body):
    """What completions and chat completions share. None means not given: the model's own default applies."""

    model: Name | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    priority: Priority = 0
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsBody | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    guided_grammar: str | None = None
    num_beams: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    no_repeat_ngram_size: int | None = None

    # Fields that are passed to SamplingParams as they are.
    _SAMPLING: ClassVar[tuple[str, ...]] = (
        *("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
        *("frequency_penalty", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos"),
        *("min_tokens", "prompt_logprobs", "skip_special_tokens", "length_penalty", "early_stopping"),
        "no_repeat_ngram_size",
    )

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true", "stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs comes with the whole answer only; leave out stream", "prompt_logprobs")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk of a stream has the token counts so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The body's values over the model's defaults.

        Raises:
            RequestError: a value is out of its range.
        """
        width = self.asked_width()
        num_beams = 1 if width is None else width
        # A search is not sampled, so the model's defaults of sampling have no place in it.
        base = {"temperature": 0.0} if num_beams > 1 else defaults
        return SamplingParams(**{**base, "num_beams": num_beams, **self.given()})

    def given(self) -> dict[str, Any]:
        """Fields of SamplingParams that the body has, but for `num_beams`."""
        values = {name: getattr(self, name) for name in self._SAMPLING if getattr(self, name) is not None}
        values |= {"max_tokens": self._max_tokens(), "logprobs": self.num_logprobs}
        if self.logit_bias is not None:
            values["logit_bias"] = _token_biases(self.logit_bias)
        values["structured_outputs"] = self.wanted_structure()
        return values

    def asked_width(self) -> int | None:
        """Beams of a search, as `num_beams` or as vLLM has it; 1 for no search, None when nothing is said."""
        width = self.num_beams
        if self.use_beam_search:
            width = getattr(self, "best_of", None) or self.n or 1 if width is None else width
            if width < 2:
                raise RequestError("use_beam_search needs num_beams, or n, above 1", "use_beam_search")
        elif self.use_beam_search is False:
            if width is not None and width != 1:
                raise RequestError("num_beams asks for a search, use_beam_search for none; leave out one", "num_beams")
            width = 1
        return width

    def wanted_structure(self) -> StructuredOutputs | None:
        """The form that the answer must have, in whichever of the three ways it was asked for.

        Raises:
            RequestError: asked for in several ways, or not usable.
        """
        guided = {
            "json": self.guided_json,
            "regex": self.guided_regex,
            "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }
        wanted = [structured(**{name: value}) for name, value in guided.items() if value is not None]
        if self.structured_outputs is not None:
            wanted.append(self.structured_outputs.wanted())
        by_format = self._form_of_answer()
        wanted += [] if by_format is None else [by_format]
        if len(wanted) > 1:
            raise RequestError("give one of response_format, structured_outputs and guided_*", "structured_outputs")
        return wanted[0] if wanted else None

    def _form_of_answer(self) -> StructuredOutputs | None:
        """OpenAI's own way to ask for a form."""
        return None if self.response_format is None else self.response_format.wanted()

    def _max_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        raise NotImplementedError


class CompletionBody(GenerationBody):
    """POST /v1/completions. `prompt` is a text or token ids, or a list of either."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: int | None = None
    add_special_tokens: bool = True
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        if self.max_tokens == 0 and (self.stream or not self.echo):
            raise RequestError("max_tokens may be 0 only with echo: true and without stream", "max_tokens")
        if self.num_candidates < self.num_choices:
            raise RequestError(f"best_of ({self.best_of}) must be at least n ({self.n})", "best_of")
        if self.stream and self.num_candidates > self.num_choices:
            raise RequestError("best_of compares whole answers; leave out stream", "best_of")
        if self.suffix and self.echo:
            raise RequestError("echo and suffix exclude each other", "suffix")
        return self

    @property
    def num_choices(self) -> int:
        """Answers per prompt in the reply."""
        return 1 if self.n is None else self.n

    @property
    def num_candidates(self) -> int:
        """Answers per prompt that are made; the reply has the best of them."""
        return self.num_choices if self.best_of is None or self.use_beam_search else self.best_of

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        params = super().sampling_params(defaults)
        if self.num_candidates > self.num_choices:
            params = replace(params, n=self.num_candidates, logprobs=params.logprobs or 0)
        if self.echo and self.logprobs is not None:
            params = replace(params, prompt_logprobs=max(self.logprobs, params.prompt_logprobs or 0))
        return params

    def prompts(self) -> list[str] | list[list[int]]:
        """One or more prompts, all texts or all token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def _max_tokens(self) -> int | None:
        # OpenAI's default is 16. The engine always makes a token; with 0 it is not shown.
        return 16 if self.max_tokens is None else self.max_tokens or 1

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: Name
    arguments: str


class ToolCall(Body):
    """A call that the model made in an earlier turn. `index` is what pieces of a stream carry; it is not used."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Body):
    """One turn. Content is a text or a list of text parts."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_MESSAGES)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOL_CALLS)] | None = None
    tool_call_id: Name | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_parts(cls, values: Any) -> Any:
        content = values.get("content") if isinstance(values, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") != "text":
                raise RequestError(f"this model takes text only, not {str(part.get('type'))[:50]!r}", "messages")
        return values

    def for_template(self) -> dict[str, Any]:
        """The form that chat templates expect: plain text, and developer under its older name system."""
        if isinstance(self.content, list):
            content = "".join(part.text for part in self.content)
        else:
            content = self.content or ""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        return message


class FunctionSpec(Body):
    """`parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionSpec


class FunctionName(Body):
    name: Name


class NamedTool(Body):
    """`tool_choice` that names the one to be called."""

    type: Literal["function"]
    function: FunctionName


class ChatTemplateFields(Body):
    """How messages become a prompt."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_ARGUMENTS)] | None = None


class ChatBody(GenerationBody, ChatTemplateFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
        return self

    def _max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeBody(ChatTemplateFields):
    """POST /tokenize: `prompt`, or `messages` to be put through the chat template."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt or messages", "prompt")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True, max_length=1_000_000)]


def shown(name: Any) -> str:
    """A client's own name for a field, fit to be shown."""
    return str(name)[:100].encode("utf-8", "backslashreplace").decode()


def _token_biases(biases: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token_id): value for token_id, value in biases.items()}
    except ValueError as error:
        raise RequestError("logit_bias takes token ids as keys", "logit_bias") from error
