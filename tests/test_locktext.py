"""The quick reader of locks against the one of YAML: what it reads is the same, and of what that one refuses it says nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from test_locked import LOCKS

from buildsys import document, lockfile
from buildsys.errors import BuildError
from buildsys.locked import Lock
from buildsys.lockfile import MAX_BYTES, MAX_NODES
from buildsys.locktext import Texts

DEMO = Path(__file__).resolve().parents[1] / "recipes" / "demo" / "demo.lock"
SIGNS = (
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    ":",
    ": ",
    "- ",
    "#",
    " #",
    '"',
    "'",
    "{",
    "}",
    "[",
    "]",
    ", ",
    "? ",
    "~",
    "*a",
    "&a ",
    "!",
    "|",
    "\t",
    "0x1f",
)
PARTS = (
    "null",
    "a: 1\n",
    "    a: b\n",
    "      - x\n",
    "    - x\n",
    "- - x\n",
    "...\n",
    "---\n",
    "é",
    "\\n",
    "{a: {b: [c]}}",
    '{"a": b}',
    "[a: b]",
)
EDITS = some.sampled_from((*SIGNS, *PARTS))


def slow(text: str, folder: Path) -> Any:
    """What document.py reads; None: it refuses."""
    path = folder / "x.lock"
    path.write_bytes(text.encode())
    try:
        return document.read(path, "x.lock", "lock", MAX_BYTES, MAX_NODES).data
    except BuildError:
        return None


def agree(text: str, folder: Path, texts: Texts) -> bool:
    """Whether the quick reader read it. It reads what the other reads, types and order included."""
    found = texts.read(text)
    assert found is None or repr(found) == repr(slow(text, folder)), text
    return found is not None


def body(text: str) -> str:
    start = lockfile.intact(text)
    assert start is not None
    return text[start:]


@given(locks=some.lists(LOCKS, max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_it_reads_what_yaml_reads(locks: list[Lock], tmp_path_factory: pytest.TempPathFactory) -> None:
    texts = Texts()
    for lock in locks:
        agree(body(lock.text()), tmp_path_factory.getbasetemp(), texts)


@given(data=some.data())
@settings(max_examples=400, deadline=None)
def test_it_reads_no_more_than_yaml_reads(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    lines = body(DEMO.read_text()).splitlines(keepends=True)
    first = data.draw(some.integers(0, len(lines) - 8))
    text = "".join(lines[first : first + data.draw(some.integers(1, 30))])
    for _ in range(data.draw(some.integers(1, 4))):
        at = data.draw(some.integers(0, len(text)))
        text = text[:at] + data.draw(EDITS) + text[at + data.draw(some.integers(0, 6)) :]
    texts = Texts()
    agree(text, tmp_path_factory.getbasetemp(), texts)
    agree(text, tmp_path_factory.getbasetemp(), texts)  # now with all of its parts known


SHAPES = (
    "a: 1\nb:\n  c: {d: [1, x], e: {}}\n  f: []\n",
    "a:\n- x\n- {k: 1.5, l: null}\nb:\n  c:\n    d:\n    - k: v\n      l:\n      - -1\n      - m: 1e-06\n    e: .inf\n",
    '"1": "x: y"\na:\n  "": ""\n  b: {"1": "2, 3", c: [{d: "e"}, [true]]}\n',
    "a: Intel(R) Xeon(R) Processor @ 2.00GHz\nb: it's <s>\nc: 0x1f\n",
)


@pytest.mark.parametrize("text", SHAPES)
def test_shapes_that_locks_have_are_read(text: str, tmp_path: Path) -> None:
    assert agree(text, tmp_path, Texts())


ODD = (
    *("", "\n", "a\n", "a:\n", "a:\nb: 1\n", "a: 1\na: 2\n", "a: {b: 1, b: 2}\n", "a: {b: [x], b: 2}\n", "  a: 1\n", "a: 1\n   b: 2\n"),
    *("a:\n    b: 1\n", "a:\n  b: 1\n c: 2\n", "a: b: c\n", "a: b\n  c\n", "a: {b}\n", "a: [b: c]\n", "a: [b,c]\n", "a: {b: 1,}\n"),
    *("a: *b\n", "a: &b c\n", "a: !x c\n", "a: |\n  x\n", "a: 'x'\n", 'a: "\\x41"\n', "a: b # c\n", "# a\na: 1\n", "1: a\n", "null: a\n"),
    *("<<: {a: 1}\n", "a: 1\r\n", "a:\t1\n", "---\na: 1\n", "a: 1\n...\n", "- a\n", "a:\n- - x\n", "a: é\n", "? a\n: b\n", "{a: 1}\n"),
    *(
        "a: - b\n",
        "a: [\n",
        "a: ]\n",
        "a: {b: [}]\n",
        "x:\n  a: 1\n  a: 2\n",
        "a: 1\nx:\n  b: 1\na: 2\n",
        "a: 1\n  b:\n",
        f"{'k' * 101}: 1\n",
    ),
    "".join(f"{'  ' * level}a:\n" for level in range(14)) + f"{'  ' * 14}b: 1\n",
    f"a: {'[' * 7}x{']' * 7}\n",
    "k:\n" + "".join(f"{'  ' * level}- k:\n" for level in range(600)) + f"{'  ' * 600}- x\n",
    *("a: {<<: {b: c}}\n", "a: [{<<: [x]}]\n", 'a: {<<: "q"}\n'),
)


@pytest.mark.parametrize("text", ODD)
def test_of_anything_else_it_says_nothing(text: str) -> None:
    assert Texts().read(text) is None


def test_the_demo_is_read_quickly_and_no_text_without_its_seal(tmp_path: Path) -> None:
    path = tmp_path / "demo.lock"
    path.write_bytes(DEMO.read_bytes())
    found = lockfile.quick(path, Texts())
    assert found is not None and found.keys() == lockfile.raw(path, "demo.lock", "").data.keys()
    for old, new in (
        ("bits: 4", "bits: 3"),
        ("lock: 1", "lock: 2"),
        ("lock: 1", "lock: \u0661"),
        ("# ", "# \x01"),
        ("seal: ", "seal: 0"),
        ("recipe: demo", "recipe: demo "),
    ):
        path.write_text(DEMO.read_text().replace(old, new, 1))
        assert lockfile.quick(path, Texts()) is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    steps:\n", "    stpes: {}\n    steps:\n", "stpes: extra inputs"),
        ("bytes: 722", "bytes: many", "source.sizes"),
        ("recipe: demo\n", "recipe: other\n", "is the lock of 'other'"),
        ("  demo:\n    source:", "  other:\n    source:", "no variant of demo"),
        ("recipe: demo\n", "recipe: demo\nmore: 1\n", "has the unknown key more"),
        ("recipe: demo\n", "lock: 1\nrecipe: demo\n", "lock is written twice"),
    ],
)
def test_a_seal_that_fits_makes_no_lock_of_what_is_none(old: str, new: str, said: str, tmp_path: Path) -> None:
    text = body(DEMO.read_text())
    assert old in text
    text = text.replace(old, new, 1)
    path = tmp_path / "demo.lock"
    path.write_text(f"lock: 1\nseal: {hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    with pytest.raises(BuildError, match=said) as caught:
        Lock.read(path, "demo.lock")
    assert caught.value.where.startswith("demo.lock:"), "with its line"
