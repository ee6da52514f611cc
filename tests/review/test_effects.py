"""Gates and measurements in so many words, and steps that are certain to be the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import scripted
from hypothesis import given
from hypothesis import strategies as st

from buildsys.recipe import Recipe
from buildsys.review import effects, words
from buildsys.review.effects import Taken
from buildsys.step import Need, Step
from buildsys.workspace import Workspace

RECIPE = scripted.RECIPE.format(name="one", says="x", base="w4", model="llama", dataset=scripted.LOCAL)


class Numbered(NamedTuple):
    """What a lock has of one measurement."""

    check: str
    name: str
    value: float
    unit: str
    low: float
    high: float


GATE = "  kl: {max_nats: 9.0}\n"


def recipe(folder: Path, verify: str) -> Recipe:
    for name, said in {"bases/w4.yaml": scripted.BASES["w4"], "team/one.yaml": RECIPE.replace(GATE, verify)}.items():
        path = folder / "recipes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(said)
    return Workspace(folder).load("one")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (GATE, GATE, []),
        (GATE, "  kl: {max_nats: 12.0}\n", ["kl.max_nats 9.0 -> 12.0: LOOSENED"]),
        (GATE, "  kl: {max_nats: 0.5}\n", ["kl.max_nats 9.0 -> 0.5: tightened"]),
        (GATE, "  kl: {}\n", ["kl.max_nats 9.0 -> gone: LOOSENED"]),
        (GATE, "", ["kl.max_nats 9.0 -> gone: LOOSENED"]),
        ("", GATE, ["kl.max_nats 9.0: added"]),
        ("  agreement: {min_share: 0.7}\n", "  agreement: {min_share: 0.6}\n", ["agreement.min_share 0.7 -> 0.6: LOOSENED"]),
        ("  agreement: {min_share: 0.7}\n", "  agreement: {min_share: 0.8}\n", ["agreement.min_share 0.7 -> 0.8: tightened"]),
        ("  memory: {}\n", "", ["memory checked -> gone: LOOSENED"]),
        ("", "  memory: {}\n", ["memory checked: added"]),
        ("  perplexity: {}\n", "", ["perplexity checked -> gone: gone"]),
        ("  serve: {required: always}\n", "  serve: {required: auto}\n", ["serve.required always -> auto: LOOSENED"]),
        ("  serve: {required: auto}\n", "  serve: {required: always}\n", ["serve.required auto -> always: tightened"]),
    ],
)
def test_gates_in_so_many_words(before: str, after: str, said: list[str], tmp_path: Path) -> None:
    old, new = recipe(tmp_path / "old", before), recipe(tmp_path / "new", after)
    assert [words.gate(gate) for gate in effects.gates(old, new)] == said


def taken(value: float, low: float, high: float, name: str = "kl", check: str = "kl", on: str = "a100-40gb", current: bool = True) -> Taken:
    return Taken((Numbered(check, name, value, "nats", low, high),), on, current)


@pytest.mark.parametrize(
    ("before", "after", "state"),
    [
        (taken(0.05, 0.04, 0.06), taken(0.05, 0.04, 0.06), "equal"),
        (taken(0.05, 0.04, 0.06), taken(0.055, 0.045, 0.065), "within noise"),
        (taken(0.05, 0.04, 0.06), taken(0.08, 0.07, 0.09), "worse"),
        (taken(0.08, 0.07, 0.09), taken(0.05, 0.04, 0.06), "better"),
        (taken(0.7, 0.7, 0.7, "share", "agreement"), taken(0.8, 0.8, 0.8, "share", "agreement"), "better"),
        (taken(1.0, 1.0, 1.0, "of_nobody", "of_nobody"), taken(2.0, 2.0, 2.0, "of_nobody", "of_nobody"), "moved"),
    ],
)
def test_better_worse_or_noise(before: Taken, after: Taken, state: str) -> None:
    (moved,) = effects.measurements(before, after)
    assert moved.state == state


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_what_got_better_gets_worse_on_the_way_back(one: list[float], other: list[float]) -> None:
    there, back = ((taken(ends[1], ends[0], ends[2])) for ends in (sorted(one), sorted(other)))
    states = [effects.measurements(*pair)[0].state for pair in ((there, back), (back, there))]
    opposite = {"better": "worse", "worse": "better"}
    assert states[1] == opposite.get(states[0], states[0])


def test_what_locks_cannot_tell_is_said() -> None:
    one = taken(0.05, 0.04, 0.06)
    assert effects.measured(None, None) == ""
    assert "no locked build" in effects.measured(None, one)
    assert "before this change" in effects.measured(one, taken(0.05, 0.04, 0.06, current=False))
    assert "not paired" in effects.measured(one, one) and "do not compare" in effects.measured(one, taken(0.05, 0.04, 0.06, on="h100"))


def test_a_step_is_kept_only_where_its_key_is_certain() -> None:
    def fetch(**files: str) -> Step:
        return Step("fetch", "source (local)", 1, {"files": files}, promises=files)

    def reader(of: Step, knob: int = 0, files: tuple[str, ...] = ("*.txt",)) -> Step:
        return Step("calibrate", "x", 1, {"knob": knob}, (Need("source", of, files),))

    def state(old: Step, new: Step) -> str:
        planned: Any = SimpleNamespace(steps=tuple(new.walk()), building=SimpleNamespace(seconds={}))
        changed, _ = effects.stepped(tuple(old.walk()), planned, {})
        return next((step.state for step in changed if step.kind == new.kind), "kept")

    one = fetch(**{"a.txt": "1", "README": "2"})
    assert state(reader(one), reader(fetch(**{"a.txt": "1", "README": "3"}))) == "kept", "it does not read README"
    assert state(reader(one), reader(fetch(**{"a.txt": "9", "README": "2"}))) == "unless"
    assert state(reader(one), reader(one, 1)) == "runs"
    assert state(reader(one), reader(one, files=("*",))) == "runs"
    unpromised = [Step("fetch", "source (hub)", 1, {"at": at}) for at in (1, 2)]
    assert state(reader(unpromised[0]), reader(unpromised[1])) == "unless", "what it brings is not known before it runs"
