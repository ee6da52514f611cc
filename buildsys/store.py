"""The truth about what is built: files by the digest of their content, and a manifest for each finished step by its key.

Constructive traces (Mokhov, Mitchell, Peyton Jones, "Build Systems a la Carte", 2018, section 5), laid out as git and nix lay out theirs:
blobs/ab/<sha256>, manifests/<key>.json, trees/<digest>/ (deployable folders of hard links), staging/<key>/ (half-built, kept after a kill).

A committed blob gets one fixed time of last change, and no permission to write. Whoever alters it afterwards moves that time to now, so
looking at size and time is enough to know that a blob still holds what it held; a blob that shows a change is read again before it counts.
A blob may be a symlink to a file that stays where it is (a local model): then the index of digests.py watches the original.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, TypeVar

from buildsys import digests, disk
from buildsys.errors import BuildError
from buildsys.step import Step, canonical, digest, reads

AT_A_TIME = 8  # files that are hashed and synced
BLOB_TIME_NS = 1_000_000_000 * 10**9
NO_HARD_LINK = frozenset({errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES})
Waiting = Callable[[str], None]
Given = TypeVar("Given")
Made = TypeVar("Made")


def _unknown(path: Path) -> None:
    """No digest was taken before."""


@dataclass(frozen=True)
class File:
    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class Artifact:
    """A finished step's output."""

    key: str
    files: Mapping[str, File]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def digest(self, globs: tuple[str, ...] = ("*",)) -> str:
        """Digest of the files that a reader of `globs` sees: their names and contents."""
        return digest({name: file.sha256 for name, file in self.files.items() if reads(globs, name)})

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values())


@dataclass(frozen=True)
class Found:
    """A step seen from the store. No key: a step before it has to run first, and its key depends on what comes out."""

    key: str | None
    artifact: Artifact | None
    output: Artifact | None  # the artifact, or what a step that has to run promises to make


class Store:
    def __init__(self, root: Path = Path("artifacts")) -> None:
        self.root = root
        self.home = root / ".store"
        self.digests = digests.Digests(self.home / "stat.sqlite")
        self.damage: dict[str, str] = {}  # key -> what was found wrong in this process, for `why`

    # Finding

    def find(self, key: str) -> Artifact | None:
        """The artifact of `key` if every file of it is there and unaltered; a damaged one is dropped, and is a miss."""
        try:
            artifact = self._manifested(key)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            self._drop(key, "its manifest is damaged")
            return None
        for name, file in artifact.files.items():
            if not self._holds(file):
                self._drop(key, f"{name} is missing, or is no longer what was built")
                return None
        return artifact

    def recorded(self, key: str) -> Artifact | None:
        """What the manifest of `key` says, whatever became of its files: for who looks back. Nothing is dropped."""
        try:
            return self._manifested(key)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def held(self, sha256: str) -> Path | None:
        """Where the content of that digest lies, if it is there and unaltered: read again. Nothing is dropped."""
        blob = self._blob(sha256)
        try:
            return blob.absolute() if digests.sha256(blob) == sha256 else None
        except BuildError:
            return None

    def path(self, artifact: Artifact, name: str) -> Path:
        """Where the content of one file lies (absolute; its own name is a digest)."""
        return self._blob(artifact.files[name].sha256).absolute()

    def sha256(self, path: Path) -> str:
        """Content digest of any file, remembered by stat."""
        with disk.writing(self.home):
            self.home.mkdir(parents=True, exist_ok=True)
        return self.digests.sha256(path)

    def key(self, step: Step, artifacts: Mapping[str, Artifact]) -> str:
        """The real key of `step`; `artifacts` holds those of its needs by planned key."""
        return step.key({need.role: artifacts[need.step.planned_key].digest(need.files) for need in step.needs})

    def walk(self, steps: Iterable[Step]) -> dict[str, Found]:
        """What the store knows of `steps` (in topological order), by planned key."""
        found: dict[str, Found] = {}
        built: dict[str, Artifact] = {}
        for step in steps:
            known = all(need.step.planned_key in built for need in step.needs)
            key = self.key(step, built) if known else None
            artifact = output = self.find(key) if key is not None else None
            if output is None and key is not None and step.promises is not None:
                output = Artifact(key, {name: File(sha256, 0) for name, sha256 in step.promises.items()})
            found[step.planned_key] = Found(key, artifact, output)
            if output is not None:
                built[step.planned_key] = output
        return found

    # Building

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Held for as long as found artifacts have to stay; `gc` works only while nobody holds it."""
        with self._flock(fcntl.LOCK_SH):
            yield

    @contextmanager
    def lock(self, key: str, waiting: Waiting | None = None) -> Iterator[None]:
        """One builder a key, over all processes of the machine; `waiting` is told who has it."""
        from filelock import FileLock, Timeout  # 60 ms that a build without work does not pay

        path = self.home / "locks" / f"{key}.lock"
        holder = path.with_suffix(".holder")
        with ExitStack() as stack:
            stack.enter_context(self.in_use())
            with disk.writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = FileLock(path)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    if waiting is not None:
                        waiting(_told(holder))
                    lock.acquire(poll_interval=0.1)
                stack.callback(lock.release)
                since = time.strftime("%H:%M:%S")
                holder.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}")
            stack.callback(holder.unlink, missing_ok=True)
            yield

    def stage(self, key: str) -> Path:
        """The folder that the step of `key` writes into (absolute). A killed step's folder is there again, with what it had finished."""
        folder = (self.home / "staging" / key).absolute()
        with disk.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def log(self, kind: str, key: str) -> Path:
        """Where the step of `key` says what it does."""
        folder = self.home / "logs"
        with disk.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{kind}-{key[:12]}.log"

    def commit(
        self,
        key: str,
        stage: Path,
        meta: Mapping[str, Any],
        links: Mapping[str, Path] = MappingProxyType({}),
        known: Callable[[Path], str | None] = _unknown,
    ) -> Artifact:
        """Makes what lies in `stage` the artifact of `key`, and removes `stage`.

        A symlink in `stage`, or a file in `links`, stays where it is: one that leads to a blob of this store hands that blob on unread; any
        other becomes a blob that is a symlink to the original. Names that begin with a dot are the step's scratch, and are not kept.
        `known` tells the digest of what a file holds now, where somebody has taken it (see hashing.py).
        """
        with self.in_use(), disk.writing(stage):
            staged = {path.relative_to(stage).as_posix(): path for path in _outputs(stage)}
            given = sorted({**staged, **links}.items())
            for name, _ in given:
                _check_name(name)
            made = _several_at_a_time(lambda one: self._adopt(one[1], one[0] in links, known), given)
            files = {name: file for (name, _), file in zip(given, made, strict=True)}
            listed = {name: {"sha256": file.sha256, "size": file.size} for name, file in files.items()}
            disk.write(self._manifest(key), canonical({"files": listed, "key": key, "meta": dict(meta)}))
        shutil.rmtree(stage, ignore_errors=True)
        self.damage.pop(key, None)
        return Artifact(key, MappingProxyType(files), MappingProxyType(dict(meta)))

    def forget(self, key: str) -> bool:
        """The step of `key` is no longer finished, nor begun; whoever builds it is waited for. Says whether it was finished."""
        with self.lock(key):
            return self.drop(key)

    def drop(self, key: str) -> bool:
        """`forget`, for who holds the lock."""
        was = self._manifest(key).exists()
        self._manifest(key).unlink(missing_ok=True)
        shutil.rmtree(self.home / "staging" / key, ignore_errors=True)
        return was

    # Deploying

    def tree(self, artifact: Artifact, of: str = "") -> Path:
        """A folder with the artifact's files under their names, for others to read: complete, or not there.

        `of` is the digest of another artifact that this one adds to; `linked` then answers that.
        """
        folder = self.home / "trees" / "-".join(filter(None, (of, artifact.digest())))
        if _tree_holds(folder, artifact):
            return folder
        with self.in_use(), disk.writing(folder):
            beside = self._beside("tree")
            for name, file in artifact.files.items():
                target = beside / name
                target.parent.mkdir(parents=True, exist_ok=True)
                _place(self._blob(file.sha256), target, file)
            for inside, _, _ in os.walk(beside):
                disk.sync_folder(Path(inside))
            self._put(beside, folder, artifact)
        return folder

    def link(self, name: str, tree: Path) -> Path:
        """artifacts/<name> leads to `tree` from now on; at every moment it leads to the old tree or to the new one."""
        link = self.root / name
        if link.exists() and not link.is_symlink():
            raise BuildError(str(link), "is in the way of this recipe's artifact and is no link of this store", "move it away")
        target = os.path.relpath(tree, self.root)
        if link.is_symlink() and os.readlink(link) == target:
            return link
        with disk.writing(link):
            beside = self.home / f".link-{secrets.token_hex(8)}"
            beside.symlink_to(target)
            os.replace(beside, link)
            disk.sync_folder(self.root)
        return link

    def unlink(self, name: str) -> bool:
        """Removes artifacts/<name>; says whether it was there. The files stay in the store."""
        link = self.root / name
        if not link.is_symlink():
            return False
        link.unlink()
        return True

    def linked(self, name: str) -> str | None:
        """The digest of the artifact that artifacts/<name> leads to."""
        tree = self._linked(name)
        return tree.partition("-")[0] if tree is not None else None

    def _linked(self, name: str) -> str | None:
        link = self.root / name
        return PurePosixPath(os.readlink(link)).name if link.is_symlink() else None

    def names(self) -> list[str]:
        """Recipes that have an artifact."""
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in os.scandir(self.root) if entry.is_symlink() and ".store/trees/" in os.readlink(entry.path))

    # Dropping

    def gc(self, needed: Callable[[], Collection[str]], links: Collection[str] = ()) -> int:
        """Drops every step but those of the keys `needed`, the links `links`, and what only they used. Returns the bytes that came free.

        `needed` is asked when nobody builds any more: what was built until then counts.
        """
        with self._flock(fcntl.LOCK_EX):
            keep = needed()
            for name in links:
                self.unlink(name)
            for manifest in self._list("manifests"):
                if manifest.stem not in keep:
                    manifest.unlink()
            used = {file.sha256 for key in keep if (artifact := self.find(key)) is not None for file in artifact.files.values()}
            trees = {self._linked(name) for name in self.names()}
            prefixes = {key[:12] for key in keep}
            unused = [path for path in self._list("trees") if path.name not in trees]
            unused += [path for folder in self._list("blobs") for path in folder.iterdir() if path.name not in used]
            unused += [path for path in self._list("staging") if path.name not in keep]
            unused += [path for path in self._list("logs") if path.stem.rpartition("-")[2] not in prefixes]
            unused += [path for path in self._list("locks") if path.stem not in keep]
            unused += [path for path in self._list("recipes") if path.stem in links]
            unused += self.home.glob(".*-*")  # what a kill left beside
            return sum(_remove(path) for path in unused)

    # Inside

    def _manifested(self, key: str) -> Artifact:
        """Raises what reading JSON of another shape raises."""
        raw = json.loads(self._manifest(key).read_bytes())
        files = {name: File(file["sha256"], file["size"]) for name, file in raw["files"].items()}
        return Artifact(key, MappingProxyType(files), MappingProxyType(raw["meta"]))

    def _manifest(self, key: str) -> Path:
        return self.home / "manifests" / f"{key}.json"

    def _blob(self, sha256: str) -> Path:
        return self.home / "blobs" / sha256[:2] / sha256

    def _list(self, name: str) -> list[Path]:
        folder = self.home / name
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def _beside(self, what: str) -> Path:
        folder = self.home / f".{what}-{secrets.token_hex(8)}"
        folder.mkdir(parents=True)
        return folder

    def _drop(self, key: str, why: str) -> None:
        self.damage[key] = why
        self._manifest(key).unlink(missing_ok=True)

    def _holds(self, file: File) -> bool:
        """Whether the blob is what was committed; one that is not is removed."""
        blob = self._blob(file.sha256)
        try:
            shown = blob.lstat()
            if not stat.S_ISLNK(shown.st_mode):
                if shown.st_size == file.size and shown.st_mtime_ns == BLOB_TIME_NS:
                    return True
                if shown.st_size == file.size and self._reads(blob) == file.sha256:  # touched, not altered
                    os.utime(blob, ns=(BLOB_TIME_NS, BLOB_TIME_NS))
                    return True
            elif blob.stat().st_size == file.size and self.sha256(Path(os.readlink(blob))) == file.sha256:
                return True
        except FileNotFoundError:
            pass  # gone, or a link to a file that is gone
        blob.unlink(missing_ok=True)
        return False

    def _reads(self, blob: Path) -> str:
        """Its content's digest, also where another process sets its time back at this moment."""
        try:
            return digests.sha256(blob)
        except BuildError:
            return digests.sha256(blob)

    def _adopt(self, path: Path, stays: bool, known: Callable[[Path], str | None]) -> File:
        if path.is_symlink():
            hop = Path(os.path.normpath(path.parent / os.readlink(path)))
            if hop.parent.parent == (self.home / "blobs").absolute():
                return self._again(hop, path)
            stays, path = True, hop
        if stays:
            blobs = (self.home / "blobs").absolute()
            return self._again(path, path) if path.parent.parent == blobs else self._watch(path)
        return self._take(path, known(path) or digests.sha256(path))

    def _again(self, blob: Path, asked: Path) -> File:
        """A blob that another artifact brought."""
        try:
            file = File(blob.name, blob.stat().st_size)
        except FileNotFoundError:
            file = File(blob.name, -1)
        if not self._holds(file):
            raise BuildError(str(asked), "was damaged in the store while this step ran", "run the same command again: it is built anew")
        return file

    def _watch(self, original: Path) -> File:
        """The blob is a link to a file that stays where it is."""
        original = original.absolute()
        file = File(self.sha256(original), original.stat().st_size)
        blob = self._blob(file.sha256)
        if not (os.path.lexists(blob) and self._holds(file)):
            blob.parent.mkdir(parents=True, exist_ok=True)
            beside = self.home / f".blob-{secrets.token_hex(8)}"
            beside.symlink_to(original)
            os.replace(beside, blob)
            disk.sync_folder(blob.parent)
        return file

    def _take(self, path: Path, sha256: str) -> File:
        """A staged file becomes a blob. It stays staged too, so that a kill before the manifest is written loses nothing."""
        file = File(sha256, path.stat().st_size)
        path.chmod(0o444)
        os.utime(path, ns=(BLOB_TIME_NS, BLOB_TIME_NS))
        disk.sync_file(path)
        blob = self._blob(file.sha256)
        blob.parent.mkdir(parents=True, exist_ok=True)
        if not blob.is_symlink() and os.path.lexists(blob) and self._holds(file):
            return file
        beside = self.home / f".blob-{secrets.token_hex(8)}"
        try:
            os.link(path, beside)
            os.replace(beside, blob)
            beside.unlink(missing_ok=True)  # rename does nothing where both names are one file
        except OSError as error:
            if error.errno not in NO_HARD_LINK:
                raise
            os.replace(path, blob)
        disk.sync_folder(blob.parent)
        return file

    def _put(self, beside: Path, folder: Path, artifact: Artifact) -> None:
        """Renames a finished tree into place; another process may do the same at the same moment, and either of them will do."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(100):
            try:
                os.rename(beside, folder)
                disk.sync_folder(folder.parent)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if _tree_holds(folder, artifact):
                shutil.rmtree(beside)
                return
            damaged = self.home / f".tree-{secrets.token_hex(8)}"
            try:
                os.rename(folder, damaged)
            except FileNotFoundError:  # the other process was faster
                continue
            shutil.rmtree(damaged)
        raise BuildError(str(folder), "changes as fast as it is built", "end what writes into it, then run the same command again")

    @contextmanager
    def _flock(self, mode: int) -> Iterator[None]:
        """Shared by everyone who reads or builds, exclusive for gc; the kernel ends it with its process."""
        path = self.home / "in-use.lock"
        with disk.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if mode == fcntl.LOCK_EX:
                try:
                    fcntl.flock(handle, mode | fcntl.LOCK_NB)
                except BlockingIOError:
                    fix = "run it again when that build has ended"
                    raise BuildError(str(self.home), "is in use by a build, and gc could drop what it needs", fix) from None
            else:
                fcntl.flock(handle, mode)
            yield
        finally:
            os.close(handle)


def _outputs(stage: Path) -> list[Path]:
    paths = (Path(folder) / name for folder, _, names in os.walk(stage) for name in names)
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(stage).parts)]


def _check_name(name: str) -> None:
    assert not name.startswith("/") and ".." not in name.split("/"), name


def _several_at_a_time(work: Callable[[Given], Made], given: Sequence[Given]) -> list[Made]:
    """`map(work, given)`: hashing lets other threads run, one processor reads slower than a disk, and a disk syncs many files about as fast
    as one. The first error in the order of `given` is raised when nothing is at work any more."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(AT_A_TIME, max(1, len(given)))) as pool:
        return list(pool.map(work, given))


def _told(holder: Path) -> str:
    """Who has a lock. Whoever has just got it says so a moment later."""
    for _ in range(10):
        try:
            if said := holder.read_text():
                return said
        except OSError:
            pass  # not yet, or no longer
        time.sleep(0.02)
    return "another process"


def _tree_holds(folder: Path, artifact: Artifact) -> bool:
    """Whether `folder` has these files, all of these, unaltered since they were placed."""
    if not folder.is_dir():
        return False
    present = {(Path(inside) / name).relative_to(folder).as_posix() for inside, _, names in os.walk(folder) for name in names}
    if present != set(artifact.files):
        return False
    shown = ((folder / name).lstat() for name in artifact.files)
    sizes = (file.size for file in artifact.files.values())
    return all(
        stat.S_ISREG(one.st_mode) and one.st_size == size and one.st_mtime_ns == BLOB_TIME_NS
        for one, size in zip(shown, sizes, strict=True)
    )


def _place(blob: Path, target: Path, file: File) -> None:
    """A hard link, or a copy where that cannot be: another file system, or a blob whose file belongs to somebody else."""
    if not blob.is_symlink():
        try:
            os.link(blob, target)
            return
        except OSError as error:
            if error.errno not in NO_HARD_LINK:
                raise
    shutil.copyfile(blob, target)
    if digests.sha256(target) != file.sha256:
        raise BuildError(str(blob.resolve()), "changed while it was being copied", "run the same command again")
    target.chmod(0o444)
    os.utime(target, ns=(BLOB_TIME_NS, BLOB_TIME_NS))
    disk.sync_file(target)


def _remove(path: Path) -> int:
    """Removes a file or a folder; returns the bytes that came free (a file with another name stays)."""
    if path.is_dir() and not path.is_symlink():
        freed = sum(_remove(inside) for inside in sorted(path.iterdir()))
        path.rmdir()
        return freed
    shown = path.lstat()
    path.unlink()
    return shown.st_size if shown.st_nlink == 1 and stat.S_ISREG(shown.st_mode) else 0
