"""The store keeps its word: what is found is whole and unaltered, whatever was killed, altered, filled up or raced for."""

from __future__ import annotations

import errno
import inspect
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from buildsys import digests, disk
from buildsys.errors import BuildError
from buildsys.step import Need, Step, digest
from buildsys.store import BLOB_TIME_NS, Artifact, File, Store

KEY, OTHER = digest("a key"), digest("another key")
FILES = {"model.safetensors": "weights", "deploy/engine.yaml": "backend: turbomind\n"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


def build(store: Store, key: str = KEY, files: dict[str, str] = FILES, **meta: object) -> Artifact:
    stage = store.stage(key)
    for name, text in files.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_text(text)
    return store.commit(key, stage, meta)


def alter(path: Path, text: str) -> None:
    path.chmod(0o644)
    path.write_text(text)


def texts(store: Store, artifact: Artifact) -> dict[str, str]:
    return {name: store.path(artifact, name).read_text() for name in artifact.files}


# Finding what was committed


def test_commit_is_found_again(store: Store) -> None:
    assert store.find(KEY) is None
    made = build(store, note="seven")
    found = Store(store.root).find(KEY)
    assert found == made and found.meta == {"note": "seven"}
    assert texts(store, found) == FILES
    assert not (store.home / "staging" / KEY).exists()
    assert store.path(found, "model.safetensors").is_absolute()


def test_scratch_in_the_stage_is_not_kept(store: Store) -> None:
    made = build(store, files={"out": "1", ".part": "2", ".cache/x": "3"})
    assert set(made.files) == {"out"}


def test_equal_contents_are_one_blob(store: Store) -> None:
    one, two = build(store), build(store, OTHER)
    assert store.path(one, "model.safetensors") == store.path(two, "model.safetensors")
    assert one.digest() == two.digest()


def test_digest_sees_the_files_that_are_read(store: Store) -> None:
    artifact = build(store, files={"a.safetensors": "1", "config.json": "2"})
    other = build(store, OTHER, files={"a.safetensors": "1", "config.json": "3"})
    assert artifact.digest() != other.digest()
    assert artifact.digest(("*.safetensors",)) == other.digest(("*.safetensors",))


@pytest.mark.parametrize("harm", ["missing", "resized", "altered", "no manifest", "half a manifest", "manifest of another shape"])
def test_damage_is_a_miss(store: Store, harm: str) -> None:
    blob = store.path(build(store), "model.safetensors")
    manifest = store.home / "manifests" / f"{KEY}.json"
    if harm == "missing":
        blob.unlink()
    elif harm == "resized":
        alter(blob, "weights and more")
    elif harm == "altered":
        alter(blob, "WEIGHTS")
    elif harm == "no manifest":
        manifest.unlink()
    elif harm == "half a manifest":
        manifest.write_text(manifest.read_text()[:20])
    else:
        manifest.write_text("[]")
    assert store.find(KEY) is None
    assert not manifest.exists()
    if harm in ("resized", "altered"):
        assert not blob.exists(), "a blob under a digest that it has not is a lie to every other artifact"
        assert "model.safetensors" in store.damage[KEY]
    assert texts(store, build(store)) == FILES
    assert store.find(KEY) is not None


def test_touched_blob_is_read_again_and_believed(store: Store) -> None:
    blob = store.path(build(store), "model.safetensors")
    os.utime(blob)
    assert store.find(KEY) is not None
    assert blob.stat().st_mtime_ns == BLOB_TIME_NS


def test_blob_damaged_before_a_second_commit_is_replaced(store: Store) -> None:
    blob = store.path(build(store), "model.safetensors")
    alter(blob, "WEIGHTS")
    assert texts(store, build(store, OTHER)) == FILES


def test_forget(store: Store) -> None:
    build(store)
    (store.stage(KEY) / "half").write_text("x")
    assert store.forget(KEY) and not store.forget(KEY)
    assert store.find(KEY) is None and not (store.home / "staging" / KEY).exists()


# Files that stay where they are


def settle(path: Path) -> None:
    """Lets the clock move on from the file's last change, so that its entry in the index is believed."""
    assert path.exists()
    time.sleep(digests.RACY_NS / 1e9 + 0.05)


def test_linked_file_is_watched(store: Store, tmp_path: Path) -> None:
    original = tmp_path / "big.safetensors"
    original.write_text("big")
    made = store.commit(KEY, store.stage(KEY), {}, {"big.safetensors": original})
    blob = store.path(made, "big.safetensors")
    assert blob.is_symlink() and blob.resolve() == original
    assert store.find(KEY) == made
    original.write_text("BIG")
    assert store.find(KEY) is None
    original.write_text("big")
    again = store.commit(KEY, store.stage(KEY), {}, {"big.safetensors": original})
    original.unlink()
    assert store.find(KEY) is None and again == made


def test_symlink_in_the_stage_is_a_link(store: Store, tmp_path: Path) -> None:
    original = tmp_path / "tokenizer.json"
    original.write_text("{}")
    (store.stage(KEY) / "tokenizer.json").symlink_to(original)
    made = store.commit(KEY, store.stage(KEY), {})
    assert store.path(made, "tokenizer.json").resolve() == original


def test_blob_is_handed_on_unread(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(store)
    stage = store.stage(OTHER)
    (stage / "renamed.safetensors").symlink_to(store.path(first, "model.safetensors"))
    monkeypatch.setattr(digests, "sha256", lambda path: pytest.fail(f"{path} was read"))
    second = store.commit(OTHER, stage, {})
    assert second.files == {"renamed.safetensors": first.files["model.safetensors"]}
    assert not store.path(second, "renamed.safetensors").is_symlink()


def test_real_file_takes_the_place_of_a_link(store: Store, tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.write_text("weights")
    store.commit(OTHER, store.stage(OTHER), {}, {"a": original})
    build(store)
    original.unlink()
    assert store.find(KEY) is not None


# Digests by stat


def test_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    settle(path)
    index = digests.Digests(tmp_path / "stat.sqlite")
    found = index.sha256(path)
    monkeypatch.setattr(digests, "sha256", lambda path: pytest.fail("read again"))
    assert index.sha256(path) == digests.Digests(tmp_path / "stat.sqlite").sha256(path) == found


def test_racily_clean_file_is_read_again(tmp_path: Path) -> None:
    path, index = tmp_path / "file", digests.Digests(tmp_path / "stat.sqlite")
    path.write_text("one")
    stat = path.stat()
    first = index.sha256(path)
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert index.sha256(path) != first


def test_what_would_not_be_believed_is_not_written(tmp_path: Path) -> None:
    """A transaction for each fresh file made planning slow."""
    path, at = tmp_path / "file", tmp_path / "stat.sqlite"
    path.write_text("one")
    digests.Digests(at).sha256(path)
    assert sqlite3.connect(at).execute("SELECT count(*) FROM digest").fetchone() == (0,)
    settle(path)
    digests.Digests(at).sha256(path)
    assert sqlite3.connect(at).execute("SELECT count(*) FROM digest").fetchone() == (1,)


def test_time_set_back_hides_nothing(tmp_path: Path) -> None:
    path, index = tmp_path / "file", digests.Digests(tmp_path / "stat.sqlite")
    path.write_text("one")
    settle(path)
    stat, first = path.stat(), index.sha256(path)
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert index.sha256(path) != first


@pytest.mark.parametrize("harm", ["deleted", "garbage", "a folder"])
def test_index_may_be_lost(tmp_path: Path, harm: str) -> None:
    path, at = tmp_path / "file", tmp_path / "stat.sqlite"
    path.write_text("x")
    first = digests.Digests(at).sha256(path)
    at.unlink()
    if harm == "garbage":
        at.write_bytes(b"no database" * 1000)
    elif harm == "a folder":
        at.mkdir()
    index = digests.Digests(at)
    assert index.sha256(path) == index.sha256(path) == first


def test_missing_file_has_no_digest(store: Store, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be read: No such file"):
        store.sha256(tmp_path / "nothing")


# Deploying


def test_tree_is_a_folder_of_hard_links(store: Store) -> None:
    made = build(store)
    tree = store.tree(made)
    assert {path.relative_to(tree).as_posix(): path.read_text() for path in tree.rglob("*") if path.is_file()} == FILES
    assert os.path.samefile(tree / "model.safetensors", store.path(made, "model.safetensors"))
    before = tree.stat().st_ino
    assert store.tree(made) == tree and tree.stat().st_ino == before


def test_tree_is_a_copy_where_links_cannot_be(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    made = build(store)
    tree = store.tree(made)
    assert (tree / "model.safetensors").read_text() == "weights"
    assert not os.path.samefile(tree / "model.safetensors", store.path(made, "model.safetensors"))
    assert store.find(KEY) is not None


def test_tree_holds_no_link_to_a_file_of_somebody_else(store: Store, tmp_path: Path) -> None:
    original = tmp_path / "tokenizer.json"
    original.write_text("{}")
    tree = store.tree(store.commit(KEY, store.stage(KEY), {}, {"tokenizer.json": original}))
    original.unlink()
    assert (tree / "tokenizer.json").read_text() == "{}" and not (tree / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("harm", ["altered", "missing", "more", "replaced"])
def test_damaged_tree_is_made_again(store: Store, harm: str) -> None:
    made = build(store)
    file = store.tree(made) / "deploy" / "engine.yaml"
    if harm == "altered":
        alter(file, "backend: pytorch\n")
        assert store.find(KEY) is None, "it is the blob, by another name"
        made = build(store)
    elif harm == "missing":
        file.unlink()
    elif harm == "more":
        (file.parent / "more").write_text("x")
    else:
        file.unlink()
        file.write_text("backend: turbomyth\n")
    tree = store.tree(made)
    assert {path.relative_to(tree).as_posix(): path.read_text() for path in tree.rglob("*") if path.is_file()} == FILES


def test_link_moves_at_once(store: Store) -> None:
    first, second = build(store), build(store, OTHER, {"model.safetensors": "other"})
    link = store.link("demo", store.tree(first))
    assert os.readlink(link) == f".store/trees/{first.digest()}" and store.linked("demo") == first.digest()
    store.link("demo", store.tree(second))
    assert (link / "model.safetensors").read_text() == "other" and store.names() == ["demo"]
    assert store.unlink("demo") and not store.unlink("demo") and store.linked("demo") is None


def test_link_never_takes_the_place_of_a_folder(store: Store) -> None:
    (store.root / "demo").mkdir(parents=True)
    with pytest.raises(BuildError, match="in the way"):
        store.link("demo", store.tree(build(store)))


# Dropping


def test_gc_keeps_what_is_needed(store: Store) -> None:
    kept, dropped = build(store), build(store, OTHER, {"model.safetensors": "w" * 5000, "deploy/engine.yaml": FILES["deploy/engine.yaml"]})
    store.link("kept", store.tree(kept))
    store.link("gone", store.tree(dropped))
    (store.stage(digest("stale")) / "half").write_text("x" * 100)
    store.log("quantize", OTHER).write_text("long ago")
    store.log("quantize", KEY).write_text("now")
    freed = store.gc(lambda: {KEY}, ["gone"])
    assert 5100 <= freed < 5500
    assert store.find(KEY) == kept and store.find(OTHER) is None and store.names() == ["kept"]
    assert (store.root / "kept" / "model.safetensors").read_text() == "weights"
    assert store.log("quantize", KEY).exists() and not store.log("quantize", OTHER).exists()
    assert sorted(path.name for path in (store.home / "staging").iterdir()) == []
    assert len(list((store.home / "blobs").rglob("*/*"))) == 2


def test_gc_keeps_what_a_link_still_shows(store: Store) -> None:
    store.link("demo", store.tree(build(store)))
    store.gc(set)
    assert (store.root / "demo" / "model.safetensors").read_text() == "weights"


def test_gc_waits_for_builds(store: Store) -> None:
    build(store)
    with Store(store.root).lock(OTHER), pytest.raises(BuildError, match="in use by a build"):
        store.gc(set)
    assert store.find(KEY) is not None
    store.gc(set)
    assert store.find(KEY) is None


# Walking


def test_walk_stops_at_the_first_miss(store: Store) -> None:
    source = Step("fetch", "source", 1, {"n": 1})
    middle = Step("pack", "middle", 1, {"n": 2}, (Need("source", source, ("*.safetensors",)),))
    end = Step("assemble", "end", 1, {"n": 3}, (Need("packed", middle),))
    steps = list(end.walk())
    assert [step.title for step in steps] == ["source", "middle", "end"]
    found = store.walk(steps)
    assert found[source.planned_key].key == source.key({}) and found[middle.planned_key].key is None
    made = build(store, source.key({}))
    found = store.walk(steps)
    assert found[middle.planned_key].key == middle.key({"source": made.digest(("*.safetensors",))})
    assert found[middle.planned_key].artifact is None and found[end.planned_key].key is None


# Processes


def python(code: str, *arguments: object, **more: object) -> subprocess.Popen[str]:
    said = [sys.executable, "-u", "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(said, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more)  # type: ignore[call-overload, no-any-return]


RACE = """
    import sys, time
    from pathlib import Path
    from buildsys.store import Store
    store, key = Store(Path(sys.argv[1])), sys.argv[2]
    said = []
    with store.lock(key, said.append):
        if store.find(key) is None:
            stage = store.stage(key)
            time.sleep(0.3)
            (stage / "out").write_text("made")
            made = store.commit(key, stage, {})
            print("built")
        else:
            print("waited for", said)
    store.link("demo", store.tree(store.find(key)))
"""


def test_one_of_many_builds_and_the_others_wait_for_it(store: Store) -> None:
    racers = [python(RACE, store.root, KEY) for _ in range(6)]
    said = [racer.communicate(timeout=60)[0] for racer in racers]
    assert all(racer.returncode == 0 for racer in racers), said
    assert sum("built" in one for one in said) == 1
    assert sum("waited for" in one for one in said) == 5 and any("process " in one for one in said), said
    assert (store.root / "demo" / "out").read_text() == "made"


def test_many_make_one_tree_and_commit_without_a_lock(store: Store) -> None:
    code = """
        import sys
        from pathlib import Path
        from buildsys.store import Store
        store = Store(Path(sys.argv[1]))
        for turn in range(10):
            stage = store.stage(sys.argv[2] + sys.argv[3])
            for n in range(20):
                (stage / str(n)).write_text(str(n) * 1000)
            tree = store.tree(store.commit(sys.argv[2], stage, {}))
            assert len(list(tree.iterdir())) == 20
    """
    racers = [python(code, store.root, KEY, n) for n in range(4)]
    said = [racer.communicate(timeout=60)[0] for racer in racers]
    assert all(racer.returncode == 0 for racer in racers), said
    found = store.find(KEY)
    assert found is not None and len(found.files) == 20
    assert not [path for path in store.home.iterdir() if path.name.startswith(".")]


def goes_on(store: Store, key: str) -> Iterator[str]:
    """A step of three files, which begins where an earlier run of it was killed, is committed and linked; the files that it writes."""
    stage = store.stage(key)
    for name in ("a", "b", "c"):
        if not (stage / name).exists():
            (stage / name).write_text(name * 3000)
            yield name
    store.link("demo", store.tree(store.commit(key, stage, {})))


KILLED = f"""
from __future__ import annotations
import os, signal, sys
from pathlib import Path
from buildsys.store import Store
calls, last = 0, int(sys.argv[3])
def counted(function):
    def call(*arguments, **more):
        global calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **more)
    return call
for name in ("link", "replace", "rename", "fsync", "utime", "chmod", "symlink", "unlink", "mkdir", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
{inspect.getsource(goes_on)}
for name in goes_on(Store(Path(sys.argv[1])), sys.argv[2]):
    print("wrote", name)
print("survived")
"""


def test_kill_anywhere_in_a_commit_leaves_a_consistent_store(tmp_path: Path) -> None:
    point = 1
    while True:
        store = Store(tmp_path / str(point))
        killed = python(KILLED, store.root, KEY, point)
        said = killed.communicate(timeout=60)[0]
        found = store.find(KEY)
        assert found is None or texts(store, found) == {name: name * 3000 for name in "abc"}
        link = store.root / "demo"
        assert not link.is_symlink() or {path.name for path in link.iterdir()} == set("abc")
        if "survived" in said:
            break
        assert killed.returncode == -signal.SIGKILL, said
        then = list(goes_on(Store(store.root), KEY))
        if "wrote c" in said and found is None:
            assert not then, "a kill while committing loses nothing of what the step had made"
        assert (link / "c").read_text() == "c" * 3000
        assert store.gc(lambda: {KEY}) >= 0 and not [path for path in store.home.iterdir() if path.name.startswith(".")]
        point += 1
    assert point > 20


# A full disk


def test_full_disk_while_committing(store: Store) -> None:
    code = """
        import resource, sys
        from pathlib import Path
        from buildsys.errors import BuildError
        from buildsys.store import Store
        store, key = Store(Path(sys.argv[1])), sys.argv[2]
        stage = store.stage(key)
        (stage / "out").write_text("x" * 2000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        try:
            store.commit(key, stage, {"long": "x" * 1000})
        except BuildError as error:
            print(error)
    """
    said = python(code, store.root, KEY).communicate(timeout=60)[0]
    assert "cannot be written: File too large" in said and "doit gc" in said and "Traceback" not in said
    assert store.find(KEY) is None and list((store.home / "manifests").iterdir()) == []
    store.forget(KEY)
    assert texts(store, build(store)) == FILES
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk takes root")
def test_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        store = Store(small / "artifacts")
        build(store)
        stage = store.stage(OTHER)
        try:
            (stage / "out").write_bytes(os.urandom(10**6))
            pytest.fail("a megabyte fitted")
        except OSError as error:
            known = disk.explained(error, stage)
        assert known is not None and "No space left" in known.what and "MiB free" in known.what
        with pytest.raises(BuildError, match="No space left"):
            store.commit(OTHER, stage, {})
        assert store.find(OTHER) is None and store.find(KEY) is not None
        store.gc(lambda: {KEY})  # as the error says
        assert texts(store, build(store, OTHER)) == FILES
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
def test_error_half_way_is_told_and_leaves_no_manifest(store: Store, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(BuildError, match="No space left on device"):
            build(store)
    assert store.find(KEY) is None
    assert texts(store, build(store)) == FILES


def test_first_of_several_errors_is_told_and_nothing_is_left_running(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the files, which are taken at the same time, fails first."""
    files = {f"{name:02}": f"text {name}" for name in range(20)}
    before, sync = threading.active_count(), disk.sync_file

    def fails(path: Path) -> None:
        if path.name in ("03", "04", "11"):
            time.sleep(0.05 * (path.name == "03"))
            raise OSError(errno.ENOSPC, "full", str(path))
        sync(path)

    with monkeypatch.context() as patched:
        patched.setattr(disk, "sync_file", fails)
        with pytest.raises(BuildError) as caught:
            build(store, files=files)
    assert Path(caught.value.where).name == "03" and threading.active_count() == before
    assert store.find(KEY) is None and not (store.home / "manifests" / f"{KEY}.json").exists()
    assert texts(store, build(store, files=files)) == files


def test_equal_files_of_one_step_are_one_blob(store: Store) -> None:
    """They are taken at the same time, over a blob that was damaged."""
    alter(store.path(build(store, files={"a": "same"}), "a"), "SAME")
    files = {f"{name:02}": "same" for name in range(30)}
    made = build(store, OTHER, files=files)
    assert texts(store, made) == files and len({store.path(made, name) for name in files}) == 1
    assert store.find(OTHER) == made


def test_file_beside_is_removed_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EDQUOT, "quota")))
    with pytest.raises(OSError, match="quota"):
        disk.write(tmp_path / "x", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == b"old"


def test_explained_looks_through_wrapped_errors(tmp_path: Path) -> None:
    try:
        try:
            raise OSError(errno.EDQUOT, "quota")
        except OSError as error:
            raise RuntimeError("a library's own words") from error
    except RuntimeError as error:
        assert disk.explained(error, tmp_path) is not None
    assert disk.explained(ValueError("x"), tmp_path) is None


def test_file_values_are_plain() -> None:
    assert Artifact(KEY, {"a": File("0" * 64, 3), "b": File("1" * 64, 4)}).size == 7
