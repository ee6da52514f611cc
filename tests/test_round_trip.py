"""From a hub, through a build, to a hub and back: real `doit`, the real client, real HTTP, and the faults that a hub can show."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import models
import pytest
import runs
from hubserver import HubServer, User

pytestmark = pytest.mark.slow

CANARY = "hf_canaryCANARYcanaryCANARYcanaryCANARY"
SOURCE, TEXT, TARGET = "some-org/demo", "some-org/text", "my-org/demo-4bit"
RECIPE = f"""\
schema: 1
extends: ../bases/w4a16.yaml
source: {{hf_hub: {{repo: {SOURCE}}}}}
calibration: {{dataset: {{hub_dataset: {{repo: {TEXT}, split: train}}}}, samples: 4, seqlen: 64}}
verify: {{text: {{hub_dataset: {{repo: {TEXT}, split: test}}}}, samples: 4, seqlen: 64, kl: {{max_nats: 9.0}}}}
publish: {{hf_hub: {{repo: {TARGET}}}}}
report: {{prompts: [It was the best of times], max_new_tokens: 4}}
"""


@dataclass
class Place:
    """A workspace, and the hub that it knows."""

    hub: HubServer
    workspace: Path
    home: Path

    def doit(self, *arguments: str, home: str = "home") -> runs.Ran:
        told = self.hub.environment(CANARY)
        return runs.doit(self.workspace, *arguments, **told, HF_HOME=str(self.home / home), HF_HUB_CACHE=str(self.home / home / "hub"))

    def posted(self, what: str) -> list[str]:
        return [one.path for one in self.hub.log if one.method == "POST" and what in one.path and one.status == 200]

    def published(self) -> dict[str, str]:
        """What the hub holds, as name -> sha256."""
        held = self.hub.repo("model", TARGET).commit("main").files
        return {name: hashlib.sha256(blob.content).hexdigest() for name, blob in held.items() if name != ".gitattributes"}

    def built(self) -> dict[str, str]:
        tree = self.workspace / "artifacts" / "trip"
        files = [path for path in tree.resolve().rglob("*") if path.is_file()]
        return {path.relative_to(tree.resolve()).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with HubServer() as hub:
        hub.tokens[CANARY] = User("me", ("my-org",))
        model = runs.ROOT / "recipes" / "demo" / "model"
        hub.add("model", SOURCE, {path.name: path.read_bytes() for path in model.iterdir()})
        train, test = (models.prose(600, seed).encode() for seed in (1, 2))
        hub.add("dataset", TEXT, {"train.txt": train, "test.txt": test})
        workspace = runs.demo(tmp_path / "workspace")
        (workspace / "recipes" / "trip").mkdir()
        (workspace / "recipes" / "trip" / "trip.yaml").write_text(RECIPE)
        yield Place(hub, workspace, tmp_path)


def test_what_is_fetched_back_is_what_was_built_and_one_commit_made_it(place: Place) -> None:
    ran = place.doit("publish", "recipe=trip").fine()
    assert "read back" in ran.out and place.built() == place.published()
    assert len(place.posted(f"/{TARGET}/commit/")) == 1
    again = place.doit("publish", "recipe=trip").fine()
    assert "all cached" in again.out and len(place.posted(f"/{TARGET}/commit/")) == 1, "nothing new, no commit"
    checked = place.doit("verify", f"repo={TARGET}", home="elsewhere").fine()
    assert "nothing wrong was found" in checked.out
    local = place.workspace / "recipes" / "local" / "local.yaml"
    local.parent.mkdir()
    local.write_text(RECIPE.replace(f"{{hf_hub: {{repo: {SOURCE}}}}}", "{local: {path: ../demo/model}}"))
    assert "all cached" in place.doit("build", "recipe=local").fine().out, "the same files from a disk are the same steps"


def test_a_dry_run_sends_nothing_and_going_back_builds_nothing(place: Place) -> None:
    early = place.doit("publish", "recipe=trip", "dry=1")
    assert early.status == 1 and "is not built" in early.err and "doit build recipe=trip" in early.err
    place.doit("build", "recipe=trip").fine()
    before = len(place.hub.log)
    dry = place.doit("publish", "recipe=trip", "dry=1").fine()
    assert "nothing is sent" in dry.out and "model.safetensors" in dry.out
    assert {one.method for one in place.hub.log[before:]} <= {"GET", "HEAD"} and ("model", TARGET) not in place.hub.repos
    place.doit("publish", "recipe=trip").fine()
    first, tag = place.published(), next(ref for ref in place.hub.repo("model", TARGET).refs if "sha256-" in ref)
    runs.edit(place.workspace / "recipes" / "trip" / "trip.yaml", "max_nats: 9.0", "max_nats: 8.0")
    place.doit("publish", "recipe=trip").fine()
    assert place.published() != first
    back = place.doit("publish", "recipe=trip", "to=" + tag.rpartition("sha256-")[2]).fine()
    assert "rolled back" in back.out and place.published() == first


def test_no_token_is_left_anywhere(place: Place) -> None:
    place.hub.fail(r"/commit/", method="POST", status=403, times=9)
    refused = place.doit("publish", "recipe=trip")
    assert refused.status == 1 and "recipes/trip/trip.yaml:6" in refused.err and "fix:" in refused.err
    assert not place.published() if ("model", TARGET) in place.hub.repos else True, "nothing is half-published"
    reported = place.doit("report", "recipe=trip").fine()
    assert any("authorization" in one.headers and CANARY in one.headers["authorization"] for one in place.hub.log), "it was used"
    assert CANARY not in refused.out + refused.err + reported.out + reported.err
    for path in (*place.workspace.rglob("*"), *(place.home / "home").rglob("*")):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("fault", "mended"),
    [
        ({"path": r"/resolve/.*model\.safetensors", "status": 500, "times": 2}, True),
        ({"path": r"/cdn|/resolve/.*model\.safetensors", "method": "GET", "cut": True, "skip": 1}, True),
        ({"path": rf"/api/models/{SOURCE}", "status": 401, "times": 9}, False),
    ],
    ids=["500s", "a cut", "401"],
)
def test_faults_on_the_way_in(place: Place, fault: dict[str, object], mended: bool) -> None:
    place.hub.fail(**fault)  # type: ignore[arg-type]
    ran = place.doit("build", "recipe=trip")
    assert (ran.status == 0) is mended and "Traceback" not in ran.out + ran.err
    if not mended:
        assert "recipes/trip/trip.yaml:3" in ran.err and "fix:" in ran.err


def test_a_wrong_file_is_refused_and_a_right_one_taken_by_the_same_command(place: Place) -> None:
    right = (runs.ROOT / "recipes" / "demo" / "model" / "tokenizer.json").read_bytes()
    wrong = right.replace(b'"a"', b'"b"', 1)
    assert len(wrong) == len(right) != 0 and wrong != right
    place.hub.fail(r"tokenizer\.json", method="GET", body=wrong, times=9)
    refused = place.doit("build", "recipe=trip")
    assert refused.status == 1 and "tokenizer.json" in refused.err and not (place.workspace / "artifacts" / "trip").exists()
    place.hub.faults.clear()
    place.doit("build", "recipe=trip").fine()
