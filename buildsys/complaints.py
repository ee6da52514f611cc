"""A validation error in the words of whoever wrote the file: the line, the key and both values, and what to write instead.

pydantic tells where and which rule; the rest (choices, ranges, close names) is read from the models.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

import annotated_types as bound
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from buildsys.document import Document, Where, scalar
from buildsys.errors import BuildError
from buildsys.overlay import closest
from buildsys.slots import Choice

COMPOSING = ["extends", "matrix"]
"""Keys at the top of a file that are no part of a recipe's value."""

SHOWN = 60  # characters of a value in an error


class Complaint(BuildError):
    """`missing` is the path of the key that is not there, for errors of that kind: a fragment may leave keys out."""

    def __init__(self, where: str, what: str, fix: str, missing: Where | None = None) -> None:
        super().__init__(where, what, fix)
        self.missing = missing


def explain(error: ValidationError, model: type[BaseModel], data: Mapping[str, Any], document: Document) -> list[Complaint]:
    """Every mistake once. A union reports each of its branches; they are one mistake, of which each branch says what it would take."""
    found: dict[Where, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        found.setdefault(_written(details["loc"], data, details["type"] == "missing"), []).append(details)
    kept = {where: branches for where, branches in found.items() if branches[0]["type"] != "too_short" or not _has_below(where, found)}
    return [_complaint(where, branches, model, document) for where, branches in kept.items()]


def _has_below(where: Where, found: Mapping[Where, Any]) -> bool:
    """Whether items of the list at `where` are wrong too: pydantic then calls the list too short, which is no mistake of its own."""
    return any(len(other) > len(where) and other[: len(where)] == where for other in found)


def dotted(where: Where) -> str:
    """quantization.method[0].awq"""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in where).lstrip(".") or "the recipe"


def _written(loc: Sequence[str | int], data: Any, missing: bool) -> Where:
    """The part of pydantic's location that stands in the file; it adds the branches of unions and the long form of a choice."""
    where: list[str | int] = []
    for index, key in enumerate(loc):
        if (isinstance(data, Mapping) and key in data) or (isinstance(data, list) and key in range(len(data))):
            data = data[key]  # type: ignore[index]
        elif missing and index == len(loc) - 1:
            return (*where, key)
        elif not (missing and data == key):  # `format: awq` stands for {awq: {}}: a knob that awq lacks is below it
            break
        where.append(key)
    return tuple(where)


def _complaint(where: Where, branches: list[ErrorDetails], model: type[BaseModel], document: Document) -> Complaint:
    details = branches[0]
    kind, value = details["type"], details["input"]
    place = str(document.origin(where) or "recipe")
    name, key = dotted(where), where[-1] if where else "recipe"
    field = _field_at(model, where)
    if kind == "missing":
        about = f"; {field.description}" if field is not None and field.description else ""
        return Complaint(place, f"{name} is missing", f"add `{key}:` ({_expected(field, branches)}{about})", missing=where)
    if kind == "extra_forbidden":
        return _unknown(place, where, str(details["loc"][-1]), model)
    owner = _model_at(model, where)
    if kind == "value_error" and owner is not None and issubclass(owner, Choice):
        known = ", ".join(owner.model_fields)
        return Complaint(place, f"{name} {_message(details)}", f"write one of {known}: `{key}: NAME`, or `{key}: {{NAME: {{...}}}}`")
    if kind in ("value_error", "assertion_error"):
        return Complaint(place, f"{name}: {_message(details)}", f"correct {key}")
    if kind == "too_short":
        least, there = details["ctx"]["min_length"], details["ctx"]["actual_length"]
        return Complaint(place, f"{name} {f'has {there} of at least {least}' if there else 'is empty'}", f"write at least {least} of them")
    expected = _expected(field, branches)
    fix = f"set {name} to {expected}"
    if all(branch["type"] == "string_type" for branch in branches) and isinstance(value, int | float):
        fix = f'put it in quotes: "{value}"'
    elif isinstance(value, str) and not isinstance(scalar(value), str):
        fix += ", without quotes"
    elif kind in ("tuple_type", "list_type") and isinstance(value, str | int | float):
        fix = f"write a list: {key}: [{value}]"
    return Complaint(place, f"{name} is {_shown(value)}, not {expected}", fix)


def _unknown(place: str, where: Where, key: str, model: type[BaseModel]) -> Complaint:
    """A key that the model has not, or a choice that the slot has not (in a list of choices it stands bare, with no key of its own)."""
    around = where[:-1] if where[-1:] == (key,) else where
    owner = _model_at(model, around)
    known = [field.alias or name for name, field in owner.model_fields.items()] if owner is not None else []
    known += [] if around else COMPOSING
    near = closest(key, known)
    if owner is not None and issubclass(owner, Choice):
        what = f"{dotted(around)}: {key} is no choice"
        return Complaint(place, what, f"did you mean {near}?" if near else f"choices: {', '.join(known) or 'none'}")
    fix = f"remove it; {dotted(around)} knows {', '.join(known) or 'no keys'}"
    return Complaint(place, f"{dotted((*around, key))} is an unknown key", f"did you mean {near}?" if near else fix)


def _message(details: ErrorDetails) -> str:
    return str(details.get("ctx", {}).get("error", details["msg"]))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"a mapping ({', '.join(map(str, value)) or 'empty'})"[:SHOWN]
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = "empty (null)" if value is None else repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


# What a field takes


def _expected(field: FieldInfo | None, branches: list[ErrorDetails]) -> str:
    """In words what belongs there: from the field's type or, inside lists and other places without a field, from the broken rules."""
    if field is not None:
        return _words(field.annotation, field.metadata)
    return " or ".join(dict.fromkeys(_rule(details) for details in branches))


def _words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], [*metadata, *arguments[1:]])
    if origin in (Union, types.UnionType):
        return " or ".join(_words(branch, metadata) for branch in arguments if branch is not type(None))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if issubclass(annotation, Choice):
            return f"one of {', '.join(annotation.model_fields)}"
        fields = annotation.model_fields
        return f"a mapping with {', '.join([name for name in fields if fields[name].is_required()] or fields) or 'no keys'}"
    if arguments and origin in (tuple, list):
        return "a list"
    if origin is Mapping:
        return "a mapping"
    if arguments:
        return _or([str(value) for value in arguments])
    if annotation is bool:
        return "true or false"
    return {int: "a whole number", float: "a number", str: "text"}.get(annotation, "a value") + _range(metadata)


def _range(metadata: Sequence[Any]) -> str:
    """` from 1 to 9`, ` above 0 and below 1`: the bounds among a field's annotations."""
    flat: list[Any] = []
    for item in metadata:
        flat += [*item.metadata] if isinstance(item, FieldInfo) else [item]
    low = [f"from {item.ge:,}" for item in flat if isinstance(item, bound.Ge)] + [
        f"above {item.gt:,}" for item in flat if isinstance(item, bound.Gt)
    ]
    high = [f"to {item.le:,}" for item in flat if isinstance(item, bound.Le)] + [
        f"below {item.lt:,}" for item in flat if isinstance(item, bound.Lt)
    ]
    if low and high:
        return (
            f" {low[0]} {high[0]}"
            if high[0].startswith("to") and low[0].startswith("from")
            else f" {low[0]} and {high[0].replace('to ', 'up to ')}"
        )
    return f" {(low + [item.replace('to ', 'up to ') for item in high])[0]}" if low or high else ""


def _rule(details: ErrorDetails) -> str:
    context = details.get("ctx", {})
    named = {
        "literal_error": lambda: str(context["expected"]).replace("'", ""),
        "greater_than": lambda: f"a number above {context['gt']}",
        "greater_than_equal": lambda: f"a number from {context['ge']}",
        "less_than": lambda: f"a number below {context['lt']}",
        "less_than_equal": lambda: f"a number up to {context['le']}",
        "too_short": lambda: f"a list of at least {context['min_length']}",
    }
    words = {"string": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "tuple": "a list", "list": "a list"}
    if details["type"] in named:
        return named[details["type"]]()
    return words.get(details["type"].split("_")[0], "a mapping of keys" if "model" in details["type"] else details["msg"].lower())


def _or(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else "".join(words)


def _field_at(model: type[BaseModel], where: Where) -> FieldInfo | None:
    owner = _model_at(model, where[:-1]) if where else None
    if owner is None:
        return None
    return next((field for name, field in owner.model_fields.items() if (field.alias or name) == where[-1]), None)


def _model_at(model: type[BaseModel], where: Where) -> type[BaseModel] | None:
    """The model that describes the mapping at `where`; items of a list, or of a mapping from any key, are what its field takes."""
    found: type[BaseModel] | None = model
    any_key = False
    for key in where:
        if found is None or isinstance(key, int):
            continue
        if any_key:
            any_key = False
            continue
        field = next((field for name, field in found.model_fields.items() if (field.alias or name) == key), None)
        found = _inner(field.annotation) if field is not None else None
        any_key = field is not None and get_origin(field.annotation) is Mapping
    return None if any_key else found


def _inner(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for argument in get_args(annotation) if (model := _inner(argument)) is not None), None)
