"""A YAML file as plain data with the line of every value.

Scalars as in YAML 1.2's core schema (yaml.org/spec/1.2.2, section 10.3.2), which editors use too; the parser is libyaml, the walk ours.
What YAML can do and a recipe never needs is refused aloud: tags, merge keys, keys that are no text, duplicate keys, alias bombs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml._yaml import CParser
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from buildsys.errors import BuildError

Where = tuple[str | int, ...]
"""Keys and list indices from the top of a document down to a value: ("quantization", "method", 0)."""

MAX_BYTES = 1 << 20
MAX_NODES = 10_000  # keys and values after aliases are expanded
MAX_DEPTH = 32  # the C composer recurses: without a limit, 100,000 brackets end the process


class Origin(NamedTuple):
    """The place that wrote a value; `file` is relative to the workspace, with forward slashes."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Document:
    """Plain data (None: "remove what is inherited here") and who wrote it, by path from the top."""

    data: Mapping[str, Any]
    origins: Mapping[Where, Origin] = field(default_factory=dict)
    removed: frozenset[Where] = frozenset()  # the Nones that did take an inherited value away

    def origin(self, where: Where) -> Origin | None:
        """Who wrote the value at `where`, or the nearest value around it that somebody wrote."""
        for end in range(len(where), -1, -1):
            if (found := self.origins.get(where[:end])) is not None:
                return found
        return None

    def below(self, where: Where) -> Document:
        """The mapping at `where` as a document of its own."""
        data: Any = self.data
        for key in where:
            data = data[key]
        origins = {path[len(where) :]: origin for path, origin in self.origins.items() if path[: len(where)] == where}
        return Document(data, origins)

    def without(self, *keys: str) -> Document:
        """This document less some of its top keys; their origins stay, so that errors about them can be placed."""
        return replace(self, data={key: value for key, value in self.data.items() if key not in keys})


class _Parser(CParser):
    """libyaml's parser. Instead of a tag, a node gets the way it was written; any other tag is one that the author wrote."""

    depth = 0

    def descend_resolver(self, parent: yaml.Node | None, index: Any) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH + 1:
            raise ComposerError(None, None, f"more than {MAX_DEPTH} levels of nesting", parent.start_mark if parent else None)

    def ascend_resolver(self) -> None:
        self.depth -= 1

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if value is None:
            return "collection"
        return "plain" if implicit[0] else "quoted"


_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
_NUMBER = re.compile(rf"(?P<int>[-+]?[0-9]{{1,18}})|(?P<oct>0o[0-7]{{1,18}})|(?P<hex>0x[0-9a-fA-F]{{1,15}})|{_FLOAT}")
_DIGITS = re.compile(r"[-+]?[0-9]+")
_NAMED = {"null": None, "true": True, "false": False, ".nan": float("nan"), ".inf": float("inf"), "-.inf": -float("inf")}
_WORDS = {"": None, "~": None} | {form: value for word, value in _NAMED.items() for form in (word, word.capitalize(), word.upper())}
_WORDS |= {".NaN": _NAMED[".nan"], ".Inf": _NAMED[".inf"], "-.Inf": _NAMED["-.inf"]}


def scalar(text: str) -> Any:
    """What a plain (unquoted) scalar means. Whole numbers beyond 18 digits stay text: they are commits, not counts."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in "+-.0123456789" or (match := _NUMBER.fullmatch(text)) is None:
        return text
    if match.lastgroup == "int":
        return int(text)
    if match.lastgroup == "oct":
        return int(text[2:], 8)
    if match.lastgroup == "hex":
        return int(text[2:], 16)
    return text if _DIGITS.fullmatch(text) else float(text)


class _Walk:
    """Turns one file's nodes into data, once, and notes the line of each key and list item."""

    def __init__(self, file: str, noun: str = "recipe", most: int = MAX_NODES) -> None:
        self.file, self.noun, self.most = file, noun, most
        self.nodes = 0
        self.origins: dict[Where, Origin] = {}

    def value(self, node: yaml.Node, where: Where) -> Any:
        self.nodes += 1
        if self.nodes > self.most or len(where) > MAX_DEPTH:
            limit = f"{self.most:,} values" if self.nodes > self.most else f"{MAX_DEPTH} levels of nesting"
            what = f"holds more than {limit} once its aliases are expanded"
            raise self.refusal(node, what, "write the values out without aliases (*name)")
        tag = node.tag
        if tag == "plain":
            return scalar(node.value)
        if tag == "quoted":
            return node.value
        if tag != "collection":
            raise self.refusal(node, f"has the tag {_tag(tag)}; a {self.noun} is plain data", "remove the tag, or put the value in quotes")
        if isinstance(node, yaml.SequenceNode):
            return [self.item(child, (*where, index)) for index, child in enumerate(node.value)]
        return self.mapping(node, where)

    def item(self, node: yaml.Node, where: Where) -> Any:
        self.origins[where] = Origin(self.file, node.start_mark.line + 1)
        return self.value(node, where)

    def mapping(self, node: yaml.Node, where: Where) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.key(key_node)
            at = (*where, key)
            line = key_node.start_mark.line + 1
            if key in found:
                first = self.origins[at].line
                what = f"{key} is written twice, in lines {first} and {line}" if first != line else f"{key} is written twice in one line"
                raise self.refusal(key_node, what, "keep one of them")
            self.origins[at] = Origin(self.file, line)
            found[key] = self.value(value_node, at)
        return found

    def key(self, node: yaml.Node) -> str:
        key = scalar(node.value) if node.tag == "plain" and isinstance(node.value, str) else node.value
        if not isinstance(key, str) or node.tag not in ("plain", "quoted"):
            if isinstance(node.value, str):
                raise self.refusal(node, f"the key {node.value} is not text", f'put it in quotes: "{node.value}":')
            raise self.refusal(node, "a list or a mapping stands where a key belongs", "write a key of plain text")
        if key == "<<" and node.tag == "plain":
            raise self.refusal(node, "merge keys (<<) are not read", "use `extends:` for another file's values, or write the keys out")
        return key

    def refusal(self, node: yaml.Node, what: str, fix: str) -> BuildError:
        return BuildError(f"{self.file}:{node.start_mark.line + 1}", what, fix)


def read(path: Path, name: str, noun: str = "recipe", max_bytes: int = MAX_BYTES, max_nodes: int = MAX_NODES) -> Document:
    """One file, nothing merged yet. `name` is what errors and origins call it, `noun` what kind of file it is."""
    text = _text(path, name, noun, max_bytes)
    parser = _Parser(text)
    try:
        node = parser.get_single_node()
    except ReaderError as error:
        line = text.count("\n", 0, error.position if isinstance(error.position, int) else 0) + 1
        what = f"has the control character {_shown_character(error)}"
        raise BuildError(f"{name}:{line}", what, "delete it, or write it as \\x.. in double quotes") from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, name, text) from None
    finally:
        parser.dispose()
    if not isinstance(node, yaml.MappingNode):
        held = "nothing" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "one value"
        raise BuildError(f"{name}:1", f"holds {held}; a {noun} is a mapping of keys", "write `schema: 1` and the other keys, one a line")
    walk = _Walk(name, noun, max_nodes)
    data = walk.value(node, ())
    walk.origins[()] = Origin(name, 1)
    return Document(data, walk.origins)


def _text(path: Path, name: str, noun: str, max_bytes: int) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BuildError(name, f"cannot be read: {error.strerror}", "check that it is a file that you may read") from None
    if len(raw) > max_bytes:
        what = f"holds {len(raw):,} bytes, more than the {max_bytes:,} that a {noun} may"
        raise BuildError(name, what, f"move data out of the {noun} into files of their own")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BuildError(f"{name}:{line}", f"is not UTF-8: byte 0x{raw[error.start]:02x}", "save the file as UTF-8") from None


def _syntax_error(error: yaml.MarkedYAMLError, name: str, text: str) -> BuildError:
    """A parser's complaint in a recipe author's words."""
    problem = error.problem or "cannot be read"
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark is not None else 1
    lines = text.splitlines()
    written = lines[line - 1] if 0 < line <= len(lines) else ""
    if "\t" in written[: len(written) - len(written.lstrip())] or "tab" in problem or "'\\t'" in problem:
        return BuildError(f"{name}:{line}", "is indented with a tab, which YAML does not allow", "indent with spaces")
    if "another document" in problem:
        return BuildError(f"{name}:{line}", "starts a second document (---)", "keep one recipe a file; name variants under `matrix:`")
    if "undefined alias" in problem:
        fix = "quote the value if it starts with *, or define the anchor"
        return BuildError(f"{name}:{line}", "uses an alias (*name) that no anchor (&name) defines", fix)
    if "levels of nesting" in problem:
        return BuildError(f"{name}:{line}", f"holds {problem}", "flatten it; no recipe key lies deeper")
    begun = f" ({error.context}, begun in line {error.context_mark.line + 1})" if error.context and error.context_mark is not None else ""
    return BuildError(f"{name}:{line}", f"is not YAML: {problem}{begun}", "check quotes, brackets, colons and indentation around this line")


def _shown_character(error: ReaderError) -> str:
    return f"#x{error.character:04x}" if isinstance(error.character, int) else repr(error.character)


def _tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!", 1)
