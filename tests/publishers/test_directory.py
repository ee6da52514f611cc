"""The directory publisher: atomic, read back, idempotent, and careful with what is not its own."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
from publishers.places import described

from buildsys.errors import BuildError
from buildsys.publishers.directory import Knobs, destination, plan, publish, rollback, verify
from buildsys.step import digest

KNOBS = Knobs(path="out/model")


def quiet(what: str, done: int, total: int) -> None:
    assert 0 < done <= total


def make(tree: Path, **files: str) -> Path:
    for name, text in files.items():
        path = tree / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tree


def hashes(tree: Path) -> dict[str, str]:
    return {path.relative_to(tree).as_posix(): sha256(path.read_bytes()).hexdigest() for path in sorted(tree.rglob("*")) if path.is_file()}


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in folder.rglob("*") if path.name != "lock"}


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return make(tmp_path / "one", config_dot_json="{}", model_dot_safetensors="w" * 5000, deploy__lmdeploy_dot_yaml="tp: 1")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return make(tmp_path / "two", config_dot_json='{"bits": 4}', model_dot_safetensors="v" * 4000)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model"


def test_publishes_every_file(one: Path, out: Path) -> None:
    receipt = publish(KNOBS, described(one), out, quiet)
    assert hashes(out) == hashes(one) and receipt.digest == digest(hashes(one)) and receipt.url == out.as_uri()
    assert verify(KNOBS, described(one), out, quiet) == receipt
    assert (out / "model.safetensors").stat().st_ino != (one / "model.safetensors").stat().st_ino, "a copy, not the store's own blob"


def test_again_copies_nothing(one: Path, out: Path) -> None:
    receipt, before = publish(KNOBS, described(one), out, quiet), everything(out.parent)
    assert publish(KNOBS, described(one), out, quiet) == receipt and everything(out.parent) == before


def test_stale_files_go(one: Path, two: Path, out: Path) -> None:
    publish(KNOBS, described(one), out, quiet)
    publish(KNOBS, described(two), out, quiet)
    assert hashes(out) == hashes(two)
    assert sorted(os.listdir(out.parent)) == [".model.published", "model"]


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_as_many_earlier_versions_stay_as_asked_for(keep: int, tmp_path: Path, out: Path) -> None:
    knobs = Knobs(path="out/model", keep=keep)
    made = [described(make(tmp_path / str(i), config_dot_json=str(i))) for i in range(4)]
    for one in made:
        publish(knobs, one, out, quiet)
    there = sorted(["lock", *(one.digest for one in made[3 - keep :])])
    assert sorted(os.listdir(out.parent / ".model.published")) == there
    if keep:
        rollback(knobs, made[2].digest[:8], out, quiet)
        assert sorted(os.listdir(out.parent / ".model.published")) == there and hashes(out) == made[2].files
        publish(knobs, described(make(tmp_path / "new", config_dot_json="new")), out, quiet)
        assert (out.parent / ".model.published" / made[2].digest).exists(), "what was current last is the earlier version"


def test_an_earlier_version_is_not_copied_again(one: Path, two: Path, out: Path) -> None:
    publish(KNOBS, described(one), out, quiet)
    inode = (out / "config.json").stat().st_ino
    publish(KNOBS, described(two), out, quiet)
    publish(KNOBS, described(one), out, quiet)
    assert (out / "config.json").stat().st_ino == inode


def test_a_damaged_earlier_version_never_becomes_current(one: Path, two: Path, out: Path) -> None:
    first = publish(KNOBS, described(one), out, quiet)
    (out / "config.json").write_text("tampered")
    publish(KNOBS, described(two), out, quiet)
    with pytest.raises(BuildError, match=r"is damaged: its files' digest is \w{16}, not \w{16}"):
        rollback(KNOBS, first.digest, out, quiet)
    assert hashes(out) == hashes(two)
    publish(KNOBS, described(one), out, quiet)
    assert hashes(out) == hashes(one)


def test_a_reader_of_the_old_version_reads_on(one: Path, two: Path, out: Path) -> None:
    publish(KNOBS, described(one), out, quiet)
    with (out / "model.safetensors").open() as reader:
        publish(KNOBS, described(two), out, quiet)
        assert reader.read() == "w" * 5000


def test_a_damaged_publication_is_replaced(one: Path, out: Path) -> None:
    publish(KNOBS, described(one), out, quiet)
    (out / "config.json").write_text("tampered")
    with pytest.raises(BuildError, match=r"config.json has sha256 \w{12}, not \w{12}"):
        verify(KNOBS, described(one), out, quiet)
    publish(KNOBS, described(one), out, quiet)
    assert verify(KNOBS, described(one), out, quiet) and len(os.listdir(out.parent / ".model.published")) == 2, "the damaged one is gone"


def test_a_foreign_file_in_it_is_told(one: Path, out: Path) -> None:
    publish(KNOBS, described(one), out, quiet)
    (out / "notes.txt").write_text("mine")
    (out / "model.safetensors").unlink()
    with pytest.raises(BuildError, match=r"model\.safetensors is missing; notes\.txt was not published"):
        verify(KNOBS, described(one), out, quiet)


def test_a_version_that_someone_deleted_comes_back(one: Path, out: Path) -> None:
    publish(KNOBS, described(one), out, quiet)
    subprocess.run(["rm", "-r", out.resolve()], check=True)
    publish(KNOBS, described(one), out, quiet)
    assert hashes(out) == hashes(one)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_it_did_not_publish_stays(kind: str, one: Path, two: Path, out: Path) -> None:
    out.parent.mkdir()
    if kind == "folder":
        make(out, precious_dot_txt="1")
    elif kind == "file":
        out.write_text("1")
    else:
        out.symlink_to(two)
    before = everything(out.parent)
    made = described(one)
    acts = (partial(publish, KNOBS, made), partial(verify, KNOBS, made), partial(rollback, KNOBS, made.digest))
    for act in (*acts, lambda to, progress: plan(KNOBS, made, to)):
        with pytest.raises(BuildError, match="no publish made") as caught:
            act(out, quiet)
        assert caught.value.fix == "name another publish.directory.path", "what lies there may be dear to somebody"
    assert everything(out.parent) == before


@pytest.mark.parametrize("path", [".", "..", "../..", "../../..", "../model", "../demo/out", "../../artifacts", "../../artifacts/x"])
def test_a_workspaces_own_folders_are_no_place(path: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"the recipe's own folder|own folder (recipes|artifacts)/") as caught:
        destination(Knobs(path=path), tmp_path / "recipes" / "demo")
    assert caught.value.fix == "name another publish.directory.path"


@pytest.mark.parametrize("path", ["../../out/demo", "../../recipes-out", "../../../artifacts"])
def test_elsewhere_is_one(path: str, tmp_path: Path) -> None:
    folder = tmp_path / "recipes" / "demo"
    assert destination(Knobs(path=path), folder) == Path(os.path.normpath(folder / path))


def test_a_dry_run_writes_nothing(one: Path, two: Path, out: Path) -> None:
    assert plan(KNOBS, described(one), out) == (f"publish 3 files to {out}",) and not out.parent.exists()
    publish(KNOBS, described(one), out, quiet)
    before = everything(out.parent)
    assert "already holds 3 equal files" in plan(KNOBS, described(one), out)[0]
    assert plan(KNOBS, described(two), out) == (f"replace {out}: 3 files by 2", "drop deploy/lmdeploy.yaml")
    assert everything(out.parent) == before


@pytest.mark.parametrize("moment", ["asked", "written"])
def test_a_full_disk_leaves_the_old_version(moment: str, one: Path, two: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(KNOBS, described(one), out, quiet)
    before = everything(out.parent)
    if moment == "asked":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    else:

        def full(reader: object, writer: object, piece: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(BuildError, match="the disk is full") as caught:
        publish(KNOBS, described(two), out, quiet)
    assert "free space" in caught.value.fix and {path: inode for path, (inode, _) in everything(out.parent).items()} == {
        path: inode for path, (inode, _) in before.items()
    }
    assert hashes(out) == hashes(one)


def test_a_copy_that_reads_back_otherwise_is_never_seen(one: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rotten(reader: object, writer: object, piece: int) -> None:
        writer.write(b"\0" * len(reader.read()))  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "copyfileobj", rotten)
    with pytest.raises(BuildError, match="reads back otherwise"):
        publish(KNOBS, described(one), out, quiet)
    assert not out.exists() and os.listdir(out.parent / ".model.published") == ["lock"]


def test_two_at_once_are_refused(one: Path, out: Path) -> None:
    def again(what: str, done: int, total: int) -> None:
        if what == "copy" and done == 1:
            with pytest.raises(BuildError, match="another publish to it is running"):
                publish(KNOBS, described(one), out, quiet)

    publish(KNOBS, described(one), out, again)
    assert hashes(out) == hashes(one)


KILLED = """
import json, sys, time
from pathlib import Path
from types import SimpleNamespace
from buildsys.publishers import Release
from buildsys.publishers.directory import Knobs, publish
tree, files = Path(sys.argv[1]), json.loads(sys.argv[3])
release = Release("x", tree, files, {name: (tree / name).stat().st_size for name in files})
publish(Knobs(path="x"), release, Path(sys.argv[2]), lambda what, done, total: (print(what, done, flush=True), time.sleep(0.01)))
"""


@pytest.mark.parametrize("after", ["copy 1", "copy 2", "read back 2"])
def test_a_killed_run_leaves_a_whole_version_and_the_next_one_cleans_up(after: str, one: Path, two: Path, out: Path) -> None:
    publish(KNOBS, described(one), out, quiet)
    child = subprocess.Popen([sys.executable, "-c", KILLED, two, out, json.dumps(hashes(two))], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    deadline = time.monotonic() + 30
    while child.stdout.readline().strip() != after:
        assert time.monotonic() < deadline
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert hashes(out) in (hashes(one), hashes(two)), "one version or the other, whole"
    publish(KNOBS, described(two), out, quiet)
    assert hashes(out) == hashes(two)
    assert sorted(os.listdir(out.parent / ".model.published")) == sorted(["lock", digest(hashes(one)), Path(os.readlink(out)).name])
