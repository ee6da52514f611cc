"""JSON Schema of a recipe file, for editors: recipes/recipe.schema.json, to which each recipe's first line points.

JSON Schema draft 2020-12. A file is held to all required keys only where it is a whole recipe: it says `schema:` and extends nothing.
Fragments, files that extend, and variants may leave any key out, and may write null to remove one.
`python -m buildsys.recipe_schema` prints it.
"""

from __future__ import annotations

import json
from typing import Any

from buildsys.recipe import Recipe
from buildsys.slots import SLOTS, choice, modules
from buildsys.workspace import NAME

LOOSE = "Partial"
"""Prefix of the definitions in which nothing is required."""


def schema() -> dict[str, Any]:
    """What an editor needs to complete, explain and check a recipe."""
    whole = Recipe.model_json_schema(by_alias=True)
    strict = whole.pop("$defs")
    for slot in SLOTS:
        _describe(strict, slot)
    loose = {LOOSE + name: _loosened(definition) for name, definition in strict.items()}
    properties = _loosened(whole)["properties"]
    version = properties.pop("schema")
    variant = {"type": "object", "properties": properties, "additionalProperties": False}
    extends = {"description": "files whose values this one lays its own over; paths relative to this file", "$ref": "#/$defs/Extends"}
    matrix = {
        "description": "variants of this recipe by name (recipe@name), each a partial recipe laid over this file; not inherited",
        "type": "object",
        "propertyNames": {"pattern": f"^{NAME.pattern}$"},
        "additionalProperties": {"$ref": "#/$defs/Variant"},
    }
    paths = {"type": "string", "minLength": 1}
    added = {"Extends": {"anyOf": [paths, {"type": "array", "items": paths}]}, "Variant": variant}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "buildsys recipe",
        "description": whole["description"],
        "type": "object",
        "properties": {"schema": version, "extends": extends, **properties, "matrix": matrix},
        "additionalProperties": False,
        "if": {"required": ["schema"], "not": {"required": ["extends"]}},
        "then": {"properties": whole["properties"], "required": whole["required"]},
        "$defs": dict(sorted((strict | loose | added).items())),
    }


def text() -> str:
    """The file's content."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def _describe(definitions: dict[str, Any], slot: str) -> None:
    """Of a slot's choice: exactly one name, bare where its knobs all have defaults; each with what its module says it is for."""
    made = choice(slot)
    definition = definitions.get(made.__name__)
    about = {name: (module.__doc__ or "").strip().partition("\n")[0] for name, module in modules(slot).items()}
    if definition is None:  # choices that stand as keys beside others, as checks do
        holders = [holder for holder in definitions.values() if about.keys() and about.keys() <= holder.get("properties", {}).keys()]
        for holder in holders:
            for name, line in about.items():
                holder["properties"][name] = {"description": line, **_only(holder["properties"][name])}
        return
    knobs = {name: {"description": about[name], **_only(found)} for name, found in definition["properties"].items()}
    bare = [
        {"const": name, "description": about[name]}
        for name, module in modules(slot).items()
        if not any(field.is_required() for field in module.Knobs.model_fields.values())
    ]
    table = {"type": "object", "properties": knobs, "additionalProperties": False, "minProperties": 1, "maxProperties": 1}
    definitions[made.__name__] = {"anyOf": [*bare, table]}


def _only(definition: dict[str, Any]) -> dict[str, Any]:
    """Knobs without pydantic's `or null` for choices that are not named."""
    branches = [branch for branch in definition["anyOf"] if branch != {"type": "null"}]
    return dict(branches[0])


def _loosened(definition: Any) -> Any:
    """A copy in which no key is required and null may stand for any property."""
    if isinstance(definition, list):
        return [_loosened(item) for item in definition]
    if not isinstance(definition, dict):
        return definition
    loose = {key: _loosened(value) for key, value in definition.items() if key not in ("required", "properties", "minProperties")}
    if "properties" in definition:
        loose["properties"] = {name: _nullable(_loosened(value)) for name, value in definition["properties"].items()}
    if "$ref" in definition:
        loose["$ref"] = definition["$ref"].replace("#/$defs/", f"#/$defs/{LOOSE}")
    return loose


def _nullable(definition: dict[str, Any]) -> dict[str, Any]:
    outside = ("description", "default", "title")
    inner = {key: value for key, value in definition.items() if key not in outside}
    return {key: definition[key] for key in outside if key in definition} | {"anyOf": [inner, {"type": "null"}]}


if __name__ == "__main__":
    print(text(), end="")
