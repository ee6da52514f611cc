"""Documents from the user's own files, in an order that depends on nothing but their names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildsys.datasets import text_files
from buildsys.datasets.text_files import Knobs, texts
from buildsys.errors import BuildError


def knobs(*paths: str, field: str = "text") -> Knobs:
    return Knobs(paths=paths, field=field)


def locate(chosen: Knobs, folder: Path) -> Mapping[str, Path]:
    found = text_files.locate(chosen, folder, folder / "home")
    assert not found.how and not found.sizes and not (folder / "home").exists() and text_files.floats(chosen) == ""
    return found.files


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, newline="")
    return folder


def read(folder: Path, chosen: Knobs) -> list[str]:
    return list(texts(chosen, locate(chosen, folder)))


def refused(folder: Path, chosen: Knobs) -> BuildError:
    with pytest.raises(BuildError) as caught:
        read(folder, chosen)
    assert caught.value.fix
    return caught.value


def test_files_in_the_order_of_paths_then_of_names_each_once(tmp_path: Path) -> None:
    write(tmp_path, {"z.txt": "z", "d/b.md": "b", "d/a.txt": "a", "d/e/c.txt": "c", "d/skip.csv": ""})
    chosen = knobs("z.txt", "d/**/*.txt", "d/*.md", "d/a.txt")
    assert list(locate(chosen, tmp_path)) == ["00000-z.txt", "00001-a.txt", "00002-c.txt", "00003-b.md"]
    assert read(tmp_path, chosen) == ["z", "a", "c", "b"]


def test_names_do_not_depend_on_where_the_workspace_lies(tmp_path: Path) -> None:
    files = {"b.txt": "b", "a.txt": "a"}
    one, two = write(tmp_path / "one[x]*", files), write(tmp_path / "two", files)
    assert list(locate(knobs("*.txt"), one)) == list(locate(knobs("*.txt"), two)) == ["00000-a.txt", "00001-b.txt"]


def test_a_name_with_the_signs_of_a_glob_is_a_name_first(tmp_path: Path) -> None:
    write(tmp_path, {"a[1].txt": "one", "a1.txt": "other"})
    assert read(tmp_path, knobs("a[1].txt")) == ["one"]


def test_files_are_read_under_the_names_that_the_store_gives_them(tmp_path: Path) -> None:
    blob = write(tmp_path, {"blob": '{"text": "a"}\n'}) / "blob"
    assert list(texts(knobs("x"), {"00000-x.jsonl": blob})) == ["a"]
    blob.write_text("oops")
    with pytest.raises(BuildError) as caught:
        list(texts(knobs("x"), {"00000-x.jsonl": blob}))
    assert caught.value.where == "00000-x.jsonl:1"


def test_a_text_file_is_one_document_byte_for_byte_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "one\r\n\r\ntwo\n", "b.txt": " \n", "c.txt": "\ufeffmarked"})
    assert read(tmp_path, knobs("*.txt")) == ["one\r\n\r\ntwo\n", "marked"]


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_jsonl_gives_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> None:
    lines = "\n\n".join(json.dumps({"id": number, "body": text}) for number, text in enumerate(documents))
    assert read(write(tmp_path_factory.mktemp("jsonl"), {"a.jsonl": lines}), knobs("a.jsonl", field="body")) == documents


def test_documents_come_one_at_a_time(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": '{"text": "first"}\nbroken\n'})
    chosen = knobs("a.jsonl")
    found = texts(chosen, locate(chosen, tmp_path))
    assert next(found) == "first"
    with pytest.raises(BuildError):
        next(found)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{'text': 1}", "is not JSON"),
        ("[1]", "is a list, not a JSON object"),
        ('{"body": "x", "id": 1}', "has no field 'text'; its fields: body, id"),
        ("{}", "its fields: none"),
        ('{"text": 4}', "field 'text' is a number, not text"),
        ('{"text": null}', "field 'text' is null, not text"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, what: str) -> None:
    write(tmp_path, {"a.jsonl": f'{{"text": "good"}}\n\n{line}\n'})
    error = refused(tmp_path, knobs("a.jsonl"))
    assert error.where == f"{tmp_path / 'a.jsonl'}:3" and what in error.what


@pytest.mark.parametrize(("name", "line"), [("a.txt", 2), ("a.jsonl", 2)])
def test_other_encodings_are_refused_at_their_line(tmp_path: Path, name: str, line: int) -> None:
    (tmp_path / name).write_bytes(b'{"text": "x"}\n{"text": "caf\xe9"}\n')
    error = refused(tmp_path, knobs(name))
    assert error.where == f"{tmp_path / name}:{line}" and "0xe9" in error.what and "UTF-8" in error.fix


def test_what_cannot_be_found_or_read(tmp_path: Path) -> None:
    write(tmp_path, {"d/a.csv": "", "d/plain": ""})
    assert "matches no file" in refused(tmp_path, knobs("*.txt")).what
    assert "no such file" in refused(tmp_path, knobs("a.txt")).what
    assert "is a folder" in refused(tmp_path, knobs("d")).what and "d/**/*.txt" in refused(tmp_path, knobs("d/")).fix
    assert "is .csv; text files are .txt, .md, .jsonl" in refused(tmp_path, knobs("d/*.csv")).what
    assert "without suffix" in refused(tmp_path, knobs("d/plain")).what
    (tmp_path / "dead.txt").symlink_to("gone")
    assert "leads nowhere" in refused(tmp_path, knobs("*.txt")).what


def test_file_reached_twice_through_a_link_is_one_file(tmp_path: Path) -> None:
    write(tmp_path, {"d/a.txt": "once", "d/e/b.txt": "also"})
    (tmp_path / "d/loop").symlink_to(".")
    assert sorted(locate(knobs("d/**/*.txt"), tmp_path)) == ["00000-a.txt", "00001-b.txt"]


def test_half_a_character_is_refused_at_its_line(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": '{"text": "fine"}\n{"text": "cut \\ud83d"}\n'})
    error = refused(tmp_path, knobs("a.jsonl"))
    assert error.where.endswith("a.jsonl:2") and "lone surrogate" in error.what


def test_paths_are_needed() -> None:
    with pytest.raises(ValueError, match="paths"):
        Knobs(paths=())
