"""Why a step runs, in words: what changed, each thing once, and few words where much did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from buildsys.history import Ingredients, why

KNOBS: dict[str, Any] = {
    "scheme": {"bits": 4, "group_size": 64},
    "skip": [],
    "methods": [{"name": "awq", "version": 1, "knobs": {"ratios": 20}}],
}
NAMES = [f"model.layers.{layer}.mlp.down_proj" for layer in range(12)]


def made(key: str, inputs: Mapping[str, Mapping[str, str]] | None = None, version: int = 1, **knobs: Any) -> Ingredients:
    return Ingredients("quantize", "4-bit", key * 64, version, {**KNOBS, **knobs}, inputs or {})


BEFORE = made("a", {"stats": {"one": "1" * 64, "two": "2" * 64}})


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (made("b", BEFORE.inputs, scheme={"bits": 4, "group_size": 32}), "scheme.group_size 64 -> 32"),
        (made("b", BEFORE.inputs, version=2, skip=["a"]), "VERSION 1 -> 2; skip [] -> ['a']"),
        (made("b", BEFORE.inputs, methods=[{"name": "awq", "version": 1, "knobs": {"ratios": 9}}]), "methods[0].knobs.ratios 20 -> 9"),
        (made("b", {"stats": {"one": "1" * 64, "three": "3" * 64}}), "stats/three is new; stats/two is gone"),
        (made("b", {"stats": {"one": "3" * 64, "two": "2" * 64}}), "stats/one changed"),
        (made("b", {"stats": {str(at): str(at) * 64 for at in range(9)}}), "11 files of stats changed (0 …)"),
        (made("b", BEFORE.inputs), "keys are made in another way than at its last build"),
        (BEFORE, "its output is no longer in the store (forgotten, dropped or lost)"),
    ],
)
def test_what_changed(now: Ingredients, said: str) -> None:
    assert why(now, BEFORE) == said


def test_what_is_the_same_for_many_layers_is_told_once() -> None:
    own = {name: {"bits": 8, "group_size": 64} for name in NAMES}
    assert why(made("b", BEFORE.inputs, own=own), BEFORE) == f"24 in own changed (own.{NAMES[0]}.bits (unset) -> 8 …)"
    assert why(made("b", BEFORE.inputs, skip=NAMES), BEFORE) == f"skip [] -> [{NAMES[0]}, … 12 in all]"


def test_what_was_never_built_or_is_damaged() -> None:
    assert why(BEFORE, None) == "never built"
    assert why(BEFORE, None, "a file is gone") == why(BEFORE, BEFORE, "a file is gone") == "damaged: a file is gone"
