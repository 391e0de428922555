"""Read a TOML recipe into dataclasses: a section is a dataclass, a key is a field.

A misspelt key or a value of the wrong type is an error that names it and lists what there is.
"""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fastserve.core.errors import ConfigError

Section = TypeVar("Section")


def read_toml(path: Path) -> dict[str, Any]:
    """The plain values of a recipe file; ConfigError if it is missing or no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}; see configs/ for examples") from None
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _build_value(kind: Any, value: Any, where: str) -> Any:
    """Turn plain TOML values into `kind`: a dataclass, a list or dict of something, or a scalar."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return build_section(kind, value, where)
    if origin is UnionType:
        return _build_value(next(item for item in arguments if item is not NoneType), value, where)
    if kind is Any:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_build_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is list and isinstance(value, list):
        return [_build_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _build_value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is kind:
        return value
    raise ConfigError(f"recipe key {where or 'top level'}: expected {getattr(kind, '__name__', kind)}, got {value!r}")


def build_section(kind: type[Section], value: Any, where: str) -> Section:
    """An instance of the dataclass `kind` from plain values; `where` is its place in the file, for messages."""
    if not isinstance(value, dict):
        raise ConfigError(f"recipe key {where}: expected a section with keys, got {value!r}")
    hints = get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(value) - set(fields)):
        raise ConfigError(
            f"recipe section [{where or 'top level'}]: unknown key {unknown[0]!r}; known keys are {', '.join(fields)}"
        )
    required = {name for name, item in fields.items() if _is_required(item)}
    if missing := sorted(required - set(value)):
        raise ConfigError(f"recipe section [{where or 'top level'}]: key {missing[0]!r} is missing")
    prefix = f"{where}." if where else ""
    return kind(**{name: _build_value(hints[name], item, prefix + name) for name, item in value.items()})


def _is_required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
