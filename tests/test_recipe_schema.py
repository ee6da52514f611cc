"""The JSON Schema that editors show: current, and of one mind with the loader."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from buildsys.document import read
from buildsys.recipe_schema import schema, text
from buildsys.slots import modules

ROOT = Path(__file__).parents[1]
FULL: dict[str, Any] = {
    "schema": 1,
    "source": {"local": {"path": "m"}},
    "calibration": {"dataset": "self_generated"},
    "quantization": {"bits": 4, "method": ["awq", {"gptq": {"damping": 0.1}}]},
    "format": "awq",
    "verify": {"text": {"self_generated": {}}, "kl": {"max_nats": 0.1}},
}


def valid(value: Any, rule: Any, root: dict[str, Any]) -> bool:
    """JSON Schema 2020-12 as far as the file uses it, one line a keyword; an unknown keyword fails the test."""
    if isinstance(rule, bool):
        return rule
    types = {"object": dict, "array": list, "string": str, "number": int | float, "integer": int, "boolean": bool, "null": type(None)}
    of, mapping = value if isinstance(value, dict) else {}, isinstance(value, dict)
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    keywords = {
        "type": lambda it: isinstance(value, types[it]) and not (isinstance(value, bool) and it in ("integer", "number")),
        "const": lambda it: value == it and type(value) is type(it),
        "enum": lambda it: value in it,
        "anyOf": lambda it: any(valid(value, one, root) for one in it),
        "not": lambda it: not valid(value, it, root),
        "if": lambda it: not valid(value, it, root) or valid(value, rule["then"], root),
        "then": lambda it: True,
        "$ref": lambda it: valid(value, root["$defs"][it.removeprefix("#/$defs/")], root),
        "required": lambda it: not mapping or all(key in of for key in it),
        "properties": lambda it: all(valid(inner, it[key], root) for key, inner in of.items() if key in it),
        "additionalProperties": lambda it: all(valid(of[key], it, root) for key in of.keys() - rule.get("properties", {}).keys()),
        "propertyNames": lambda it: all(valid(key, it, root) for key in of),
        "minProperties": lambda it: not mapping or len(of) >= it,
        "maxProperties": lambda it: not mapping or len(of) <= it,
        "items": lambda it: not isinstance(value, list) or all(valid(inner, it, root) for inner in value),
        "minItems": lambda it: not isinstance(value, list) or len(value) >= it,
        "minLength": lambda it: not isinstance(value, str) or len(value) >= it,
        "maxLength": lambda it: not isinstance(value, str) or len(value) <= it,
        "pattern": lambda it: not isinstance(value, str) or re.search(it, value) is not None,
        "minimum": lambda it: number is None or number >= it,
        "maximum": lambda it: number is None or number <= it,
        "exclusiveMinimum": lambda it: number is None or number > it,
        "exclusiveMaximum": lambda it: number is None or number < it,
    }
    silent = {"$schema", "$defs", "title", "description", "default"}
    return all(keywords[keyword](argument) for keyword, argument in rule.items() if keyword not in silent)


def accepts(value: Any) -> bool:
    found = schema()
    return valid(value, found, found)


def test_the_file_is_current() -> None:
    assert (ROOT / "recipes/recipe.schema.json").read_text() == text(), "run: python -m buildsys.recipe_schema > recipes/recipe.schema.json"


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_file_passes(file: Path) -> None:
    assert accepts(read(file, file.name).data)


@pytest.mark.parametrize(
    "value",
    [
        FULL,
        FULL | {"matrix": {"a": {"kv_cache": {"policy": "int8"}, "target": None}}},
        FULL | {"target": {"gpu": "h200"}},
        {"schema": 1, "extends": "../bases/x.yaml", "verify": {"samples": 3}},
        {"extends": ["a.yaml", "b.yaml"], "format": {"awq": None}},
        {"format": "awq"},  # a fragment
        {"calibration": {"samples": 3}, "target": None},
    ],
)
def test_what_an_editor_accepts(value: Any) -> None:
    assert accepts(value)


@pytest.mark.parametrize(
    "value",
    [
        {"schema": 1},
        {key: inner for key, inner in FULL.items() if key != "format"},
        FULL | {"formt": "awq"},
        FULL | {"format": "nope"},
        FULL | {"source": "local"},  # its path has no default
        FULL | {"quantization": {"bits": 5, "method": ["gptq"]}},
        FULL | {"quantization": {"bits": 4}},
        FULL | {"verify": {"text": "self_generated", "nope": {}}},
        FULL | {"matrix": {"a b": {}}},
        FULL | {"matrix": {"a": {"formt": "awq"}}},
        {"extends": 4},
        {"extends": "x.yaml", "calibration": {"samples": 0}},
    ],
)
def test_what_an_editor_underlines(value: Any) -> None:
    assert not accepts(value)


def test_every_choice_is_listed_with_what_it_is_for() -> None:
    found = schema()["$defs"]
    for holder, slot in (("Verify", "checks"), ("Publish", "publishers")):
        for name in modules(slot):
            assert found[holder]["properties"][name]["description"]
    for slot in ("sources", "datasets", "methods", "formats"):
        table = found[f"{slot.capitalize()}Choice"]["anyOf"][-1]
        assert sorted(table["properties"]) == list(modules(slot))
        assert all(knobs["description"] for knobs in table["properties"].values())


def test_every_key_is_described() -> None:
    found = schema()
    for properties in (
        found["properties"],
        *(found["$defs"][name]["properties"] for name in ("Calibration", "Quantization", "KvCache", "Target")),
    ):
        assert all(one.get("description") for one in properties.values())
