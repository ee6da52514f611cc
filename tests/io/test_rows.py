"""Rows of parquet, JSON and text, packed or not: the same rows, in bounded memory, and a bad one is named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from buildsys.errors import BuildError
from buildsys.io import rows

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda raw: bytes(pyarrow.Codec("zstd").compress(raw, asbytes=True)),
}
RECORDS = [{"text": f"déjà vu {number}\n\nⅨ " + "x" * (number % 50), "id": number} for number in range(3000)]


def as_parquet(records: list[dict[str, Any]], **options: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(records), sink, **options)
    return bytes(sink.getvalue())


WRITE: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".parquet": lambda records: as_parquet(records, row_group_size=700),
    ".jsonl": lambda records: "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode(),
    ".json": lambda records: json.dumps(records, indent=1).encode(),
}


def read(path: Path, field: str = "text") -> list[str]:
    return list(rows.texts({path.name: path}, field))


def refused(path: Path, raw: bytes, field: str = "text") -> BuildError:
    path.write_bytes(raw)
    with pytest.raises(BuildError) as caught:
        read(path, field)
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", WRITE)
def test_rows_are_the_same_in_every_form(kind: str, packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{kind}{packed}"
    path.write_bytes(PACK[packed](WRITE[kind](RECORDS)))
    assert rows.kind(path.name) == kind and rows.packing(path.name) == packed
    assert read(path) == [record["text"] for record in RECORDS]
    found = list(rows.read(path.name, path))
    assert [dict(row.values) for row in found] == RECORDS
    assert found[6].where == (f"{path}:7" if kind == ".jsonl" else f"{path} row 7")


@pytest.mark.parametrize("packed", PACK)
def test_a_line_of_text_is_a_row(packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(PACK[packed]("\ufeffone\n\ntwo \u2028 three\r\nfour".encode()))
    assert read(path) == ["one", "", "two \u2028 three", "four"]


def test_lines_of_json_under_the_name_of_a_list(tmp_path: Path) -> None:
    """C4's shards are called .json and hold lines."""
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(WRITE[".jsonl"](RECORDS)))
    assert read(path) == [record["text"] for record in RECORDS]


def test_members_of_one_packed_file_are_one_file(tmp_path: Path) -> None:
    for packed in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{packed}"
        path.write_bytes(PACK[packed](b'{"text": "a"}\n{"te') + PACK[packed](b'xt": "b"}\n'))
        assert read(path) == ["a", "b"]


@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()))),
    st.sampled_from([None, 0, 3]),
    st.integers(1, 40),
)
def test_a_list_is_read_piece_by_piece(records: list[dict[str, Any]], indent: int | None, piece: int) -> None:
    """However small the pieces are, wherever they cut a character or an item."""
    raw = json.dumps(records, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    try:
        raw.decode()
    except UnicodeDecodeError:
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rows, "PIECE", piece)
        assert [row.values for row in rows._items(_reader(b" " + raw + b"\n"), "a.json")] == records


def _reader(raw: bytes) -> Any:
    import io

    return io.BufferedReader(io.BytesIO(raw))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("raw", "row"),
    [
        (b"[", 1),
        (b'[{"text": "a"}', 2),
        (b'[{"text": "a"},', 2),
        (b'[{"text": "a"},]', 2),
        (b'[{"text": "a"} {"text": "b"}]', 2),
        (b'[{"text": "a"}, 2]', 2),
        (b'[{"text": "a"}, {"text": 2}]', 2),
        (b'[{"text": "a"}, {"text": "b"}, oops]', 3),
        (b'[{"text": "\xff"}]', 1),
    ],
    ids=str,
)
def test_a_bad_item_of_a_list_is_named(raw: bytes, row: int, tmp_path: Path) -> None:
    assert refused(tmp_path / "a.json", raw).where == f"{tmp_path / 'a.json'} row {row}"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"oops", "is not JSON"),
        (b"[1]", "is a list, not a JSON object"),
        (b'{"body": "x", "id": 1}', "has no field 'text'; its fields: body, id"),
        (b'{"text": null}', "field 'text' is null, not text"),
        (b'{"text": ["x"]}', "field 'text' is a list, not text"),
        (b'{"text": "cut \\ud83d"}', "half of a character"),
        (b'{"text": "\xff"}', "is not UTF-8: byte 0xff"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
@pytest.mark.parametrize("packed", PACK)
def test_a_bad_line_is_named(line: bytes, what: str, packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{packed}"
    error = refused(path, PACK[packed](b'{"text": "fine"}\n\n' + line + b"\n"))
    assert error.where == f"{path}:3" and what in error.what


def test_a_bad_row_of_a_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    error = refused(path, as_parquet([{"text": "a", "id": 1}, {"text": None, "id": 2}]))
    assert error.where == f"{path} row 2" and "is null" in error.what
    assert "has no field 'body'; its fields: text, id" in refused(path, as_parquet(RECORDS), "body").what
    assert "field 'id' is a number" in refused(path, as_parquet(RECORDS), "id").what
    assert "field 'text' is bytes" in refused(path, as_parquet([{"text": b"raw"}])).what


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.txt.zst", "a.parquet.gz"])
def test_a_file_that_was_cut_short_is_an_error(name: str, tmp_path: Path) -> None:
    plain = name.removesuffix(rows.packing(name))
    raw = PACK[rows.packing(name)](WRITE.get(rows.kind(name), WRITE[".jsonl"])(RECORDS))
    assert rows.kind(plain)
    for kept in (len(raw) // 2, len(raw) - 3):
        error = refused(tmp_path / name, raw[:kept])
        assert error.where == str(tmp_path / name) and "damaged or cut short" in error.what


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    raw = bytearray(as_parquet(RECORDS))
    raw[300:400] = bytes(100)
    assert "damaged" in refused(tmp_path / "a.parquet", bytes(raw)).what
    assert "damaged" in refused(tmp_path / "a.parquet", b"version https://git-lfs.github.com/spec/v1\n").what
    assert "damaged" in refused(tmp_path / "a.jsonl.gz", b"no gzip at all").what
    assert "damaged" in refused(tmp_path / "a.jsonl.zst", b"no zstd at all").what
    assert "damaged" in refused(tmp_path / "a.parquet", b"").what


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_is_gone_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be read"):
        read(tmp_path / name)


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 1 << 16)
    error = refused(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": "' + bytes(1 << 20) + b'"}'))
    assert error.where.endswith("a.jsonl.gz:2") and "is a line of more than" in error.what
    assert refused(tmp_path / "a.json.gz", gzip.compress(b'[{"text": "' + bytes(1 << 20) + b'"}]')).where.endswith("row 1")


def test_rows_come_before_the_file_is_read(tmp_path: Path) -> None:
    """Of C4's shard of 800 MB the start is enough."""
    raw = gzip.compress(WRITE[".jsonl"](RECORDS * 20))
    (tmp_path / "a.jsonl.gz").write_bytes(raw[: len(raw) // 2])
    found = rows.texts({"a.jsonl.gz": tmp_path / "a.jsonl.gz"}, "text")
    assert [next(found) for _ in range(100)] == [record["text"] for record in RECORDS[:100]]
    with pytest.raises(BuildError, match="cut short"):
        list(found)


def test_a_table_is_not_read_ahead(tmp_path: Path) -> None:
    """Whatever a file's size, some pages of it are in memory."""
    (tmp_path / "a.parquet").write_bytes(
        as_parquet([{"text": f"{n}" * 400} for n in range(20_000)], row_group_size=500, compression="none")
    )
    before = pyarrow.total_allocated_bytes()
    held = [pyarrow.total_allocated_bytes() - before for _ in rows.texts({"a.parquet": tmp_path / "a.parquet"}, "text")]
    assert len(held) == 20_000 and max(held) < (tmp_path / "a.parquet").stat().st_size // 4


def test_a_file_is_called_what_its_user_calls_it(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_bytes(b"oops")
    (tmp_path / "0a1b").write_bytes(b"oops")
    (tmp_path / "link").symlink_to("mine.jsonl")
    for stored, where in (("link", f"{tmp_path / 'mine.jsonl'}:1"), ("0a1b", "data/x.jsonl:1")):
        with pytest.raises(BuildError) as caught:
            list(rows.texts({"data/x.jsonl": tmp_path / stored}, "text"))
        assert caught.value.where == where
