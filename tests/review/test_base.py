"""A git ref as a workspace: what it shows, what it leaves alone, and what it says where there is none."""

from __future__ import annotations

import hashlib
import os
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import runs
import scripted
from scripted import Team, git

from buildsys.errors import BuildError
from buildsys.lock import Lock
from buildsys.locking import Locks
from buildsys.review import base
from buildsys.workspace import Workspace

RECIPE = scripted.RECIPE.format(name="one", says="x", base="plain", model="llama", dataset=scripted.LOCAL)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository with one recipe, which is nothing that could be planned."""
    folder = tmp_path / "deep" / "repository"
    for name, said in {"bases/plain.yaml": scripted.BASES["plain"], "team/one.yaml": RECIPE, "text/train.txt": "words\n"}.items():
        path = folder / "recipes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(said)
    (folder / "data").mkdir()
    (folder / "data" / "large.bin").write_text("large")
    (folder / ".gitignore").write_text("artifacts/\nmodels/\n")
    git(folder, "init", "-q", "-b", "main")
    scripted.commit(folder, "one")
    return folder


def state(folder: Path) -> dict[str, str]:
    """Everything in the repository but the store, .git included."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "artifacts" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def opened(folder: Path, ref: str = "main") -> AbstractContextManager[base.Base]:
    return base.at(Workspace(folder), ref, folder / "artifacts" / ".store")


def test_it_shows_the_ref_and_leaves_the_work_tree_and_the_index_alone(small: Path) -> None:
    runs.edit(small / "recipes" / "team" / "one.yaml", "samples: 4\n  seqlen: 32\ntarget", "samples: 5\n  seqlen: 32\ntarget")
    (small / "recipes" / "team" / "two.yaml").write_text(RECIPE)
    (small / "recipes" / "text" / "train.txt").unlink()
    git(small, "rm", "-q", "--cached", "data/large.bin")
    before = state(small)
    with opened(small) as old:
        assert list(old.workspace.names()) == ["one"], "a recipe that git does not hold is new"
        recipe = old.workspace.load("one")
        assert recipe.calibration.samples == 4 and recipe.at() == "recipes/team/one.yaml:1"
        assert (old.workspace.root / "recipes" / "text" / "train.txt").read_text() == "words\n"
        assert (old.workspace.root / "data" / "large.bin").read_text() == "large"
        assert Workspace(small).load("one").calibration.samples == 5
        place = old.workspace.root
    assert not place.exists() and state(small) == before
    assert not list((small / "artifacts" / ".store").iterdir())


def test_what_does_not_differ_is_a_link(small: Path) -> None:
    (small / "recipes" / "models" / "llama").mkdir(parents=True)
    (small / "recipes" / "models" / "llama" / "config.json").write_text("{}")
    with opened(small) as old:
        root = old.workspace.root
        assert (root / "data").is_symlink() and (root / "recipes" / "team" / "one.yaml").is_symlink()
        assert (root / "recipes" / "models" / "llama" / "config.json").read_text() == "{}", "git does not hold it: it is as it is now"


def test_a_lock_that_did_not_change_is_read_once(small: Path) -> None:
    folder = small / "recipes" / "team"
    demo = (runs.ROOT / "recipes" / "demo" / "demo.lock").read_text()
    for stem in ("same", "moved"):
        (folder / f"{stem}.lock").write_text(Lock(recipes={stem: Lock.read(runs.ROOT / "recipes/demo/demo.lock").recipes["demo"]}).text())
    scripted.commit(small, "locked")
    (folder / "moved.lock").write_text(demo)  # another recipe's
    (folder / "new.lock").write_text(demo)
    now = Locks(small)
    with opened(small) as old:
        then, place = base.SharedLocks(old, now), old.workspace.root / "recipes" / "team"
        same = then.file(place / "same.lock")
        assert same is not None and same is now.file(folder / "same.lock")
        assert then.file(place / "moved.lock") == Lock(recipes={"moved": same.recipes["same"]})
        assert then.file(place / "new.lock") is None, "git does not hold it"
        with pytest.raises(BuildError, match="is the lock of 'demo'"):
            now.file(folder / "moved.lock")


def test_a_lock_that_is_a_link_is_the_one_that_it_led_to(small: Path) -> None:
    kept, link = small / "locks" / "one.lock", small / "recipes" / "team" / "one.lock"
    kept.parent.mkdir()
    then = Lock(recipes={"one": Lock.read(runs.ROOT / "recipes/demo/demo.lock").recipes["demo"]})
    kept.write_text(then.text())
    link.symlink_to("../../locks/one.lock")
    scripted.commit(small, "locked elsewhere")
    kept.write_text(Lock(recipes={"one": then.recipes["one"].model_copy(update={"tokens": {}})}).text())
    with opened(small, "HEAD") as old:
        assert base.SharedLocks(old, Locks(small)).file(old.workspace.root / "recipes" / "team" / "one.lock") == then


def test_it_is_compared_with_where_the_branch_left(small: Path) -> None:
    git(small, "switch", "-q", "-c", "change")
    scripted.commit(small, "mine")
    git(small, "switch", "-q", "main")
    (small / "recipes" / "team" / "theirs.yaml").write_text(RECIPE)
    theirs = scripted.commit(small, "theirs")
    git(small, "switch", "-q", "change")
    with opened(small) as old:
        assert old.commit != theirs and list(old.workspace.names()) == ["one"]


def test_a_link_in_git_leads_where_it_led(small: Path) -> None:
    link = small / "recipes" / "text" / "link.txt"
    link.symlink_to("train.txt")
    scripted.commit(small, "a link")
    link.unlink()
    (small / "recipes" / "text" / "train.txt").write_text("other words\n")
    with opened(small, "HEAD") as old:
        there = old.workspace.root / "recipes" / "text" / "link.txt"
        assert os.readlink(there) == "train.txt" and there.read_text() == "words\n"


def test_a_pointer_of_git_lfs_is_what_lfs_has_of_it(small: Path) -> None:
    content = b"weights " * 100
    oid = hashlib.sha256(content).hexdigest()
    pointer = small / "recipes" / "text" / "weights.safetensors"
    pointer.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n")
    scripted.commit(small, "a pointer")
    said = pointer.read_bytes()
    pointer.write_text("changed since")
    with opened(small, "HEAD") as old:
        assert (old.workspace.root / "recipes" / "text" / "weights.safetensors").read_bytes() == said
    kept = small / ".git" / "lfs" / "objects" / oid[:2] / oid[2:4] / oid
    kept.parent.mkdir(parents=True)
    kept.write_bytes(content)
    with opened(small, "HEAD") as old:
        assert (old.workspace.root / "recipes" / "text" / "weights.safetensors").read_bytes() == content


def test_paths_out_of_the_workspace_lead_where_they_led(small: Path) -> None:
    beside = small.parent / "models"
    beside.mkdir()
    (beside / "here.txt").write_text("beside")
    runs.edit(small / "recipes" / "team" / "one.yaml", "{path: ../models/llama}", "{path: ../../../models, outside: true}")
    scripted.commit(small, "outside")
    with opened(small) as old:
        recipe = old.workspace.load("one")
        old.reach(recipe)
        assert (recipe.folder("source", "local") / "../../../models/here.txt").resolve().read_text() == "beside"


def test_a_workspace_may_be_a_part_of_its_repository(small: Path) -> None:
    git(small.parent, "init", "-q", "-b", "main")
    (small / ".git").rename(small.parent / "gone")
    scripted.commit(small.parent, "all")
    runs.edit(small / "recipes" / "bases" / "plain.yaml", "bits: 4", "bits: 8")
    with opened(small) as old:
        assert old.changed == {"recipes/bases/plain.yaml"} and old.workspace.load("one").quantization.bits == 4


@pytest.mark.parametrize(
    ("ref", "said", "fix"),
    [
        ("nowhere", "names no commit", "git branch -a"),
        ("origin/nowhere", "names no commit", "git fetch origin nowhere"),
        ("--all", "names no commit", "git branch"),
        ("HEAD:recipes", "names no commit", "git branch"),
    ],
)
def test_a_ref_that_is_none(ref: str, said: str, fix: str, small: Path) -> None:
    git(small, "remote", "add", "origin", str(small))
    with pytest.raises(BuildError) as refused, opened(small, ref):
        pass
    assert refused.value.where == f"base={ref}" and said in refused.value.what and fix in refused.value.fix


def test_a_shallow_clone_says_how_to_get_more(small: Path, tmp_path: Path) -> None:
    first = git(small, "rev-parse", "HEAD")
    scripted.commit(small, "two")
    git(tmp_path, "clone", "-q", "--depth=1", small.as_uri(), "shallow")
    with pytest.raises(BuildError, match="shallow") as refused, opened(tmp_path / "shallow", first):
        pass
    assert "--unshallow" in refused.value.fix


def test_no_repository(team: Team, tmp_path: Path) -> None:
    folder = runs.empty(tmp_path / "workspace")
    ran = team.diff(folder=folder)
    assert ran.status == 1 and "no git repository" in ran.err and "fix: git init" in ran.err and "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("arguments", "said"), [(("diff",), "base=REF"), (("diff", "base="), "is empty"), (("diff", "base=main", "format=html"), "format=html")]
)
def test_a_line_that_says_too_little(arguments: tuple[str, ...], said: str, team: Team) -> None:
    ran = team.doit(*arguments)
    assert ran.status == 1 and said in ran.err and "fix:" in ran.err and "Traceback" not in ran.err
