"""What a lock file looks like: sorted YAML in which variants write only what is other than in the recipe that they vary.

The inverse of every function stands next to it. YAML is read as recipes are (document.py); a seal over the body tells a file that was
edited, or merged from two branches, from one that buildsys wrote.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from buildsys import document
from buildsys.document import Document, scalar
from buildsys.errors import BuildError
from buildsys.locktext import Texts

FORMAT = 1
"""Bumped when an older buildsys could not read, or would misread, what is written now."""

WHOLE = ("asked", "source", "model", "calibration", "text", "artifact", "on", "size_bytes", "measurements")
"""What a variant writes whole or not at all; of anything else each entry by itself."""

FLOW_WIDTH = 104
MAX_BYTES, MAX_NODES = 64 << 20, 1_000_000
_PLAIN = re.compile(r"[\x20-\x7e]*")


TAG = "tag:yaml.org,2002:"


class _Flow(dict[str, Any]):
    """A mapping that is written in one line."""


class _FlowList(list[Any]):
    """A list that is written in one line."""


class _Dumper(yaml.CSafeDumper):
    """Writes scalars as document.py reads them: what is plain there is plain here. Never writes an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is not yaml.ScalarNode:
            return f"{TAG}{'map' if kind is yaml.MappingNode else 'seq'}"
        if not implicit[0]:
            return f"{TAG}str"
        names = {type(None): "null", bool: "bool", int: "int", float: "float"}
        return f"{TAG}{names.get(type(scalar(value)), 'str')}"


def _text(dumper: yaml.CSafeDumper, value: str) -> yaml.Node:
    plain = scalar(value) == value and value != "<<" and _PLAIN.fullmatch(value) is not None
    return dumper.represent_scalar(f"{TAG}str", value, None if plain else '"')


def _float(dumper: yaml.CSafeDumper, value: float) -> yaml.Node:
    """The shortest decimal that reads as the same number."""
    named = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}
    return dumper.represent_scalar(f"{TAG}float", named.get(repr(value), repr(value)))


_Dumper.add_representer(str, _text)
_Dumper.add_representer(float, _float)
_Dumper.add_representer(_Flow, lambda dumper, value: dumper.represent_mapping(f"{TAG}map", value, flow_style=True))
_Dumper.add_representer(_FlowList, lambda dumper, value: dumper.represent_sequence(f"{TAG}seq", value, flow_style=True))


def dumped(value: Mapping[str, Any]) -> str:
    """`value` as YAML in its own order; what is short stands in one line."""
    plain = {key: _flowing(inner) for key, inner in value.items()}
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, width=1 << 30, default_flow_style=False)


def _flowing(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        items = [_flowing(item) for item in value]
        return _FlowList(items) if _one_line(items) else items
    if not isinstance(value, Mapping):
        return value
    made = {key: _flowing(inner) for key, inner in value.items()}
    # A file's digest and size are one thing; digests of many things are a table.
    digests = sum(isinstance(inner, str) and len(inner) == 64 for inner in made.values())
    return _Flow(made) if _one_line(made.values()) and (not digests or (digests == 1 and len(made) > 1)) else made


def _one_line(values: Collection[Any]) -> bool:
    """Whether people would write a mapping or a list of these in one line."""
    flat = all(not isinstance(one, (dict, list)) or isinstance(one, (_Flow, _FlowList)) for one in values)
    return flat and len(str(list(values))) <= FLOW_WIDTH


# Variants: each as what differs from the first


def base_of(stem: str, names: Mapping[str, Any]) -> str:
    """The recipe that the others are written against: the one without a variant's name, where it is locked."""
    return stem if stem in names else min(names)


def less(base: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """What `whole` has that `base` has not, entry by entry; None: `base` has it, and `whole` has not."""
    found: dict[str, Any] = {}
    for key in (*whole, *(key for key in base if key not in whole)):
        if key not in whole:
            found[key] = None
        elif key not in base or base[key] is None or key in WHOLE or not isinstance(whole[key], Mapping):
            if key not in base or base[key] != whole[key]:
                found[key] = whole[key]
        elif base[key] != whole[key]:
            found[key] = _entries(base[key], whole[key]) if key != "built" else less(base[key], whole[key])
    return found


def _entries(base: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    names = sorted({*base, *whole})
    return {name: whole.get(name) for name in names if base.get(name) != whole.get(name)}


def more(base: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `less`: `base` with what a variant writes laid over it."""
    found = dict(base)
    for key, value in written.items():
        if value is None:
            found.pop(key, None)
        elif key in WHOLE or not isinstance(value, Mapping) or not isinstance(base.get(key), Mapping):
            found[key] = value
        elif key == "built":
            found[key] = more(base[key], value)
        else:
            found[key] = {name: one for name, one in {**base[key], **value}.items() if one is not None}
    return found


# Files


def sealed(heading: str, head: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """A lock's text. `head` is what can be asked of it without reading the rest."""
    rest = dumped(head) + "\n" + dumped(body)
    return f"# {heading}\nlock: {FORMAT}\nseal: {hashlib.sha256(rest.encode()).hexdigest()}\n{rest}"


_SEALED = re.compile(r"(?:#[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\n)*lock: ([0-9]{1,9})\nseal: ([0-9a-f]{64})\n")


def intact(text: str) -> int | None:
    """Where the sealed part begins, if all of it is as buildsys wrote it in this format."""
    found = _SEALED.match(text)
    if found is None or int(found[1]) != FORMAT or hashlib.sha256(text[found.end() :].encode()).hexdigest() != found[2]:
        return None
    return found.end()


def quick(path: Path, texts: Texts) -> Mapping[str, Any] | None:
    """The file as plain data, without its lines, where it is as buildsys wrote it; None: `raw` reads it, or says what is wrong with it."""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
    start = intact(text)
    said = texts.read(text[start:]) if start is not None else None
    return {"lock": FORMAT, "seal": "", **said} if said is not None and not {"lock", "seal"} & said.keys() else None


def raw(path: Path, where: str, again: str) -> Document:
    """The file as plain data with its lines; `again` is the command that writes it anew, which mends whatever is wrong with it."""
    try:
        found = document.read(path, where, "lock", MAX_BYTES, MAX_NODES)
    except BuildError as error:
        raise BuildError(error.where, error.what, again) from None
    said = found.data.get("lock")
    line = str(found.origin(("lock",)))
    if type(said) is not int or said < 1:
        raise BuildError(line, f"is no lock: `lock:` says {said!r}, not a format's number", again)
    if said > FORMAT:
        raise BuildError(line, f"has format {said}; this buildsys reads up to {FORMAT}", "use the buildsys that wrote it, or a later one")
    return found


def check_seal(path: Path, found: Document, again: str) -> None:
    """Refuses what is well formed, and not what buildsys wrote."""
    text = path.read_bytes().decode("utf-8-sig")
    if intact(text) is None:
        what = "was changed after it was written (its seal does not fit): by hand, or by merging two branches"
        raise BuildError(str(found.origin(("seal",))), what, again)
