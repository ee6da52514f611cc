"""Keys: one spelling for each value, equal exactly where what they are made of is equal, and the same for ever."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildsys.step import Need, Step, canonical, digest, reads

Plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
Knobs = st.dictionaries(st.text(max_size=8), Plain, max_size=5)


def spelled(value: Any) -> Any:
    """A value in which True, 1 and 1.0 differ, as they do in JSON and do not in Python."""
    if isinstance(value, dict):
        return ("dict", frozenset((key, spelled(inner)) for key, inner in value.items()))
    if isinstance(value, list):
        return ("list", tuple(spelled(inner) for inner in value))
    return (type(value).__name__, repr(value))


@given(Plain)
def test_canonical_json_round_trips(value: Any) -> None:
    written = canonical(value)
    assert spelled(json.loads(written)) == spelled(value)
    assert canonical(json.loads(written)) == written
    assert written.isascii() and b"\n" not in written


@given(Plain, Plain)
def test_canonical_json_is_equal_iff_values_are(one: Any, other: Any) -> None:
    assert (canonical(one) == canonical(other)) == (spelled(one) == spelled(other))
    assert (digest(one) == digest(other)) == (spelled(one) == spelled(other))


@given(Knobs)
def test_order_of_keys_changes_nothing(knobs: dict[str, Any]) -> None:
    assert canonical(dict(reversed(list(knobs.items())))) == canonical(knobs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"bytes", object()])
def test_what_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        canonical({"x": value})


@given(Knobs, Knobs, st.integers(1, 3), st.integers(1, 3), st.sampled_from(["fetch", "pack"]), st.sampled_from(["fetch", "pack"]))
def test_keys_are_equal_iff_steps_are(one: dict[str, Any], other: dict[str, Any], a: int, b: int, kind: str, sort: str) -> None:
    first, second = Step(kind, "x", a, one), Step(sort, "y", b, other)
    same = (kind, a, spelled(one)) == (sort, b, spelled(other))
    assert (first.planned_key == second.planned_key) == (first.key({}) == second.key({})) == (first == second) == same


def graph() -> Step:
    source = Step("fetch", "source", 1, {"files": {"config.json": "ab" * 32}}, hints={"paths": {"config.json": "/home/me/config.json"}})
    tokens = Step(
        "tokens", "calibration", 1, {"samples": 4, "seqlen": 16, "seed": 0}, (Need("source", source, ("tokenizer.json",)),), heavy=True
    )
    return Step("calibrate", "statistics", 2, {"damp": 0.01}, (Need("source", source), Need("tokens", tokens)))


def test_golden_keys() -> None:
    """Whoever changes these makes every artifact of every user a miss: bump KEY_FORMAT, and say so in CHANGELOG.md."""
    step = graph()
    found = {one.kind: one.planned_key for one in step.walk()}
    assert found == {
        "fetch": "b871df7683f6a13768026c93262ce7f1f9ca5b5d18c983d633f9614955154150",
        "tokens": "a914a13fa9e09315c0972c85253f14961b4dddf9456f78ebc4e1e03a77cccd07",
        "calibrate": "998f4efcc468f562357704dd206e02997562b090eb13cf8f29b86ee0aa0e864d",
    }
    assert step.key({"source": "1" * 64, "tokens": "2" * 64}) == "57a6a7cea5ebef3dc60024219bb3a6048bbfb869c270552af3214c029f4cee04"
    assert canonical({"b": [1, 2.5, None, True], "a": "é\u2028"}) == b'{"a":"\\u00e9\\u2028","b":[1,2.5,null,true]}'


def test_titles_hints_order_and_weight_are_in_no_key() -> None:
    source = Step("fetch", "source", 1, {"n": 1})
    other = Step("fetch", "another title", 1, {"n": 1}, after=(graph(),), heavy=True, hints={"paths": {"x": "/y"}})
    assert source == other and hash(source) == hash(other) and source.key({}) == other.key({})


def test_planned_key_sees_needs_and_the_files_that_are_read() -> None:
    source = Step("fetch", "source", 1, {"n": 1})
    keys = {
        Step("pack", "x", 1, {}, needs).planned_key
        for needs in (
            (),
            (Need("source", source),),
            (Need("other", source),),
            (Need("source", source, ("*.json",)),),
            (Need("source", Step("fetch", "source", 2, {"n": 1})),),
        )
    }
    assert len(keys) == 5


def test_real_key_sees_outputs_alone() -> None:
    cheap = Step("pack", "x", 1, {}, (Need("source", Step("fetch", "a", 1, {"n": 1})),))
    other = Step("pack", "x", 1, {}, (Need("source", Step("fetch", "b", 1, {"n": 2})),))
    assert cheap.planned_key != other.planned_key and cheap.key({"source": "1"}) == other.key({"source": "1"})
    with pytest.raises(KeyError):
        cheap.key({})


def test_walk_is_topological_and_visits_each_step_once() -> None:
    step = graph()
    kinds = [one.kind for one in step.walk()]
    assert kinds == ["fetch", "tokens", "calibrate"]
    late = Step("pack", "x", 1, {}, (Need("stats", step),), after=(Step("disjoint", "d", 1, {}),))
    assert [one.kind for one in late.walk()] == ["fetch", "tokens", "calibrate", "disjoint", "pack"]


@pytest.mark.parametrize(
    ("globs", "name", "read"),
    [
        (("*",), "deploy/engine.yaml", True),
        (("*.safetensors",), "model.safetensors", True),
        (("*.safetensors",), "model.SAFETENSORS", False),
        (("config.json", "*.model"), "tokenizer.model", True),
        ((), "x", False),
    ],
)
def test_reads(globs: tuple[str, ...], name: str, read: bool) -> None:
    assert reads(globs, name) is read
