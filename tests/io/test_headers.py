"""Headers: what the format allows is read, and each thing that it forbids is refused with the file, the finding and what to do."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildsys.errors import BuildError
from buildsys.io import headers
from buildsys.io.headers import INDEX, SINGLE, Entry, describe, encode, read

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
LAYOUTS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(headers.WIDTHS)), SHAPES),
    max_size=6,
)


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(start: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def refused(path: Path) -> BuildError:
    with pytest.raises(BuildError) as caught:
        read(path)
    assert caught.value.where == str(path) and caught.value.fix
    return caught.value


@given(layout=LAYOUTS, metadata=st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), st.text(st.characters(codec="utf-8"))))
def test_read_is_the_inverse_of_encode(layout: dict[str, Any], metadata: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    prefix, header = encode(layout, metadata)
    size = sum(headers.size(*held) for held in layout.values())
    path = tmp_path_factory.getbasetemp() / "inverse.safetensors"
    path.write_bytes(prefix + bytes(size))
    found = read(path)
    assert dict(found.tensors) == dict(header.tensors) and dict(found.metadata) == metadata
    assert len(prefix) % 8 == 0 and all(entry.start % headers.WIDTHS[entry.dtype] == 0 for entry in found.tensors.values())


def test_equal_layouts_give_equal_bytes() -> None:
    layout = {"b": ("F16", (3,)), "a": ("F32", (2,)), "c": ("F16", ())}
    prefix, header = encode(layout, {"z": "1", "y": "2"})
    assert prefix == encode(dict(layout), {"y": "2", "z": "1"})[0]
    assert list(header.tensors) == ["a", "b", "c"]  # wide types first, then layout order


def test_entries_tell_absolute_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"a": tensor(0, 4, "F32", []), "b": tensor(4, 4, "F16", [0, 7])}, b"1234")
    base = path.stat().st_size - 4
    assert read(path).tensors == {"a": Entry("F32", (), base, base + 4), "b": Entry("F16", (0, 7), base + 4, base + 4)}


def test_fields_and_padding_that_the_format_allows(tmp_path: Path) -> None:
    text = json.dumps({"__metadata__": {"format": "pt"}, "a": tensor(0, 1) | {"note": 1}}).encode() + b"   "
    assert read(write(tmp_path / "x", text, b"1")).metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": tensor(0, 8)}, b"1234", "is truncated"),
        ({"a": tensor(0, 4)}, b"12345678", "is longer than its header says"),
        ({"a": tensor(0, 4), "b": tensor(2, 6)}, b"123456", "tensor b starts at byte"),
        ({"a": tensor(0, 4), "b": tensor(2, 6)}, b"123456", "overlaps a"),
        ({"a": tensor(0, 4), "b": tensor(6, 8)}, b"12345678", "leaves a gap after a"),
        ({"a": tensor(2, 4)}, b"1234", "leaves a gap after the header"),
        ({"a": tensor(0, 4, "F32", [2])}, b"1234", "has 4 bytes, F32 [2] takes 8"),
        ({"a": tensor(0, 1, "F4", [2])}, b"1", "has type 'F4'"),
        ({"a": tensor(0, 4, "U8", [-2, -2])}, b"1234", "which cannot be"),
        ({"a": tensor(0, 1, "U8", [True])}, b"1", "which cannot be"),  # type: ignore[list-item]
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]}}, b"1", "which cannot be"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"1", "which cannot be"),
        ({"a": {"dtype": ["U8"], "shape": [1], "data_offsets": [0, 1]}}, b"1", "has type ['U8']"),
        ({"a": {"dtype": "U8", "shape": [1]}}, b"1", "lacks one of"),
        ({"a": 3}, b"1", "lacks one of"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        ([1], b"", "is a JSON list"),
        (b'{"a":1', b"", "is not valid JSON"),
        (b'{"\xff":1}', b"", "is not valid JSON"),
        (b'{"\\ud800":1}', b"", "is not valid JSON"),
        (b"[" * 100_000, b"", "is nested too deeply"),
        (
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"1",
            "is there twice",
        ),
        (b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"1", "is there twice"),
    ],
)
def test_what_the_format_forbids(header: Any, data: bytes, said: str, tmp_path: Path) -> None:
    error = refused(write(tmp_path / "bad.safetensors", header, data))
    assert said in error.what


def test_a_truncated_file_names_both_sizes(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"a": tensor(0, 8)}, b"12345678")
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])
    assert f"{whole - 3} bytes on disk, {whole} in the header" in refused(path).what


@pytest.mark.parametrize("length", [headers.LIMIT_BYTES + 1, 2**63, 2**64 - 1])
def test_a_huge_length_is_refused_before_memory_is_taken(length: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + b"{}")
    assert str(length) in refused(tmp_path / "x").what


@pytest.mark.parametrize("content", [b"", b"1234567", bytes(8), struct.pack("<Q", 100) + b"{}"])
def test_too_short_for_a_header(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    refused(tmp_path / "x")


def test_a_pointer_of_git_lfs_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "git lfs pull" in refused(tmp_path / "x").fix


@given(noise=st.binary(max_size=200), cut=st.integers(0, 120))
def test_noise_is_read_or_refused_and_never_crashes(noise: bytes, cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    prefix, _ = encode({"a": ("F32", (2,)), "b": ("U8", (3,))}, {})
    for content in (noise, (prefix + bytes(11))[:cut], prefix[:cut] + noise):
        path.write_bytes(content)
        try:
            read(path)
        except BuildError as error:
            assert error.where and error.what and error.fix


def shards(folder: Path, held: dict[str, list[str]], index: Any = None) -> dict[str, Path]:
    for file, names in held.items():
        write(folder / file, {name: tensor(at, at + 1) for at, name in enumerate(names)}, bytes(len(names)))
    mapped = {name: file for file, names in held.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"weight_map": mapped} if index is None else index))
    return {path.name: path for path in folder.iterdir()}


def test_one_file_and_shards_are_described_alike(tmp_path: Path) -> None:
    files = shards(tmp_path, {"model-1.safetensors": ["a", "b"], "model-2.safetensors": ["c"]})
    assert {name: file for name, (file, _) in describe(files).items()} == {
        "a": "model-1.safetensors",
        "b": "model-1.safetensors",
        "c": "model-2.safetensors",
    }
    alone = {SINGLE: write(tmp_path / "elsewhere", {"a": tensor(0, 1)}, b"1"), "config.json": tmp_path / "config.json"}
    assert describe(alone)["a"][0] == SINGLE


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"a": "s1", "b": "s1", "c": "s3"}}, "s3"),
        ({"weight_map": {"a": "s1", "c": "s2"}}, "says that no shard holds b; s1 does"),
        ({"weight_map": {"a": "s1", "b": "s2", "c": "s2"}}, "says that s2 holds b; s1 does"),
        ({"weight_map": {"a": "s1", "b": "s1", "c": "s2", "d": "s2"}}, "says that s2 holds d; no shard does"),
        ({"weight_map": {"a": 1}}, "has no weight_map"),
        ({}, "has no weight_map"),
        ([], "is a JSON list"),
    ],
)
def test_an_index_that_disagrees_with_its_shards(index: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"index.json") as caught:
        describe(shards(tmp_path, {"s1": ["a", "b"], "s2": ["c"]}, index))
    assert said in caught.value.what


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="tensor a is in two shards, s1 and s2"):
        describe(shards(tmp_path, {"s1": ["a", "c"], "s2": ["a", "b"]}))


def test_two_sets_of_weights(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="two sets of weights"):
        describe(shards(tmp_path, {SINGLE: ["a"]}))


@pytest.mark.parametrize(("name", "said"), [("pytorch_model.bin", "pickle only"), ("config.json", "has neither")])
def test_no_safetensors(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=said) as caught:
        describe({name: tmp_path / name})
    assert caught.value.where == str(tmp_path)


def test_a_blob_is_called_by_its_name_too(tmp_path: Path) -> None:
    (tmp_path / "ab12").write_bytes(b"")
    with pytest.raises(BuildError) as caught:
        describe({SINGLE: tmp_path / "ab12"})
    assert caught.value.where == f"{SINGLE} ({tmp_path / 'ab12'})"


def test_a_header_whose_file_is_elsewhere(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", {"a": tensor(0, 8), "b": tensor(8, 9)}, b"123456789")
    size, cut = whole.stat().st_size, tmp_path / "header"
    cut.write_bytes(whole.read_bytes()[:-9])
    assert read(cut, "x", size) == read(whole)
    assert describe({SINGLE: cut}, {SINGLE: size}) == describe({SINGLE: whole})
    for wrong in (size - 1, size + 1, cut.stat().st_size, 3):
        with pytest.raises(BuildError, match=f"{wrong} bytes"):
            read(cut, "x", wrong)
    cut.write_bytes(whole.read_bytes()[:-12])
    with pytest.raises(BuildError, match="of its header are here"):
        read(cut, "x", size)


def test_headers_of_shards_whose_files_are_elsewhere(tmp_path: Path) -> None:
    files = shards(tmp_path, {"model-1.safetensors": ["a", "b"], "model-2.safetensors": ["c"]})
    known = describe(files)
    sizes = {name: path.stat().st_size for name, path in files.items() if name.endswith(".safetensors")}
    for name, data in (("model-1.safetensors", 2), ("model-2.safetensors", 1)):
        files[name].write_bytes(files[name].read_bytes()[:-data])
    assert describe(files, sizes) == known
