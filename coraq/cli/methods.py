"""`coraq methods`: what there is to quantize with, where it comes from, and what can be set."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coraq.cli import options
from coraq.cli.loading import load_networks

if TYPE_CHECKING:
    from pydantic import BaseModel

_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def methods(
    name: Annotated[str | None, typer.Argument(help="a method: print its options")] = None,
    plugins_dir: options.PluginsDir = None,
    as_json: options.AsJson = False,
) -> None:
    """List the methods with their source; with NAME, print that method's options."""
    options.use_plugins(plugins_dir or [])
    load_networks()

    from coraq import registry

    if name is None:
        rows = [dataclasses.asdict(info) for info in registry.available().values()]
        if as_json:
            print(json.dumps(rows))
        else:
            _show_list(rows)
        return
    method, source = registry.find(name)
    row = {
        "name": method.name,
        "summary": method.summary,
        "version": method.version,
        "needs_data": method.needs_data,
        "scope": method.scope,
        "source": source,
    }
    settings = method_options(method.Config)
    if as_json:
        print(json.dumps({**row, "options": settings}))
    else:
        _show_one(row, settings)


def method_options(config: type[BaseModel]) -> list[dict[str, Any]]:
    """Name, type with bounds, default and description of each field of a method's Config."""
    properties = config.model_json_schema().get("properties", {})
    return [
        {
            "name": name,
            "type": _type_text(properties.get(name, {})),
            "default": None if field.is_required() else field.get_default(call_default_factory=True),
            "required": field.is_required(),
            "description": field.description or "",
        }
        for name, field in config.model_fields.items()
    ]


def _type_text(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words: "integer ≥ 1", "a | b", "number > 0 | null"."""
    if "anyOf" in schema:
        return " | ".join(_type_text(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    bounds = [f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema]
    return " ".join([str(schema.get("type", "any")), ", ".join(bounds)]).strip()


def _show_list(rows: list[dict[str, Any]]) -> None:
    from coraq.cli.display import columns_table, stdout

    console = stdout()
    working = [row for row in rows if not row["error"]]
    cells = [
        (row["name"], row["summary"], "images" if row["needs_data"] else "nothing", row["source"]) for row in working
    ]
    console.print(columns_table(["method", "what it does", "needs", "source"], cells))
    for row in rows:
        if row["error"]:
            console.print(f"broken: {row['name']} from {row['source']}", style="red")
            console.print(f"{row['error']}".rstrip())
    console.print("coraq methods NAME prints a method's options")


def _show_one(row: dict[str, Any], settings: list[dict[str, Any]]) -> None:
    from coraq.cli.display import columns_table, facts_table, stdout

    console = stdout()
    needs = "calibration images" if row["needs_data"] else "no images"
    facts = [("version", row["version"]), ("needs", needs), ("source", row["source"])]
    console.print(f"{row['name']}: {row['summary']}", style="bold")
    console.print(facts_table((label, str(text)) for label, text in facts))
    if not settings:
        console.print("\nno options")
        return
    cells = [
        (
            one["name"],
            one["type"],
            "required" if one["required"] else json.dumps(one["default"], default=str),
            one["description"],
        )
        for one in settings
    ]
    console.print(columns_table(["option", "type", "default", "meaning"], cells))
    console.print(
        f"set them with: coraq quantize MODEL --method {row['name']} -o {settings[0]['name']}=VALUE", soft_wrap=True
    )
