"""Flags made from the option dataclasses, so that no list of options exists twice.

A field `max_batch_tokens: int = 1024` becomes `--max-batch-tokens`, with the line of the class's docstring about it as
help. Fields that have no natural flag (mappings) are left out, and so are secrets.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from fastserve.core.config import SIZE_FIELDS
from fastserve.core.errors import FastServeError

INTERRUPTED = 130
_HELP_LINE = re.compile(r"^ {4,8}(\w+(?:, \w+)*): (.*)$")
# A secret on the command line would be seen by every user of the machine.
_NO_FLAG = frozenset({"api_key"})

ConfigFile = typing.Annotated[
    Path | None, typer.Option("--config", help="TOML file with options; flags win over it.", metavar="FILE")
]
Model = typing.Annotated[
    str | None, typer.Argument(help="Model folder or hub id; the built-in model without it.", show_default=False)
]


def with_options(*groups: tuple[type, str], leave_out: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Any]:
    """Give a command one flag per dataclass field; the values that were given arrive as the mapping `options`.

    Args:
        groups: dataclasses with the titles under which --help lists their fields; the first that has a field lists it.
        leave_out: fields that the command takes in its own way.
    """
    titles: dict[str, tuple[type, str]] = {}
    for owner, title in groups:
        for item in fields(owner):
            titles.setdefault(item.name, (owner, title))
    parameters = [
        _parameter(owner, item, title)
        for owner, title in groups
        for item in fields(owner)
        if titles[item.name] == (owner, title) and item.name not in _NO_FLAG and item.name not in leave_out
    ]
    made = [parameter for parameter in parameters if parameter is not None]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True)
        kept = [parameter for parameter in own.parameters.values() if parameter.name != "options"]

        @functools.wraps(function)
        def command(**values: Any) -> None:
            options = {parameter.name: values.pop(parameter.name) for parameter in made}
            given = {name: value for name, value in options.items() if value not in (None, [])}
            function(**values, options=given)

        command.__signature__ = inspect.Signature([*kept, *made])  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*kept, *made]}
        return command

    return decorate


class GroupedCommand(TyperCommand):
    """Plain help with the options under the titles of their groups; typer's rich help is slow to import."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                plain = "Arguments" if parameter.param_type_name == "argument" else "Options"
                title = getattr(parameter, "rich_help_panel", None) or plain
                groups.setdefault(title, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """One line for our own errors and the system's (a full disk), 130 for Ctrl-C; anything else is a bug and shows."""

    @functools.wraps(function)
    def command(*args: Any, **values: Any) -> None:
        try:
            function(*args, **values)
        except FastServeError as error:
            print(f"fastserve: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from error
        except BrokenPipeError:
            raise  # typer ends quietly where nobody reads on
        except OSError as error:
            if error.strerror is None:  # not from the system, but a package's own
                raise
            print(f"fastserve: {error.strerror}" + f": {error.filename}" * bool(error.filename), file=sys.stderr)
            raise typer.Exit(FastServeError.exit_code) from error
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None

    return command


def field_help(owner: type) -> dict[str, str]:
    """Field name -> its line in the docstrings of `owner` and its bases."""
    texts: dict[str, str] = {}
    for base in reversed(owner.__mro__[:-1]):
        last: tuple[str, ...] = ()
        for line in (base.__doc__ or "").splitlines():
            match = _HELP_LINE.match(line)
            if match is not None:
                last = tuple(match.group(1).split(", "))
                texts.update(dict.fromkeys(last, match.group(2)))
            elif last and line.startswith(" " * 12):
                texts.update({name: f"{texts[name]} {line.strip()}" for name in last})
            else:
                last = ()
    return texts


def _parameter(owner: type, item: Field[Any], title: str) -> inspect.Parameter | None:
    kind = _flag_type(typing.get_type_hints(owner)[item.name], item.name)
    if kind is None:
        return None
    flag = "--" + item.name.replace("_", "-")
    names = [f"{flag}/--no-{flag[2:]}"] if kind == bool | None else [flag]
    text = field_help(owner).get(item.name, "")
    default = item.default
    if default is not MISSING and default not in ("", None, ()) and not isinstance(default, bool):
        text = f"{text} Default: {default}."
    elif isinstance(default, bool):
        text = f"{text} Default: {'on' if default else 'off'}."
    metavar = "SIZE" if item.name in SIZE_FIELDS else None
    option = typer.Option(None, *names, help=text, rich_help_panel=title, show_default=False, metavar=metavar)
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def _flag_type(hint: Any, name: str) -> Any:
    """The type of the flag: None when not given; None for fields that have no flag."""
    if name in SIZE_FIELDS:
        return str | None
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is tuple:
        return list[typing.get_args(kind)[0]] | None  # type: ignore[misc]
    return kind | None if kind in (bool, int, float, str) else None
