"""What is told of a build is what its facts hold."""

from __future__ import annotations

import dataclasses
import math

import pytest

from buildsys.measurement import Verdict
from buildsys.release.facts import Facts
from buildsys.report import sections
from buildsys.report.view import View

Shown = tuple[Facts, View]


def verdicts(*states: str) -> list[Verdict]:
    return [Verdict(f"check{at}", state, "", "") for at, state in enumerate(states)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("states", "state", "line"),
    [
        ((), "open", "No gates: nothing was held to a limit."),
        (("passed",), "passed", "Passed: the one gate holds."),
        (("passed", "passed"), "passed", "Passed: all 2 gates hold."),
        (("passed", "skipped"), "skipped", "Not verified: 1 of 2 gates could not run here (check1)."),
        (("failed", "skipped", "failed"), "failed", "Failed: 2 of 3 gates do not hold (check0, check2)."),
    ],
)
def test_a_verdict_in_a_line(states: tuple[str, ...], state: str, line: str) -> None:
    assert sections.state_of(verdicts(*states)) == state
    assert sections.in_a_line(verdicts(*states)) == line


def test_rows_agree_with_the_judge(shown: Shown) -> None:
    facts, _ = shown
    judged = [(verdict.check, verdict.state) for verdict in facts.verdicts]
    told = [(row.check, row.state) for row in sections.rows(facts) for _ in row.bounds]
    assert sorted(judged) == sorted(told) and len(told) >= 6
    kl = sections.row_of(facts, "kl", "kl")
    assert kl is not None and kl.limits == "at most 0.12" and kl.state == "passed"
    lower = dataclasses.replace(kl, bounds=((kl.bounds[0][0], kl.one.value),))
    assert lower.state == "failed", "the upper end of the interval is above the value"
    assert sections.row_of(facts, "kl", "absent") is None


def test_sizes_are_those_of_the_files(shown: Shown) -> None:
    facts, _ = shown
    sizes = sections.sizes(facts)
    assert sizes.artifact_bytes == pytest.approx(facts.artifact.size)
    assert sizes.source_bytes == pytest.approx(sections.fetched(facts).output.size)
    # The demo's linears hold 4.25 bits for 16, and its embeddings stay as they are.
    assert sizes.source["attention"] / sizes.artifact["attention"] == pytest.approx(16 / 4.16, rel=0.02)
    assert sizes.source["embeddings"] == pytest.approx(sizes.artifact["embeddings"], rel=0.01)


def test_errors_by_role_are_all_errors(shown: Shown, large: Shown) -> None:
    facts, _ = shown
    assert sorted(error for row in sections.roles(facts).values() for error in row if error is not None) == sorted(
        facts.layer_errors.values()
    )
    assert list(sections.roles(facts)) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert sections.worst(facts, 1) == [max(facts.layer_errors.items(), key=lambda item: item[1])]
    left = sections.roles(large[0])
    assert left["gate"][79] is None and left["q"][79] is not None
    assert not any(math.isnan(error) for _, error in sections.worst(large[0], 1000))


def test_memory_of_both_models(shown: Shown, plain: Shown) -> None:
    memory = sections.memory(shown[0])
    assert memory is not None and sections.memory(plain[0]) is None
    assert memory.artifact is shown[0].plan.serving
    assert memory.source.weights_bytes > 1.8 * memory.artifact.weights_bytes
    held = sum(part.value for part in memory.parts(memory.artifact))
    assert memory.artifact.memory_bytes - held == memory.artifact.spare_bytes
    assert [(first.name, second.name) for first, second in memory.pairs] == [(name, name) for name in sections.MEMORY_CSS]


def test_names(shown: Shown, plain: Shown) -> None:
    recipe = shown[0].plan.recipe
    assert sections.source_name(recipe) == "model (local)"
    assert sections.scheme_name(recipe) == "4-bit g128 asymmetric, awq + gptq"
    assert (sections.target_name(recipe), sections.target_name(plain[0].plan.recipe)) == ("t4", "none named")
    assert recipe.target is not None
    two = recipe.model_copy(update={"target": recipe.target.model_copy(update={"count": 2})})
    assert sections.target_name(two) == "2 x t4"


def test_provenance(shown: Shown, bare: Shown) -> None:
    found = {name: sha256 for _, name, _, sha256 in sections.inputs(shown[0])}
    assert set(found) >= {"config.json", "model.safetensors"} and all(len(sha256) == 64 for sha256 in found.values())
    assert {"buildsys", "python", "torch"} <= set(sections.versions(shown[0]))
    assert sections.machines(bare[0]) == ["not recorded"] and sections.versions(bare[0]) == {}
