"""Locks as text: read is the inverse of text, variants write only what is other, and whatever is odd is told with its line."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from buildsys.locked import Built, Lock, Locked, Measured, Model, Pinned, Tensor

DIGESTS = some.integers(0, 2**256 - 1).map(lambda number: f"{number:064x}") | some.sampled_from(["0" * 64, f"12e{'3' * 61}", "a" * 64])
TEXT = some.text(some.characters(exclude_categories=("Cs", "Cc")), max_size=20) | some.sampled_from(
    ["", "~", "null", "1e-06", "0x1f", "<<", "yes", " a", "a: b", "# c", "*", "-", "été", "\u2028", "'", '"', "\\", "[", "0" * 20]
)
NAMES = TEXT.filter(bool)
FLOATS = some.floats(allow_nan=False)
FINITE = some.floats(allow_nan=False, allow_infinity=False)
VALUES = some.none() | some.booleans() | some.integers(-(10**17), 10**17) | FLOATS | TEXT
PLAIN = some.recursive(VALUES, lambda inner: some.lists(inner, max_size=3) | some.dictionaries(TEXT, inner, max_size=3), max_leaves=6)
COUNTS = some.integers(0, 10**12)


@some.composite
def pins(draw: Any) -> Pinned:
    files = draw(some.dictionaries(NAMES, DIGESTS, max_size=3))
    knobs = draw(some.dictionaries(NAMES, PLAIN, max_size=2))
    choice = {draw(NAMES.filter(lambda name: name not in ("pin", "files"))): knobs}
    return Pinned(choice=choice, pin=draw(TEXT), files=files, sizes={name: draw(COUNTS) for name in files})


MODELS = some.builds(
    Model,
    config=some.dictionaries(TEXT, PLAIN, max_size=4),
    tensors=some.dictionaries(
        NAMES, some.builds(Tensor, dtype=NAMES, shape=some.lists(COUNTS, max_size=3).map(tuple), count=COUNTS), max_size=3
    ),
    tokenizer=NAMES,
    template=DIGESTS | some.just(""),
)
MEASURED = some.builds(Measured, check=NAMES, name=NAMES, value=FLOATS, unit=TEXT, low=FLOATS, high=FLOATS)
BUILDS = some.builds(
    Built,
    artifact=DIGESTS,
    steps=some.dictionaries(NAMES, DIGESTS, max_size=3),
    measurements=some.lists(MEASURED, max_size=3, unique_by=lambda one: (one.check, one.name)).map(
        lambda found: tuple(sorted(found, key=lambda one: (one.check, one.name)))
    ),
    verdicts=some.dictionaries(NAMES, TEXT, max_size=2),
    on=NAMES,
    seconds=some.dictionaries(NAMES, FINITE, max_size=2),
    size_bytes=COUNTS,
)
SET = some.dictionaries(NAMES, VALUES.filter(lambda value: value is not None), max_size=3)
LOCKED = some.builds(
    Locked,
    asked=DIGESTS,
    source=pins(),
    model=MODELS,
    calibration=some.none() | pins(),
    text=some.none() | pins(),
    tokens=some.dictionaries(NAMES, DIGESTS, max_size=2),
    steps=some.dictionaries(NAMES, DIGESTS, max_size=3),
    knobs=SET,
    own=some.dictionaries(NAMES, SET, max_size=2),
    built=some.none() | BUILDS,
)
LOCKS = some.dictionaries(some.sampled_from(["x", "x@a", "x@b-1", "x@1e6"]), LOCKED, min_size=1, max_size=3).map(
    lambda all_: Lock(recipes=all_)
)


@given(lock=LOCKS)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_read_is_the_inverse_of_text(lock: Lock, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "x.lock"
    path.write_text(lock.text(), encoding="utf-8")
    assert Lock.read(path) == lock
    assert Lock.read(path).text() == lock.text()
