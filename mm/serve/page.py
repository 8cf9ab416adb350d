"""The OpenAPI description as a page to read, with nothing fetched from anywhere: servers of this kind run offline."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
h2 { margin: 2.5rem 0 .25rem; font-size: 1.1rem; overflow-wrap: anywhere } code { font-size: .95em }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0;
border-bottom: 1px solid #ddd } td:last-child { overflow-wrap: anywhere; width: 100% } th { font-weight: 600 } .of { color: #555 }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } .of { color: #aaa } td, th { border-color: #444 }
}
"""


def page(described: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI description: every operation with what it takes and what it answers."""
    info = described["info"]
    parts = [f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info.get('summary', ''))}</p>"]
    parts.append('<p>For programs the same stands at <a href="/openapi.json">/openapi.json</a>.</p>')
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            parts += _operation(described, method, path, operation)
    head = (
        f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{escape(info['title'])}</title>"
    )
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"


def _operation(described: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{_marked(operation.get('description', ''))}</p>"
    rows = [
        (one["name"], one["in"], one.get("schema", {}), one.get("required", False), one.get("description", ""))
        for one in operation.get("parameters", ())
    ]
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = _found(described, content.get("schema", {}))
        needed = schema.get("required", ())
        rows += [
            (name, "JSON" if kind.endswith("json") else "form", one, name in needed, one.get("description", ""))
            for name, one in schema.get("properties", {}).items()
        ]
    if rows:
        yield "<table><tr><th>field<th>in<th>what"
        for name, where, schema, needed, about in rows:
            said = f"{_kind(described, schema)}{'' if needed else ', optional'}"
            yield f"<tr><td><code>{escape(name)}</code><td>{where}<td><span class=of>{escape(said)}.</span> {_marked(about)}"
        yield "</table>"
    answers = ", ".join(
        f"{status} ({', '.join(answer.get('content', {})) or 'nothing'})" if status == "200" else status
        for status, answer in operation["responses"].items()
    )
    yield f"<p class=of>Answers: {escape(answers)}</p>"


def _marked(text: str) -> str:
    """With what stands between backticks as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))


def _found(described: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    return described["components"]["schemas"][name] if name else schema


def _kind(described: Mapping[str, Any], schema: Mapping[str, Any], depth: int = 0) -> str:
    """In a few words: types, choices, bounds."""
    schema = _found(described, schema)
    if "enum" in schema or "const" in schema:
        return " or ".join(map(str, schema.get("enum") or [schema["const"]]))
    if several := [one for one in schema.get("anyOf", schema.get("oneOf", ())) if one.get("type") != "null"]:
        return " or ".join(dict.fromkeys(_kind(described, one, depth) for one in several))
    if schema.get("type") == "array":
        return f"list of {_kind(described, schema.get('items', {}), depth)}"
    if schema.get("type") == "object" or "properties" in schema:
        inner = schema.get("properties", {}) if depth < 3 else {}
        return "{" + ", ".join(f"{name}: {_kind(described, one, depth + 1)}" for name, one in inner.items()) + "}"
    bounds = [
        f"{word} {schema[name] if schema[name] % 1 else int(schema[name]):,}"
        for name, word in (
            ("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"), ("minLength", "from"), ("maxLength", "up to"),
        )
        if name in schema and (name, schema[name]) != ("minLength", 1)
    ]  # fmt: skip
    letters = " characters" if "maxLength" in schema else ""
    return " ".join([str(schema.get("format", schema.get("type", "anything"))), *bounds]) + letters
