"""Chat templates: a list of messages -> the prompt's text, by the model's own jinja2 template.

Templates come from strangers, so they run in jinja2's immutable sandbox over plain JSON values, with a limit on their
own size, on what they make, and on repetition of text. What templates of the hub expect is there: loop controls,
raise_exception, strftime_now, tojson without HTML escapes, and the generation tag.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from fastserve.checkpoint.folder import ModelFolder, read_json
from fastserve.core.errors import CheckpointError, RequestError

MAX_TEMPLATE_LENGTH = 256 * 1024
MAX_PROMPT_LENGTH = 16 * 1024 * 1024
# Put at the end of the message to be continued, and cut off after rendering; the space tells whether it was trimmed.
_MARKER = "<<fastserve:continue:7c1f>> "


class ChatTemplate:
    """One template.

    Args:
        source: the jinja2 text; compiled when first used, so that a broken one does not keep a model from completing.
        special_tokens: bos_token, eos_token and so on, as templates see them.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE_LENGTH:
            raise CheckpointError(
                f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE_LENGTH} are read"
            )
        self.source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text.

        Raises:
            RequestError: the template refuses the messages (with its own words), cannot be run, or makes too much.
        """
        if not messages:
            raise RequestError("messages must have at least one message", "messages")
        prepared = [_prepare(message) for message in messages]
        if continue_final_message:
            if add_generation_prompt:
                raise RequestError(
                    "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
                )
            if not isinstance(prepared[-1].get("content"), str):
                raise RequestError("the final message has no text to continue", "continue_final_message")
            prepared[-1]["content"] += _MARKER
        values = {
            **self._special_tokens,
            **(variables or {}),
            "messages": prepared,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._run(values)
        return _cut_at_marker(text) if continue_final_message else text

    def _run(self, values: dict[str, Any]) -> str:
        pieces, length = [], 0
        try:
            for piece in self._compiled.generate(values):
                length += len(piece)
                if length > MAX_PROMPT_LENGTH:
                    raise TemplateError(f"it makes more than {MAX_PROMPT_LENGTH} characters")
                pieces.append(piece)
        except (Exception, RecursionError) as error:  # a template can raise whatever its expressions raise
            raise RequestError(f"the chat template says: {error}", "messages") from error
        return "".join(pieces)

    @cached_property
    def _compiled(self) -> Any:
        return _environment().from_string(self.source)


def find_template(folder: ModelFolder, has_tools: bool = False) -> str:
    """The folder's template, "" when it has none; the tool_use one for tools where there are several."""
    if folder.has("chat_template.jinja"):
        return (folder.path / "chat_template.jinja").read_text(encoding="utf-8")
    for file in ("tokenizer_config.json", "chat_template.json"):
        found = read_json(folder.path / file).get("chat_template") if folder.has(file) else None
        if isinstance(found, list):
            named = {item["name"]: item["template"] for item in found if isinstance(item, dict)}
            found = (named.get("tool_use") if has_tools else None) or named.get("default")
        if isinstance(found, str):
            return found
    return ""


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag])
    environment.globals.pop("lipsum", None)
    environment.globals.update(
        dict=lambda *args, **kwargs: dict(*args, **kwargs),
        namespace=_PlainNamespace,
        raise_exception=_raise_exception,
        strftime_now=lambda form: datetime.datetime.now().strftime(form),
    )
    environment.filters["tojson"] = _to_json
    return environment


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses operators that would make huge values in one step."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for text, count in ((left, right), (right, left)):
                if (
                    isinstance(text, (str, list, tuple))
                    and isinstance(count, int)
                    and len(text) * count > MAX_PROMPT_LENGTH
                ):
                    raise SecurityError("it repeats text too often")
        elif operator == "**" and not (abs(left) < 2**32 and abs(right) <= 64):
            raise SecurityError("it computes a number that is too large")
        elif operator == "%" and isinstance(left, str) and len(left) > MAX_TEMPLATE_LENGTH:
            raise SecurityError("it formats a text that is too long")
        elif operator == "+" and isinstance(left, str) and len(left) > MAX_PROMPT_LENGTH:
            raise SecurityError(f"it makes more than {MAX_PROMPT_LENGTH} characters")
        return super().call_binop(context, operator, left, right)


class _PlainNamespace(Namespace):
    """A namespace whose names cannot begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r} begins with an underscore")
        super().__setitem__(name, value)


class _GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %} marks what training learns from; for serving it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _prepare(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates know it: parts of text joined, tool arguments as an object instead of JSON text."""
    prepared = dict(message)
    content = prepared.get("content")
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise RequestError(f"this model reads text only, not content of type {kind!r}", "messages")
        prepared["content"] = "".join(part["text"] for part in content)
    if isinstance(prepared.get("tool_calls"), list):
        prepared["tool_calls"] = [_prepare_call(call) for call in prepared["tool_calls"]]
    return prepared


def _prepare_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _cut_at_marker(text: str) -> str:
    position = text.rfind(_MARKER.strip())
    if position < 0:
        raise RequestError("the chat template does not show the final message's text", "continue_final_message")
    kept = text[:position]
    is_verbatim = text.startswith(_MARKER, position)
    return kept if is_verbatim else kept.rstrip()
