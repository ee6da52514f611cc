"""Any dataset: files chosen as the hub chooses them, from the hub and from a copy of it; no script is ever run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hubserver import HubServer
from huggingface_hub import snapshot_download
from pydantic import ValidationError

from buildsys.datasets import hub_dataset
from buildsys.datasets.hub_dataset import Knobs
from buildsys.errors import BuildError
from tests.datasets import places

REPO = "me/poems"
ROWS = [{"body": f"poem {number}" if number != 3 else " ", "id": number} for number in range(8)]
CARD = b"---\nconfigs:\n- config_name: short\n  data_files: [{split: train, path: short/*.parquet}, {split: test, path: held/*}]\n---\n"
FILES = {
    "README.md": CARD,
    "short/b.parquet": places.table(ROWS[4:]),
    "short/a.parquet": places.table(ROWS[:4]),
    "held/x.jsonl.zst": places.zst(places.lines(ROWS[:2])),
    "make.py": b"raise SystemExit('it ran')",
}
POEMS = [row["body"] for row in ROWS if row["id"] != 3]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as running:
        running.use(monkeypatch, tmp_path / "cache")
        yield running


def read(knobs: Knobs, folder: Path) -> list[str]:
    found = hub_dataset.locate(knobs, folder, folder / "home")
    files = hub_dataset.fetch(found.how, found.sha256, lambda *_: None) if found.how else found.files
    return list(hub_dataset.texts(Knobs.model_construct(**knobs.model_dump(exclude=set(hub_dataset.PLACES))), files))


@pytest.mark.parametrize("there", [True, False], ids=["hub", "here"])
def test_documents_of_a_split(there: bool, hub: HubServer, tmp_path: Path) -> None:
    hub.add("dataset", REPO, FILES)
    places.write(tmp_path / "copy", FILES)
    place = {"repo": REPO} if there else {"path": "copy"}
    assert read(Knobs(**place, field="body"), tmp_path) == POEMS
    assert read(Knobs(**place, field="body", limit=2), tmp_path) == POEMS[:2]
    assert read(Knobs(**place, field="body", split="test"), tmp_path) == POEMS[:2]
    assert read(Knobs(**place, field="body", config="short"), tmp_path) == POEMS
    assert read(Knobs(**place, field="body", files=("held/*", "short/b*")), tmp_path) == POEMS[:2] + POEMS[3:]


def test_a_revision_is_heard(hub: HubServer, tmp_path: Path) -> None:
    first = hub.add("dataset", REPO, {"train.txt": b"one\ntwo\n"})
    hub.add("dataset", REPO, {"train.txt": b"three\n"})
    assert read(Knobs(repo=REPO, revision=first), tmp_path) == ["one", "two"]
    assert read(Knobs(repo=REPO), tmp_path) == ["three"]
    hub.add("dataset", REPO, {"default/train/0000.parquet": places.table([{"text": "four"}])}, branch="refs/convert/parquet")
    assert read(Knobs(repo=REPO, revision="refs/convert/parquet"), tmp_path) == ["four"]


def test_a_copy_goes_before_the_hub(tmp_path: Path) -> None:
    """One line in a recipe that extends another's makes it work without a network."""
    places.write(tmp_path / "copy", {"train.txt": b"here\n"})
    assert read(Knobs(repo="no/where", path="copy"), tmp_path) == ["here"]


@pytest.mark.parametrize(
    ("knobs", "what"),
    [
        ({"field": "text"}, "has no field 'text'; its fields: body, id"),
        ({"field": "id"}, "field 'id' is a number"),
        ({"split": "dev"}, "no split dev; its splits: test, train"),
        ({"config": "long"}, "no config long; it has short"),
        ({"files": ("nothing*",)}, "files: nothing* matches no file"),
        ({"files": ("make.py",)}, "files: make.py is none of"),
        ({"files": ("**",)}, "is none of"),
    ],
)
def test_what_does_not_fit_lists_what_is_there(knobs: dict[str, object], what: str, tmp_path: Path) -> None:
    places.write(tmp_path / "copy", FILES)
    with pytest.raises(BuildError) as caught:
        read(Knobs(path="copy", **knobs), tmp_path)
    assert what in caught.value.what and caught.value.fix


def test_a_card_without_end_is_refused(tmp_path: Path) -> None:
    places.write(tmp_path / "copy", {**FILES, "README.md": CARD + b"x" * (5 << 20)})
    with pytest.raises(BuildError, match="longer than 4 MiB"):
        read(Knobs(path="copy", field="body"), tmp_path)
    places.write(tmp_path / "copy", {"README.md": CARD + "café".encode("latin1")})
    assert read(Knobs(path="copy", field="body"), tmp_path) == POEMS


def test_a_loading_script_is_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.add("dataset", REPO, {"poems.py": b"raise SystemExit('it ran')", "train.txt": b"not what the script makes of it"})
    with pytest.raises(BuildError) as caught:
        read(Knobs(repo=REPO), tmp_path)
    assert caught.value.where == REPO and "a script, poems.py" in caught.value.what and "refs/convert/parquet" in caught.value.fix
    assert read(Knobs(repo=REPO, files=("train.txt",)), tmp_path) == ["not what the script makes of it"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def leave() -> None:
        from huggingface_hub import constants

        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    return leave


def test_offline_half_a_dataset_is_no_dataset(hub: HubServer, tmp_path: Path, offline: Callable[[], None]) -> None:
    """The shared cache has one file of two, and no README that would tell: the names that are there look like a split."""
    commit = hub.add("dataset", REPO, FILES)
    read(Knobs(repo=REPO, revision=commit, field="body", files=("held/*",)), tmp_path)
    offline()
    with pytest.raises(BuildError, match=r"offline, and nothing tells.*\n.*path:"):
        hub_dataset.locate(Knobs(repo=REPO, revision=commit, files=("held/*",)), tmp_path, tmp_path / "new home")
    with pytest.raises(BuildError) as caught:
        hub_dataset.locate(Knobs(repo=REPO, revision=commit, split="validation"), tmp_path, tmp_path / "new home")
    assert f"hf download {REPO} --repo-type dataset --revision {commit}" in caught.value.fix
    named = Knobs(repo=REPO, revision=commit, field="body", files=("held/x.jsonl.zst",))
    assert set(hub_dataset.locate(named, tmp_path, tmp_path / "new home").sha256) == {"held/x.jsonl.zst"}


def test_offline_without_the_card_nothing_tells_what_a_split_is(hub: HubServer, tmp_path: Path, offline: Callable[[], None]) -> None:
    """By its name the file is train; by the card, which is not here, it is not."""
    card = b"---\nconfigs:\n- config_name: default\n  data_files: [{split: train, path: real.jsonl}]\n---\n"
    hub.add("dataset", REPO, {"README.md": card, "train-00000-of-00001.jsonl": b'{"text": "no"}', "real.jsonl": b'{"text": "yes"}'})
    snapshot_download(REPO, repo_type="dataset", endpoint=hub.url, cache_dir=tmp_path / "cache/hub", allow_patterns="train*")
    offline()
    with pytest.raises(BuildError, match=r"no README\.md") as caught:
        hub_dataset.locate(Knobs(repo=REPO), tmp_path, tmp_path / "home")
    assert "plan once while online" in caught.value.fix and "files:" in caught.value.fix
    named = Knobs(repo=REPO, files=("train-00000-of-00001.jsonl",))
    assert hub_dataset.locate(named, tmp_path, tmp_path / "home").names


def test_knobs_that_name_nothing() -> None:
    for wrong in (
        {},
        {"repo": "poems"},
        {"repo": "../x/y"},
        {"repo": "a/b/c"},
        {"repo": REPO, "revision": "a b"},
        {"repo": REPO, "limit": 0},
    ):
        with pytest.raises(ValidationError):
            Knobs(**wrong)
    assert hub_dataset.floats(Knobs(repo=REPO)) == "revision: main may move"
    assert hub_dataset.floats(Knobs(repo=REPO, revision="0" * 40)) == hub_dataset.floats(Knobs(path="x")) == ""


def test_planning_loads_neither_pyarrow_nor_the_hubs_client(tmp_path: Path) -> None:
    places.write(tmp_path / "copy", FILES)
    code = f"""
import sys
from pathlib import Path
from buildsys.slots import modules
modules("datasets")
from buildsys.datasets import hub_dataset as h
h.locate(h.Knobs(path="copy", field="body"), Path({str(tmp_path)!r}), Path({str(tmp_path)!r}))
print([name for name in ("pyarrow", "huggingface_hub", "torch", "jinja2", "datasets") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
