"""Files over files: the laws of merging, who wrote what is left, and `extends`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildsys.document import Document, Origin, Where
from buildsys.errors import BuildError
from buildsys.overlay import Reader, is_inside, lexical, merge, settle

KEYS = st.sampled_from(["a", "b", "c"])
LEAVES = st.none() | st.integers(0, 3) | st.lists(st.integers(0, 3), max_size=2)
TREES = st.dictionaries(KEYS, st.recursive(LEAVES, lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=8), max_size=3)


def document(data: dict[str, Any], file: str) -> Document:
    """As if read: each value written in `file`."""

    def origins(value: Any, where: Where) -> dict[Where, Origin]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        found = {where: Origin(file, len(where))}
        for key, inner in items:
            found |= origins(inner, (*where, key))
        return found

    return Document(data, origins(data, ()))


def patched(target: Any, patch: Any) -> Any:
    """The algorithm of RFC 7396, section 2, word for word: the oracle."""
    if not isinstance(patch, dict):
        return patch
    target = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        else:
            target[name] = patched(target.get(name), value)
    return target


@given(TREES, TREES)
def test_merging_then_settling_is_rfc_7396(base: dict[str, Any], over: dict[str, Any]) -> None:
    merged, _ = settle(merge(document(base, "base"), document(over, "over")))
    assert merged == patched(patched({}, base), over)


@given(TREES)
def test_an_empty_file_changes_nothing_from_either_side(tree: dict[str, Any]) -> None:
    whole = document(tree, "one")
    assert merge(whole, Document({})).data == tree == merge(Document({}), whole).data
    assert merge(whole, Document({})).origins == whole.origins


@given(TREES)
def test_merging_a_file_over_itself_changes_nothing(tree: dict[str, Any]) -> None:
    assert merge(document(tree, "one"), document(tree, "one")).data == tree


@given(TREES, TREES)
def test_later_wins_and_says_so(base: dict[str, Any], over: dict[str, Any]) -> None:
    merged = merge(document(base, "base"), document(over, "over"))

    def look(value: Any, where: Where) -> None:
        written_last: Any = over
        for key in where:
            written_last = written_last.get(key, ...) if isinstance(written_last, dict) else ...
        origin = merged.origins[where]
        assert origin.file == ("over" if written_last is not ... else "base")
        for key, inner in value.items() if isinstance(value, dict) else ():
            look(inner, (*where, key))

    look(merged.data, ())


@given(TREES, TREES)
def test_no_origin_outlives_its_value(base: dict[str, Any], over: dict[str, Any]) -> None:
    merged = merge(document(base, "base"), document(over, "over"))
    for where in merged.origins:
        value: Any = merged.data
        for key in where:
            value = value[key]  # raises if nothing is there


CHOICE = frozenset({("format",)})


@pytest.mark.parametrize(
    ("base", "over", "result"),
    [
        ({"awq": {"x": 1}}, {"awq": {"y": 2}}, {"awq": {"x": 1, "y": 2}}),  # the same choice: merged
        ({"awq": {"x": 1}}, {"gptq": {"y": 2}}, {"gptq": {"y": 2}}),  # another one: replaced, knobs included
        ({"awq": {"x": 1}}, "awq", {"awq": {"x": 1}}),
        ("awq", {"awq": {"x": 1}}, {"awq": {"x": 1}}),
        ("awq", "gptq", {"gptq": {}}),
        ({"awq": {"x": 1}}, {"awq": None}, {"awq": {"x": 1}}),  # `awq:` says the choice again, and removes nothing
        ({"awq": {"x": 1, "y": 1}}, {"awq": {"x": None}}, {"awq": {"y": 1}}),
    ],
)
def test_a_choice_is_replaced_by_another_and_merged_with_itself(base: Any, over: Any, result: Any) -> None:
    merged = merge(document({"format": base}, "base"), document({"format": over}, "over"), CHOICE)
    assert settle(merged, CHOICE) == ({"format": result}, [])


def test_origins_of_a_replaced_choice_are_gone() -> None:
    merged = merge(document({"format": {"awq": {"x": 1}}}, "base"), document({"format": {"gptq": {}}}, "over"), CHOICE)
    assert ("format", "awq", "x") not in merged.origins
    assert merged.origin(("format", "gptq", "x")) == Origin("over", 2)


def test_null_removes_and_idle_nulls_are_told() -> None:
    merged = merge(document({"a": 1, "b": {"c": 2}}, "base"), document({"a": None, "b": {"c": None, "d": None}}, "over"))
    assert settle(merged) == ({"b": {}}, [("b", "d")])


# extends


def workspace(tmp_path: Path, files: dict[str, str]) -> Reader:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Reader(tmp_path, CHOICE)


def refused(reader: Reader, name: str) -> BuildError:
    with pytest.raises(BuildError) as caught:
        reader.compose(reader.root / name)
    return caught.value


def test_extends_one_file_or_several_the_later_over_the_earlier(tmp_path: Path) -> None:
    reader = workspace(
        tmp_path,
        {
            "a.yaml": "x: 1\ny: 1\nz: {k: 1}\n",
            "b.yaml": "y: 2\nz: {l: 2}\n",
            "c.yaml": "extends: [a.yaml, b.yaml]\nz: {k: 3}\nmatrix: {v: {}}\n",
            "d.yaml": "extends: c.yaml\n",
        },
    )
    for name in ("c.yaml", "d.yaml"):
        found = reader.compose(tmp_path / name)
        assert found.data == {"x": 1, "y": 2, "z": {"k": 3, "l": 2}}
        assert [str(found.origin(where)) for where in (("x",), ("y",), ("z", "k"), ("z", "l"))] == [
            "a.yaml:1",
            "b.yaml:1",
            "c.yaml:2",
            "b.yaml:2",
        ]


def test_a_cycle_is_refused_with_the_whole_chain(tmp_path: Path) -> None:
    reader = workspace(
        tmp_path, {"a.yaml": "extends: b.yaml\n", "b.yaml": "x: 1\nextends: [sub/c.yaml]\n", "sub/c.yaml": "extends: ../b.yaml\n"}
    )
    error = refused(reader, "a.yaml")
    assert error.where == "sub/c.yaml:1"
    assert error.what == "extends forms a cycle: b.yaml -> sub/c.yaml -> b.yaml"


def test_a_file_that_extends_itself(tmp_path: Path) -> None:
    assert "a.yaml -> a.yaml" in refused(workspace(tmp_path, {"a.yaml": "extends: a.yaml\n"}), "a.yaml").what


@pytest.mark.parametrize("target", ["../outside.yaml", "/etc/passwd", "sub/../../outside.yaml"])
def test_extends_stays_in_the_workspace(tmp_path: Path, target: str) -> None:
    (tmp_path / "outside.yaml").write_text("x: 1\n")
    reader = workspace(tmp_path / "ws", {"a.yaml": f"\nextends: {target}\n"})
    error = refused(reader, "a.yaml")
    assert error.where == "a.yaml:2" and "inside the workspace" in error.what


def test_extends_of_a_missing_file_names_a_close_one(tmp_path: Path) -> None:
    reader = workspace(tmp_path, {"bases/w4a16.yaml": "x: 1\n", "r/a.yaml": "extends: ../bases/w4a61.yaml\n"})
    error = refused(reader, "r/a.yaml")
    assert "no file bases/w4a61.yaml" in error.what and error.fix == "did you mean ../bases/w4a16.yaml?"


@pytest.mark.parametrize("value", ["4", "{a: b}", "[1]", "", "['']"])
def test_extends_takes_paths_only(tmp_path: Path, value: str) -> None:
    assert "not a path" in refused(workspace(tmp_path, {"a.yaml": f"extends: {value}\n"}), "a.yaml").what


def test_a_long_chain_is_refused_and_ends_no_process(tmp_path: Path) -> None:
    reader = workspace(tmp_path, {f"f{n}.yaml": f"extends: f{n + 1}.yaml\n" for n in range(500)} | {"f500.yaml": "x: 1\n"})
    assert "in a row" in refused(reader, "f0.yaml").what


def test_paths_are_judged_by_spelling(tmp_path: Path) -> None:
    assert lexical("../x/./y", Path("/a/b")) == Path("/a/x/y")
    assert is_inside(Path("/a/b"), Path("/a")) and is_inside(Path("/a"), Path("/a")) and is_inside(Path("/a"), Path("/"))
    assert not is_inside(Path("/ab"), Path("/a"))
