"""The page /docs: the endpoints and their fields, made from the OpenAPI description. One file, no script, no CDN."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "code{background:#f3f3f3;padding:.1em .3em}h2{margin-top:2rem;font-size:1.1rem}"
    "table{border-collapse:collapse;width:100%;font-size:.9rem}td,th{border:1px solid #ddd;padding:.3rem .5rem;"
    "text-align:left;vertical-align:top}"
)


def render_docs(schema: Mapping[str, Any]) -> str:
    """A page for people from an OpenAPI description."""
    title = f"{escape(schema['info']['title'])} {escape(schema['info']['version'])}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'<h1>{title}</h1><p>The machine-readable form is <a href="openapi.json">openapi.json</a>.</p>'
        + "".join(_sections(schema))
    )


def _sections(schema: Mapping[str, Any]) -> Iterator[str]:
    models = schema.get("components", {}).get("schemas", {})
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code> {escape(operation.get('summary', ''))}</h2>"
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            reference = content.get("schema", {}).get("$ref", "")
            if reference:
                yield _field_table(models[reference.rpartition("/")[2]])


def _field_table(model: Mapping[str, Any]) -> str:
    required = set(model.get("required", ()))
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code><td>{escape(_describe(field))}<td>{'yes' if name in required else ''}"
        for name, field in sorted(model.get("properties", {}).items(), key=lambda item: item[0] not in required)
    )
    return f"<table><tr><th>field<th>type<th>required{rows}</table>"


def _describe(field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(_describe(option) for option in field["anyOf"])
    if field.get("type") == "array":
        return f"list of {_describe(field.get('items', {}))}"
    return str(field.get("type", "any"))
