"""One YAML file: what its scalars mean, where each value stands, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildsys import document
from buildsys.document import Document, Origin, read, scalar
from buildsys.errors import BuildError


def parsed(tmp_path: Path, text: str | bytes) -> Document:
    path = tmp_path / "q.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(path, "recipes/q.yaml")


def refused(tmp_path: Path, text: str | bytes) -> BuildError:
    with pytest.raises(BuildError) as caught:
        parsed(tmp_path, text)
    assert caught.value.fix
    return caught.value


def test_every_key_and_item_has_its_line(tmp_path: Path) -> None:
    found = parsed(tmp_path, "# a comment\nformat: awq\nquantization:\n  bits: 4\n  method:\n    - awq\n    - gptq: {damping: 1e-3}\n")
    assert found.data == {"format": "awq", "quantization": {"bits": 4, "method": ["awq", {"gptq": {"damping": 0.001}}]}}
    lines = {".".join(map(str, where)): origin.line for where, origin in found.origins.items()}
    assert lines == {
        "": 1,
        "format": 2,
        "quantization": 3,
        "quantization.bits": 4,
        "quantization.method": 5,
        "quantization.method.0": 6,
        "quantization.method.1": 7,
        "quantization.method.1.gptq": 7,
        "quantization.method.1.gptq.damping": 7,
    }
    assert str(found.origin(("quantization", "bits"))) == "recipes/q.yaml:4"


def test_a_value_that_nobody_wrote_is_placed_at_the_nearest_one_around_it(tmp_path: Path) -> None:
    found = parsed(tmp_path, "verify:\n  kl: {}\n")
    assert found.origin(("verify", "kl", "max_nats")) == Origin("recipes/q.yaml", 2)
    assert found.origin(("format",)) == Origin("recipes/q.yaml", 1)
    assert Document({}).origin(("format",)) is None


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-7", -7),
        ("+7", 7),
        ("0x1f", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", float("inf")),
        # Text in YAML 1.2, unlike in 1.1:
        ("yes", "yes"),
        ("off", "off"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-11-20", "2026-11-20"),
        ("-", "-"),
        ("1.2.3", "1.2.3"),
        ("1234567890123456789012345678901234567890", "1234567890123456789012345678901234567890"),  # a commit of digits alone
    ],
)
def test_plain_scalars_mean_what_yaml_1_2_says(text: str, meaning: Any) -> None:
    assert scalar(text) == meaning and type(scalar(text)) is type(meaning)


def test_quoted_scalars_are_text(tmp_path: Path) -> None:
    assert parsed(tmp_path, "a: '4'\nb: \"null\"\nc: |\n  true\n").data == {"a": "4", "b": "null", "c": "true\n"}


TEXT = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=20)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=12,
    )
)
def test_json_is_yaml(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    written = json.dumps({"key": value}, ensure_ascii=False)
    assert parsed(tmp_path_factory.mktemp("yaml"), written).data == {"key": value}


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a is written twice, in lines 1 and 3"),
        ("x: {a: 1, a: 2}", 1, "written twice in one line"),
        ("4: four\n", 1, "the key 4 is not text"),
        ("true: x\n", 1, "the key true is not text"),
        ("a:\n  ? [b]\n  : c\n", 2, "where a key belongs"),
        ("b: {<<: {a: 1}}\n", 1, "merge keys"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", 2, "!!python/object/apply:os.system"),
        ("a: !mine 1\n", 1, "tag !mine"),
        ("!!python/object:x.Y {}\n", 1, ""),
        ("a:\n\tb: 1\n", 2, "tab"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a: *nowhere\n", 1, "alias"),
        ("a: b: c\n", 1, "not YAML"),
        ("a: [1, 2\nb: 3\n", 2, "not YAML"),
        ("a: 'open\n", 2, "begun in line 1"),
        ("a: 1\nb: \x01\n", 2, "control character"),
        ("- a\n- b\n", 1, "holds a list"),
        ("just text\n", 1, "holds one value"),
        ("", 1, "holds nothing"),
        ("# only a comment\n", 1, "holds nothing"),
        (b"a: 1\nb: \xff\n", 2, "is not UTF-8: byte 0xff"),
    ],
)
def test_refusals_name_the_line(tmp_path: Path, text: str | bytes, line: int, says: str) -> None:
    error = refused(tmp_path, text)
    assert error.where == f"recipes/q.yaml:{line}"
    assert says in error.what


def test_alias_bombs_and_deep_nesting_end_in_an_error(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "once its aliases are expanded" in refused(tmp_path, "\n".join(lines)).what
    assert "once its aliases are expanded" in refused(tmp_path, "a: &a [*a]").what
    assert "levels of nesting" in refused(tmp_path, "a: " + "[" * 100_000).what  # would overflow the C stack
    assert "levels of nesting" in refused(tmp_path, "a: " + "{a: " * 100_000).what


def test_aliases_within_bounds_are_values(tmp_path: Path) -> None:
    assert parsed(tmp_path, "a: &t {text: x}\nb: *t\n").data == {"a": {"text": "x"}, "b": {"text": "x"}}


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    assert parsed(tmp_path, b"\xef\xbb\xbfa: 1\n").data == {"a": 1}


def test_huge_and_missing_files(tmp_path: Path) -> None:
    assert "bytes" in refused(tmp_path, "a: " + "x" * document.MAX_BYTES).what
    with pytest.raises(BuildError, match="cannot be read"):
        read(tmp_path / "none.yaml", "none.yaml")


@given(st.binary(max_size=200) | st.text(alphabet="ab:-[]{}&*!|>'\"#%@,? \n\t0", max_size=60).map(str.encode))
def test_any_bytes_read_or_refuse(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    try:
        assert isinstance(parsed(tmp_path_factory.mktemp("fuzz"), raw).data, dict)
    except BuildError as error:
        assert error.where.startswith("recipes/q.yaml:") and error.fix
