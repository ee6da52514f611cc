"""A digest that was taken beside the work is the digest of what is there at the end, or is not used."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys import digests, hashing
from buildsys.errors import BuildError
from buildsys.hashing import Hashing
from buildsys.step import digest
from buildsys.store import Store, _outputs

KEY = digest("a key")


def real(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def alter(path: Path, data: bytes) -> None:
    """In place, with the time of last change set back."""
    was = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def test_what_is_finished_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    taken = digests.sha256
    monkeypatch.setattr(digests, "sha256", lambda path: (read.append(path.name), taken(path))[1])
    store = Store(tmp_path / "artifacts")
    stage = store.stage(KEY)
    with Hashing() as beside:
        for name in ("a", "b", "c"):
            (stage / name).write_text(name * 1000)
            if name != "c":
                beside.finished(stage / name)
        made = store.commit(KEY, stage, {}, known=beside.of)
    assert sorted(read) == ["a", "b", "c"]
    assert {name: file.sha256 for name, file in made.files.items()} == {
        name: hashlib.sha256(name.encode() * 1000).hexdigest() for name in ("a", "b", "c")
    }
    assert store.find(KEY) == made


def test_file_that_was_changed_afterwards_is_read_again(tmp_path: Path) -> None:
    """Of the same size, its time set back, as soon as its digest was taken: a clock's tick has to be waited for, not hoped for."""
    store = Store(tmp_path / "artifacts")
    stage = store.stage(KEY)
    with Hashing() as beside:
        for number in range(40):
            path = stage / f"{number:02}"
            path.write_bytes(b"old")
            beside.finished(path)
            assert beside.of(path) == hashlib.sha256(b"old").hexdigest()
            alter(path, b"new")
        assert not any(beside.of(path) for path in stage.iterdir())
        made = store.commit(KEY, stage, {}, known=beside.of)
    assert {file.sha256 for file in made.files.values()} == {hashlib.sha256(b"new").hexdigest()}
    assert store.path(made, "00").read_bytes() == b"new"


NAMES = ("finished", "wait", "alter", "rewrite", "rename", "touch", "longer", "gone")
DEEDS = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 2)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(DEEDS)
def test_whatever_is_done_to_a_file_its_digest_is_of_what_it_holds(deeds: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder, Hashing() as beside:
        path, other = Path(folder) / "x", Path(folder) / "y"
        path.write_bytes(b"0")
        for deed, value in deeds:
            data = b"%d" % value
            if deed == "finished":
                beside.finished(path)
            elif deed == "wait":
                beside.of(path)
            elif deed == "rewrite":
                path.write_bytes(data)
            elif deed == "rename":
                other.write_bytes(data)
                other.replace(path)
            elif deed == "gone":
                path.unlink(missing_ok=True)
            elif path.exists():
                if deed == "alter":
                    alter(path, data)
                elif deed == "touch":
                    os.utime(path)
                else:
                    path.write_bytes(path.read_bytes() + data)
        found = beside.of(path)
        assert found is None if not path.exists() else found in (None, real(path))
        beside.finished(path)
        assert beside.of(path) == (real(path) if path.exists() else None)


def test_file_that_is_gone_is_told_by_the_commit(tmp_path: Path) -> None:
    """Or is no part of the output, where it was gone before."""
    store = Store(tmp_path / "artifacts")
    stage = store.stage(KEY)
    with Hashing() as beside:
        beside.finished(stage / "never there")
        (stage / "out").write_text("x")
        beside.finished(stage / "out")

        def of(path: Path) -> str | None:
            path.unlink()
            return beside.of(path)

        with pytest.raises(BuildError, match="cannot be read: No such file"):
            store.commit(KEY, stage, {}, known=of)
        assert store.find(KEY) is None
        assert set(store.commit(KEY, store.stage(KEY), {}, known=beside.of).files) == set()


def test_clock_that_stands_still_is_not_waited_for(tmp_path: Path) -> None:
    began = time.monotonic()
    assert not hashing._past(tmp_path, time.time_ns() + 3600 * 10**9) and time.monotonic() - began < 5
    assert hashing._past(tmp_path, time.time_ns() - 3600 * 10**9) and list(tmp_path.iterdir()) == []


def test_the_clock_is_asked_through_nothing_that_a_commit_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a file system makes no file without a name, and while it has one."""
    (tmp_path / "out").write_text("x")
    there, taken, unlink = list[int](), list[str](), os.unlink

    def gone(path: str) -> None:
        there.append(len(os.listdir(tmp_path)))
        taken.extend(output.name for output in _outputs(tmp_path))
        unlink(path)

    monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", False)
    monkeypatch.setattr(os, "unlink", gone)
    assert hashing._past(tmp_path, 0) and (there, taken) == ([2], ["out"])


def test_no_thread_before_the_first_file_and_none_afterwards(tmp_path: Path) -> None:
    before = threading.active_count()
    with Hashing() as beside:
        assert threading.active_count() == before
        with pytest.raises(ValueError, match="a step broke"), beside:
            for number in range(30):
                path = tmp_path / str(number)
                path.write_bytes(bytes(1 << 20))
                beside.finished(path)
            assert threading.active_count() > before
            raise ValueError("a step broke")
        assert threading.active_count() == before
