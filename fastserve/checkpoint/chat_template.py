"""Chat templates: a list of messages -> the prompt's text, by the model's own jinja2 template.

Templates come from strangers, so they run in jinja2's immutable sandbox over plain JSON values, with limits on their
own size, on their time, and on every text that they make: each loop, call and filter is counted. What templates of
the hub expect is there: loop controls, raise_exception, strftime_now, tojson without HTML escapes, and the generation
tag.
"""

from __future__ import annotations

import datetime
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
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
MAX_SECONDS = 0.5  # of processor time, so that a busy machine refuses nothing
_MAX_WIDTH = 10_000
# Methods of texts whose result is much longer than what they are given.
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
# Filters that take a width.
_WIDE_FILTERS = frozenset({"center", "indent", "truncate", "wordwrap", "batch", "slice", "round", "tojson"})
_TICK = "fastserve_tick"
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
            compiled = self._compiled
            compiled.environment.deadline = time.thread_time() + MAX_SECONDS
            for piece in compiled.generate(values):
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
    for name, function in list(environment.filters.items()):
        environment.filters[name] = environment.bounded(name, function)
    environment.filters[_TICK] = environment.tick
    return environment


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses what would make huge values in one step, and ends a template that takes too long.

    Attributes:
        deadline: processor time of this thread at which a template is stopped.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    deadline = 0.0

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The template with every loop counted, and with `~` as a `+` of texts, which is checked."""
        template = super()._parse(source, name, filename)
        for loop in list(template.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, _TICK, [], [], None, None, lineno=loop.lineno)
        for joined in list(template.find_all(nodes.Concat)):
            texts: list[nodes.Expr] = [nodes.Filter(node, "string", [], [], None, None) for node in joined.nodes]
            joined.nodes = [functools.reduce(nodes.Add, texts)]
        template.set_environment(self)
        return template

    def check_time(self) -> None:
        if time.thread_time() > self.deadline:
            raise SecurityError(f"it takes longer than {MAX_SECONDS:g} s")

    def tick(self, items: Any) -> Iterator[Any]:
        """The items of a loop, as long as there is time."""
        for item in items:
            self.check_time()
            yield item

    def bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter with its arguments and its result checked."""

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            self.check_time()
            texts = [value for value in args if isinstance(value, str)]
            for value in (*args, *kwargs.values()) if name in _WIDE_FILTERS else ():
                if isinstance(value, int) and abs(value) > _MAX_WIDTH:
                    raise SecurityError(f"{name} with {value} makes a text that is too long")
            if name == "replace" and len(texts) > 2:
                _check_replacement(*texts[:3])
            if name == "join":
                args = _with_bounded_items(args, function)
            result = function(*args, **kwargs)
            if isinstance(result, str) and len(result) > MAX_PROMPT_LENGTH:
                raise SecurityError(f"it makes more than {MAX_PROMPT_LENGTH} characters")
            return result

        return checked

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.check_time()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str):
            if name in _PADDING and any(isinstance(value, int) and value > _MAX_WIDTH for value in args):
                raise SecurityError(f"{name} makes a text that is too long")
            if name == "replace" and len(args) >= 2:
                _check_replacement(owner, *args[:2])
            if name == "join" and args:
                args = ([*_bounded_items(args[0], len(owner))], *args[1:])
        return super().call(context, obj, *args, **kwargs)

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


def _bounded_items(items: Any, separator_length: int = 0) -> Iterator[Any]:
    """The items to be joined, as long as their sum stays within what a template may make."""
    length = 0
    for item in items:
        length += separator_length + (len(item) if isinstance(item, str) else 1)
        if length > MAX_PROMPT_LENGTH:
            raise SecurityError(f"it makes more than {MAX_PROMPT_LENGTH} characters")
        yield item


def _with_bounded_items(args: tuple[Any, ...], join: Callable[..., Any]) -> tuple[Any, ...]:
    """The arguments of the filter join, which jinja2 calls with its own evaluation context first."""
    place = 1 if hasattr(join, "jinja_pass_arg") else 0
    separator = args[place + 1] if len(args) > place + 1 and isinstance(args[place + 1], str) else ""
    return (*args[:place], [*_bounded_items(args[place], len(separator))], *args[place + 1 :])


def _check_replacement(text: str, old: str, new: str) -> None:
    count = text.count(old) if old else len(text) + 1
    if count * len(new) > MAX_PROMPT_LENGTH:
        raise SecurityError(f"it makes more than {MAX_PROMPT_LENGTH} characters")


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
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _cut_at_marker(text: str) -> str:
    position = text.rfind(_MARKER.strip())
    if position < 0:
        raise RequestError("the chat template does not show the final message's text", "continue_final_message")
    kept = text[:position]
    is_verbatim = text.startswith(_MARKER, position)
    return kept if is_verbatim else kept.rstrip()
