"""Reads a lock's text as buildsys writes it, in an eighth of the time that YAML takes; of any other text it says nothing.

A part of YAML 1.2 (yaml.org/spec/1.2.2): blocks indented by two, one value a line, which is plain, quoted without escapes, or in brackets.
It reads what document.py reads of the same text (a property test holds it) less the lines, and leaves to that one all that is other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from buildsys.document import scalar

_FLOW_PLAIN = r"-?[A-Za-z0-9_./+(~<=](?:[A-Za-z0-9_./*+@()<>=~%$^ -]*[A-Za-z0-9_./*+@()<>=~%$^-])?"
_PLAIN = r"-?[A-Za-z0-9_./+(~<=](?:[A-Za-z0-9_./*+@()<>=~%$^,;!?&|' -]*[A-Za-z0-9_./*+@()<>=~%$^,;!?&|'-])?"
_QUOTED = r'"[ !#-\[\]-~]*"'
_PLAIN_KEY = r"[A-Za-z0-9_](?:[A-Za-z0-9_./*+@() -]{0,98}[A-Za-z0-9_./*+@()-])?"
_KEY = rf'{_PLAIN_KEY}|"[ !#-\[\]-~]{{0,98}}"'
_VALUE = rf"{_PLAIN}|{_QUOTED}|\{{[ -~]*\}}|\[[ -~]*\]"
_LINE = re.compile(rf"^( *)(- )?(?:({_KEY}):(?: ({_VALUE}))?|({_VALUE}))$", re.MULTILINE)
_PART = re.compile(r'\n(?= {0,4}[A-Za-z0-9_"])')
_MAPPING = re.compile(rf"\{{{_PLAIN_KEY}: {_FLOW_PLAIN}(?:, {_PLAIN_KEY}: {_FLOW_PLAIN})*\}}")
_LIST = re.compile(rf"\[{_FLOW_PLAIN}(?:, {_FLOW_PLAIN})*\]")
_TOKEN = re.compile(rf"{_FLOW_PLAIN}|{_QUOTED}|[\[\]{{}}]|, |: ")
_LEVELS = {0: 0, 2: 1, 4: 2}  # by spaces
_SIGNS = ("{", "}", "[", "]", ", ", ": ")

MAX_INDENT, MAX_FLOW = 24, 5
"""Together less than document.py's levels of nesting, a mapping and a list for each two columns. What is deeper is left to that one."""
MAX_KEY = 100
MAX_CHARS = 1_000_000  # so no more values than lockfile.py reads

_Line: TypeAlias = tuple[str, str, str, str, str]
"""Spaces, "- " or nothing, a key as written or nothing, its value as written or nothing, or a value that has no key."""


class _Unlike(Exception):
    """The text is other than buildsys writes it."""


class Texts:
    """Reads the texts of many locks. Parts that several have alike (a model's shapes) are read once and shared, so nobody changes them."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, str, Any]] = {}
        self._flows: dict[str, Any] = {}

    def read(self, text: str) -> Mapping[str, Any] | None:
        """The plain data of a lock's text, or None, which says nothing about it."""
        if len(text) > MAX_CHARS:
            return None
        try:
            return self._read(text)
        except _Unlike:
            return None

    def _read(self, text: str) -> Mapping[str, Any]:
        """Parts are keys of the first three levels, each with all that lies deeper; `around` has the mappings that a part may stand in."""
        found: dict[str, Any] = {}
        around, opened = [found], True
        for part in _PART.split(text):
            known = self._known.get(part)
            if known is None:
                known = self._known[part] = _part(part, self._flows)
            level, key, value = known
            if (level != len(around) - 1 if opened else level >= len(around)) or key in around[level]:
                raise _Unlike
            del around[level + 1 :]
            opened = value is ...
            if opened:
                value = {}
                around.append(value)
            around[level][key] = value
        if opened:
            raise _Unlike
        return found


def _part(text: str, flows: dict[str, Any]) -> tuple[int, str, Any]:
    """Level, key and value of a part; the value is ... where it is in the parts that follow. `flows`: what was read in brackets so far."""
    text = text.rstrip("\n")
    lines: list[_Line] = _LINE.findall(text)
    if len(lines) != text.count("\n") + 1:
        raise _Unlike
    spaces, dash, written, value, _ = lines[0]
    if dash or len(spaces) not in _LEVELS:
        raise _Unlike
    if len(lines) == 1 and not value:
        return _LEVELS[len(spaces)], _key(written), ...
    blocks = _Blocks(lines, flows)
    found = blocks.mapping(spaces)
    if blocks.at != len(lines):
        raise _Unlike
    ((key, value),) = found.items()
    return _LEVELS[len(spaces)], key, value


class _Blocks:
    """Walks lines; what no block takes is left over at the end."""

    def __init__(self, lines: list[_Line], flows: dict[str, Any]) -> None:
        self.lines, self.at, self.flows = lines, 0, flows

    def below(self, indent: str) -> Any:
        """What lies below a key of this indent: a block one step in, or a list, whose dashes stand under the key."""
        if self.at < len(self.lines):
            spaces, dash, *_ = self.lines[self.at]
            if dash and spaces == indent and len(spaces) < MAX_INDENT:
                return self.sequence(indent)
            if not dash and spaces == indent + "  " and len(spaces) <= MAX_INDENT:
                return self.mapping(spaces)
        raise _Unlike

    def mapping(self, indent: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines, count = self.lines, len(self.lines)
        while self.at < count:
            spaces, dash, written, value, _ = lines[self.at]
            if spaces != indent or dash:
                break
            self.at += 1
            key = _key(written)
            if key in found:
                raise _Unlike
            found[key] = self.leaf(value) if value else self.below(indent)
        return found

    def sequence(self, indent: str) -> list[Any]:
        found: list[Any] = []
        while self.at < len(self.lines):
            spaces, dash, key, value, item = self.lines[self.at]
            if spaces != indent or not dash:
                break
            if key:
                self.lines[self.at] = (f"{indent}  ", "", key, value, "")
                found.append(self.mapping(f"{indent}  "))
            else:
                self.at += 1
                found.append(self.leaf(item))
        return found

    def leaf(self, written: str) -> Any:
        if written[0] not in "[{":
            return _leaf(written)
        if written not in self.flows:
            self.flows[written] = _flow(written)
        return self.flows[written]


def _key(written: str) -> str:
    if written[:1] == '"':
        return written[1:-1]
    if not written or written == "<<" or scalar(written) != written:  # YAML's merge key is not read
        raise _Unlike
    return written


def _leaf(written: str) -> Any:
    return written[1:-1] if written[0] == '"' else scalar(written)


def _flow(written: str) -> Any:
    """What is written in brackets; most of it holds no other brackets and nothing quoted."""
    if _MAPPING.fullmatch(written) is not None:
        pairs = [pair.split(": ") for pair in written[1:-1].split(", ")]
        found = {_key(key): scalar(value) for key, value in pairs}
        if len(found) != len(pairs):
            raise _Unlike
        return found
    if _LIST.fullmatch(written) is not None:
        return [scalar(item) for item in written[1:-1].split(", ")]
    tokens = _TOKEN.findall(written)
    if "".join(tokens) != written:
        raise _Unlike
    tokens.reverse()
    nested = _nested(tokens, MAX_FLOW)
    if tokens:
        raise _Unlike
    return nested


def _nested(tokens: list[str], levels: int) -> Any:
    """The value that the last of `tokens` begins; it takes what it reads from them."""
    first = _next(tokens)
    if first not in ("{", "["):
        if first in _SIGNS:
            raise _Unlike
        return _leaf(first)
    close = "}" if first == "{" else "]"
    named: dict[str, Any] = {}
    listed: list[Any] = []
    sign = ", " if levels else ""
    if tokens and tokens[-1] == close:
        sign = tokens.pop()
    while sign == ", ":
        if first == "[":
            listed.append(_nested(tokens, levels - 1))
        else:
            key = _next(tokens)
            if key in _SIGNS or len(key) > MAX_KEY or _key(key) in named or _next(tokens) != ": ":
                raise _Unlike
            named[_key(key)] = _nested(tokens, levels - 1)
        sign = _next(tokens)
    if sign != close:
        raise _Unlike
    return named if first == "{" else listed


def _next(tokens: list[str]) -> str:
    if not tokens:
        raise _Unlike
    return tokens.pop()
