"""Provenance: complete, deterministic, valid by in-toto's own reader, silent about the machine's owner; SHA256SUMS read as written."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import released
import runs
import yaml
from hypothesis import given
from hypothesis import strategies as st

from buildsys.errors import BuildError
from buildsys.measurement import Measurement, Verdict
from buildsys.release import provenance
from buildsys.release.facts import Facts, Ran
from buildsys.release.provenance import INPUTS, MEASUREMENTS, RECIPE, STATEMENT, documents, parse_sums, sums, unlistable
from buildsys.step import Step
from buildsys.store import Store
from buildsys.workspace import Workspace

SHA = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def facts(tiny: Path) -> Facts:
    return released.facts(tiny)


@pytest.fixture(scope="module")
def said(facts: Facts) -> dict[str, Any]:
    made = documents(facts, {"config.json": SHA}, {"config.json": 3})
    assert set(made) == {RECIPE, MEASUREMENTS, INPUTS, STATEMENT}
    return {name: yaml.safe_load(raw) if name == RECIPE else json.loads(raw) for name, raw in made.items()}


def test_equal_builds_say_equal_things(facts: Facts, tiny: Path) -> None:
    again = released.facts(tiny)
    assert documents(facts, {"a": SHA}, {"a": 1}) == documents(again, {"a": SHA}, {"a": 1})


def test_json_has_one_spelling(facts: Facts) -> None:
    for name, raw in documents(facts, {"a": SHA}, {"a": 1}).items():
        if name != RECIPE:
            assert raw == json.dumps(json.loads(raw), indent=1, sort_keys=True).encode() + b"\n"


def test_every_source_and_text_file_is_told(said: dict[str, Any], tiny: Path) -> None:
    inputs = said[INPUTS]
    model = tiny / "recipes" / "model"
    there = {path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size} for path in model.iterdir()}
    assert inputs["source"] == {"files": there, "from": {"place": "local"}}
    for role, file in (("calibration", "calibration.txt"), ("verify", "verify.txt")):
        raw = (tiny / "recipes" / file).read_bytes()
        ((name, held),) = inputs[role]["text"]["files"].items()
        assert name.endswith(file) and held == {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
        assert inputs[role]["windows"]["samples"] == 4 and len(inputs[role]["windows"]["digest"]) == 64
    assert inputs["calibration"]["windows"]["digest"] != inputs["verify"]["windows"]["digest"]


def test_every_step_is_told_with_its_tools_and_time(said: dict[str, Any], facts: Facts) -> None:
    steps = {one["key"]: one for one in said[INPUTS]["steps"]}
    assert list(steps) == [ran.output.key for ran in facts.steps]
    for ran in facts.steps:
        told = steps[ran.output.key]
        assert told["output"] == ran.output.digest() and told["seconds"] == ran.built["seconds"]
        assert told["machine"]["device"] == "cpu" and "python" in told["versions"]
    assert said[INPUTS]["tools"]["torch"].startswith("2.")


def test_measurements_carry_interval_limit_and_verdict(said: dict[str, Any]) -> None:
    checks = said[MEASUREMENTS]["checks"]
    (kl,) = checks["kl"]["measurements"]
    assert kl["low"] < kl["value"] < kl["high"] and kl["unit"] == "nats"
    assert kl["limits"] == [{"set_by": "recipe: verify.kl.max_nats", "side": "max", "bound": 9.0, "verdict": "passed"}]
    assert [verdict["state"] for verdict in checks["kl"]["verdicts"]] == ["passed"]
    assert checks["lint"]["measurements"][0]["limits"][0]["set_by"] == "check lint"
    assert checks["perplexity"]["verdicts"] == [] and not checks["perplexity"]["measurements"][0]["limits"], "reported, not gated"


def test_failures_skips_and_no_numbers_are_said(facts: Facts) -> None:
    """A measurement that is no number, one beyond its limit, and a check that did not run: none of them reads as passed."""
    bad = Measurement.exact("kl", float("nan"), "nats")
    skipped = Verdict("serve", "skipped", "no CUDA device", "recipes/tiny.yaml:9")
    changed = replace(facts, measurements={**facts.measurements, "kl": (bad,)}, verdicts=(skipped,))
    checks = json.loads(documents(changed, {}, {})[MEASUREMENTS])["checks"]
    assert checks["kl"]["measurements"][0]["value"] == "nan"
    assert checks["kl"]["measurements"][0]["limits"][0]["verdict"] == "failed"
    assert checks["serve"] == {"measurements": [], "verdicts": [{"state": "skipped", "text": "no CUDA device"}]}


def test_statement_is_one_by_in_totos_own_reader(facts: Facts) -> None:
    from google.protobuf import json_format
    from in_toto_attestation.v1 import statement, statement_pb2

    raw = documents(facts, {"config.json": SHA, "deploy/x.yaml": SHA}, {"config.json": 3, "deploy/x.yaml": 4})[STATEMENT]
    read = json_format.Parse(raw, statement_pb2.Statement())
    statement.Statement.copy_from_pb(read).validate()
    assert read.predicate_type == "https://slsa.dev/provenance/v1"
    assert sorted(one.name for one in read.subject) == sorted(["config.json", "deploy/x.yaml", RECIPE, MEASUREMENTS, INPUTS])


def test_statement_has_what_slsa_asks_for(said: dict[str, Any], facts: Facts) -> None:
    """https://slsa.dev/spec/v1.0/provenance: the required fields, and no field that it does not know."""
    predicate = said[STATEMENT]["predicate"]
    definition, details = predicate["buildDefinition"], predicate["runDetails"]
    assert set(definition) == {"buildType", "externalParameters", "internalParameters", "resolvedDependencies"}
    assert set(details) == {"builder", "metadata"} and set(details["builder"]) == {"id", "version"}
    assert definition["buildType"].startswith("urn:") and details["builder"]["id"].startswith("urn:")
    assert definition["externalParameters"]["recipe"]["source"] == {"local": {"outside": False, "path": "model"}}
    assert set(details["metadata"]) == {"invocationId", "startedOn", "finishedOn"}
    assert details["metadata"]["startedOn"] <= details["metadata"]["finishedOn"] and details["metadata"]["finishedOn"].endswith("Z")
    named = {one["name"]: one["digest"]["sha256"] for one in definition["resolvedDependencies"]}
    source = facts.ran(next(need.step for need in facts.plan.artifact.needs if need.role == "source")).output.files
    assert {name.removeprefix("source/"): sha256 for name, sha256 in named.items() if name.startswith("source/")} == {
        name: file.sha256 for name, file in source.items()
    }
    assert len(named) == len(source) + 2


def test_subjects_hold_the_documents_as_they_are(facts: Facts) -> None:
    made = documents(facts, {"config.json": SHA}, {"config.json": 3})
    told = {one["name"]: one for one in json.loads(made[STATEMENT])["subject"]}
    for name in (RECIPE, MEASUREMENTS, INPUTS):
        assert told[name]["digest"]["sha256"] == hashlib.sha256(made[name]).hexdigest()
        assert told[name]["annotations"]["size"] == len(made[name])


def test_recipe_reads_again_as_the_same_recipe(facts: Facts, tiny: Path, tmp_path: Path) -> None:
    workspace = runs.copy(tiny, tmp_path / "workspace")
    (workspace / "recipes" / "tiny.yaml").write_bytes(documents(facts, {}, {})[RECIPE])
    assert Workspace(workspace).load("tiny").model_dump(exclude={"publish"}) == facts.plan.recipe.model_dump(exclude={"publish"})


def test_nothing_tells_whose_machine_it_was(facts: Facts, tiny: Path) -> None:
    text = b"\n".join(documents(facts, {"a": SHA}, {"a": 1}).values()).decode()
    secrets = [str(tiny), str(tiny.parent), str(Path.home()), socket.gethostname(), os.getcwd(), "/tmp/", "/home/", "artifacts"]
    assert not [secret for secret in secrets if len(secret) > 3 and secret in text]
    assert getpass.getuser() == "root" or getpass.getuser() not in text


def test_built_tells_only_what_is_known_to_be_harmless(facts: Facts) -> None:
    first = facts.steps[0]
    machine = {"os": "Linux x86_64", "cpu": "A CPU", "node": "secret-node"}
    told = {**first.built, "gpu": {"name": "H200", "cuda": "12.8"}, "machine": machine, "hostname": "secret-host", "user": "secret-user"}
    changed = replace(facts, steps=(Ran(first.step, replace(first.output, meta={"built": told})), *facts.steps[1:]))
    raw = documents(changed, {}, {})[INPUTS]
    found = json.loads(raw)["steps"][0]["machine"]
    assert (
        found == {"os": "Linux x86_64", "cpu": "A CPU", "device": "cpu", "gpu": {"name": "H200", "cuda": "12.8"}} and b"secret" not in raw
    )


def from_hub(facts: Facts, **hints: Any) -> dict[str, bytes]:
    """The documents of a build whose source came from elsewhere."""
    source = next(need.step for need in facts.plan.artifact.needs if need.role == "source")
    hinted = replace(source, hints=hints)
    needs = tuple(replace(need, step=hinted) if need.role == "source" else need for need in facts.plan.artifact.needs)
    plan = replace(facts.plan, artifact=replace(facts.plan.artifact, needs=needs))
    return documents(replace(facts, plan=plan, steps=_with(facts, hinted)), {}, {})


def test_a_hub_is_named_with_repository_and_commit(facts: Facts) -> None:
    commit = "9B8D9553846B" + "0" * 28
    how = {"hub": "hf_hub", "kind": "model", "repo": "org/name", "commit": commit, "endpoint": "https://user:token@mirror.example"}
    made = from_hub(facts, how=how, slot="sources", module="hf_hub")
    assert json.loads(made[INPUTS])["source"]["from"] == {"place": "hf_hub", "kind": "model", "repo": "org/name", "commit": commit}
    told = [one for one in json.loads(made[STATEMENT])["predicate"]["buildDefinition"]["resolvedDependencies"] if "uri" in one]
    assert {one["uri"] for one in told} == {f"pkg:huggingface/org/name@{commit.lower()}"}
    assert b"mirror" not in b"".join(made.values()) and b"token@" not in b"".join(made.values())


def test_other_hubs_are_named_as_far_as_they_tell(facts: Facts) -> None:
    made = from_hub(facts, how={"repo": "org/name", "revision": "v1", "sizes": {}}, slot="sources", module="modelscope")
    assert json.loads(made[INPUTS])["source"]["from"] == {"place": "modelscope", "repo": "org/name", "revision": "v1"}
    made = from_hub(facts, paths={}, module="hf_hub", pin="org/name at 9b8d9553846b")
    assert json.loads(made[INPUTS])["source"]["from"] == {"place": "hf_hub", "pin": "org/name at 9b8d9553846b"}


def test_the_fetch_that_ran_is_told_and_not_todays_plan(facts: Facts) -> None:
    """A branch that has moved on to a commit with the same files fetches nothing."""
    ran = {"how": {"hub": "hf_hub", "kind": "model", "repo": "org/name", "commit": "1" * 40}, "module": "hf_hub"}
    was = facts.source
    built = {**was.built, "hints": ran, "title": "org/name at 111111111111"}
    recorded = Ran(was.step, replace(was.output, meta={"built": built}))
    changed = replace(facts, steps=tuple(recorded if one == was else one for one in facts.steps))
    made = from_hub(changed, how={**ran["how"], "commit": "2" * 40}, slot="sources", module="hf_hub")
    assert json.loads(made[INPUTS])["source"]["from"]["commit"] == "1" * 40
    assert "org/name at 111111111111" in [step["title"] for step in json.loads(made[INPUTS])["steps"]]
    assert b"2" * 40 not in b"".join(made.values())


def _with(facts: Facts, hinted: Step) -> tuple[Ran, ...]:
    return tuple(Ran(hinted, ran.output) if ran.step == hinted else ran for ran in facts.steps)


# SHA256SUMS

NAMES = st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12), min_size=1, max_size=3).map("/".join)
FILES = st.dictionaries(NAMES.filter(lambda name: unlistable(name) is None), st.binary(min_size=32, max_size=32).map(bytes.hex))


@given(FILES)
def test_sums_read_as_written(files: dict[str, str]) -> None:
    raw = sums(files)
    assert parse_sums(raw, "SHA256SUMS") == files and sums(parse_sums(raw, "SHA256SUMS")) == raw


@given(st.binary(max_size=200))
def test_bytes_that_nobody_wrote_are_refused(raw: bytes) -> None:
    try:
        files = parse_sums(raw, "SHA256SUMS")
    except BuildError:
        return
    assert sums(files) == raw


@given(FILES.filter(bool), st.data())
def test_every_bit_of_sums_means_something(files: dict[str, str], data: st.DataObject) -> None:
    raw = bytearray(sums(files))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        assert parse_sums(bytes(raw), "SHA256SUMS") != files
    except BuildError as error:
        assert error.where.startswith("SHA256SUMS")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (f"{SHA}  a", "does not end with a line end"),
        (f"{SHA}  b\n{SHA}  a\n", "names are sorted"),
        (f"{SHA}  a\n{SHA}  a\n", "each there once"),
        (f"{SHA.upper()}  a\n", "is no line of 64"),
        (f"{SHA} *a\n", "is no line of 64"),
        (f"{SHA}  a\n\n", "is no line of 64"),
        (f"{SHA}  ../a\n", "no path below the folder"),
        (f"{SHA}  /etc/passwd\n", "no path below the folder"),
        (f"{SHA}  model.sig\n", "written last"),
        (f"{SHA}  a\\nb\n", "backslash"),
        (f"{SHA}  a\r\n", "cannot be printed"),
    ],
)
def test_other_spellings_are_refused(raw: str, said: str) -> None:
    with pytest.raises(BuildError, match=said) as caught:
        parse_sums(raw.encode(), "SHA256SUMS")
    assert caught.value.where.startswith("SHA256SUMS") and "download" in caught.value.fix


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(BuildError, match="not UTF-8 at byte 2"):
        parse_sums(b"ab\xff", "SHA256SUMS")


@pytest.mark.parametrize("name", ["../a", "a//b", "a\nb", "SHA256SUMS", "model.sig", "a\\b", "\udc80"])
def test_names_that_cannot_be_listed_are_refused(name: str) -> None:
    with pytest.raises(BuildError, match="cannot be released"):
        sums({name: SHA})


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="coreutils' sha256sum is not here")
def test_sha256sum_accepts_a_release_and_finds_a_change(tiny: Path, tmp_path: Path) -> None:
    folder = released.release(tiny, tmp_path / "release")
    assert subprocess.run(["sha256sum", "--strict", "-c", provenance.SUMS], cwd=folder, capture_output=True).returncode == 0
    ours = sorted(released.digests(folder).keys() - {provenance.SUMS})
    by = subprocess.run(["sha256sum", *ours], cwd=folder, capture_output=True, check=True).stdout
    assert (folder / provenance.SUMS).read_bytes() == by
    (folder / "config.json").write_bytes(b"{}")
    assert subprocess.run(["sha256sum", "--strict", "-c", provenance.SUMS], cwd=folder, capture_output=True).returncode == 1


def test_demo_says_it_too(demo: tuple[Path, runs.Ran]) -> None:
    """The shipped recipe: its calibration text is written by the model itself, and has no files."""
    workspace, _ = demo
    inputs = json.loads(documents(released.facts(workspace, "demo"), {}, {})[INPUTS])
    places = {role: inputs[role]["text"]["from"]["place"] for role in ("calibration", "verify")}
    assert set(places.values()) <= {"local", "written by the source model"} and Store(workspace / "artifacts").home.exists()
