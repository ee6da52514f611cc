"""Spending a budget against trying every choice: never more than it allows, and never far from the best."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildsys.architecture import Linear, fused
from buildsys.errors import BuildError
from buildsys.quant.budget import Group, Option, average_bits, choices, least_bits, saving, size_bits, spend, table
from buildsys.scheme import Bits, Scheme, Schemes
from tests import models

BITS: tuple[Bits, ...] = (2, 3, 4, 8)


def group(weights: int, errors: dict[Bits, float], name: str = "a") -> Group:
    return Group((name,), weights, tuple(Option(Scheme(bits, 32), weights * bits, error) for bits, error in errors.items()))


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    """Up to five, with any errors at all: measured ones need not fall with every bit."""
    found = []
    for at in range(draw(st.integers(1, 5))):
        bits = draw(st.sets(st.sampled_from(BITS), min_size=1))
        errors = {one: draw(st.floats(0, 100, width=16)) for one in sorted(bits)}
        found.append(group(draw(st.integers(1, 9)), errors, f"g{at}"))
    return found


def every_choice(of: list[Group], budget_bits: float) -> list[tuple[Option, ...]]:
    """The slow twin: all choices that fit."""
    limit = Fraction(budget_bits) * sum(one.weights for one in of)
    return [choice for choice in product(*(one.options for one in of)) if sum(option.size_bits for option in choice) <= limit]


@given(groups(), st.floats(1, 9))
def test_spends_within_the_budget_and_near_the_best(of: list[Group], budget_bits: float) -> None:
    fitting = every_choice(of, budget_bits)
    if not fitting:
        with pytest.raises(BuildError, match="the smallest choice takes"):
            spend(of, budget_bits, "r.yaml:3")
        return
    chosen = spend(of, budget_bits, "r.yaml:3")
    assert chosen in fitting
    best, found = (sum(option.error for option in choice) for choice in (min(fitting, key=lambda c: sum(o.error for o in c)), chosen))
    largest_step = max((one.error - other.error for each in of for one, other in pairwise(each.hull())), default=0.0)
    assert best <= found + 1e-9 and found <= best + largest_step + 1e-9
    for at, option in ((at, option) for at, one in enumerate(of) for option in one.options):
        better = option.error < chosen[at].error and (*chosen[:at], option, *chosen[at + 1 :]) in fitting
        assert not better, "what is left over pays for nothing more"


@given(groups())
def test_a_hull_is_convex_and_below_every_option(of: list[Group]) -> None:
    for one in of:
        hull = one.hull()
        slopes = [saving(smaller, larger) for smaller, larger in pairwise(hull)]
        assert all(slope > 0 for slope in slopes) and all(first > then for first, then in pairwise(slopes))
        assert hull[0].size_bits == min(option.size_bits for option in one.options)
        assert hull[-1].error == min(option.error for option in one.options)
        for option in one.options:
            for (smaller, larger), slope in zip(pairwise(hull), slopes, strict=True):
                assert Fraction(option.error) >= Fraction(smaller.error) - slope * (option.size_bits - smaller.size_bits), (option, larger)


def test_a_budget_goes_where_it_saves_most_a_bit() -> None:
    small, large = group(10, {3: 4.0, 4: 1.0, 8: 0.0}, "small"), group(100, {3: 8.0, 4: 2.0, 8: 0.0}, "large")
    taken = {budget: [option.scheme.bits for option in spend([small, large], budget, "")] for budget in (3.0, 3.1, 3.95, 4.0, 4.4, 8.0)}
    # 3 nats for 10 bits, 6 for 100, 1 for 40, 2 for 400; at 3.95 bits 6 for 100 does not fit any more, and 1 for 40 does.
    assert taken == {3.0: [3, 3], 3.1: [4, 3], 3.95: [8, 3], 4.0: [4, 4], 4.4: [8, 4], 8.0: [8, 8]}


def test_what_is_left_over_is_filled_up() -> None:
    """The best step does not fit; a worse one, and one past the hull, do."""
    wide, narrow = group(100, {3: 100.0, 4: 0.0}), group(10, {2: 5.0, 3: 4.9, 4: 0.0})
    chosen = spend([wide, narrow], (300 + 30) / 110, "")
    assert [option.scheme.bits for option in chosen] == [3, 3]


def test_equal_groups_are_chosen_in_their_order() -> None:
    chosen = spend([group(10, {3: 2.0, 4: 1.0}, name) for name in "abc"], 3.4, "")
    assert [option.scheme.bits for option in chosen] == [4, 3, 3]


@pytest.mark.parametrize(
    ("scheme", "bits_a_weight"), [(Scheme(4, 128), 4.15625), (Scheme(3, 32), 3.59375), (Scheme(8, -1, True), 8 + 24 / 256)]
)
def test_a_size_counts_scales_and_zeros(scheme: Scheme, bits_a_weight: float) -> None:
    linear = Linear("q", "q", "attn_in", 256, 48)
    size = size_bits(linear, scheme)
    assert size == 256 * 48 * bits_a_weight
    one = Group(("q",), 256 * 48, (Option(scheme, size, 0.5),))
    assert average_bits([one], spend([one], bits_a_weight, "")) == bits_a_weight


def test_too_small_a_budget_says_what_would_do() -> None:
    with pytest.raises(BuildError) as caught:
        spend([group(100, {3: 1.0, 4: 0.5}), Group(("b",), 100, (Option(Scheme(8, 32), 875, 0.0),))], 3.5, "recipes/r.yaml:9")
    assert caught.value.where == "recipes/r.yaml:9"
    assert "takes 5.8750 bits a weight" in caught.value.what and "budget_bits is 3.5" in caught.value.what
    assert caught.value.fix.startswith("set budget_bits: 5.88,")


def test_the_table_tells_what_there_was_to_choose_from() -> None:
    one = group(9, {3: 0.25, 8: 0.0}, "layers.0.q")
    assert table([one], spend([one], 4.0, "")) == [
        {
            "linears": ["layers.0.q"],
            "chosen": "3-bit g32 asymmetric",
            "options": [
                {"scheme": "3-bit g32 asymmetric", "bytes": 4, "kl_nats": 0.25},
                {"scheme": "8-bit g32 asymmetric", "bytes": 9, "kl_nats": 0.0},
            ],
        }
    ]


def test_the_smallest_choice_is_known_before_anything_runs(tmp_path: Path) -> None:
    a = models.opened(models.tiny_llama(tmp_path)).architecture
    down, o = a.prefix(1) + "mlp.down_proj", a.prefix(0) + "self_attn.o_proj"
    schemes = Schemes(Scheme(4, 32), frozenset({o}), {down: Scheme(8, -1)})
    offered = choices(a, 1, schemes, tuple(fused(a)), (8, 3, 4))
    assert [[linear.role for linear in group] for group in offered] == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    assert list(offered.values()) == [tuple(Scheme(bits, 32) for bits in (3, 4, 8))] * 3 + [(Scheme(8, -1),)]
    assert all(linear.name != "self_attn.o_proj" for group in choices(a, 0, schemes, (), (3,)) for linear in group)
    groups = []
    for layer in range(a.layers):
        for linears, kinds in choices(a, layer, schemes, (), (8, 3, 4)).items():
            sizes = (sum(size_bits(linear, kind) for linear in linears) for kind in kinds)
            weights = sum(linear.in_features * linear.out_features for linear in linears)
            groups.append(Group(("x",), weights, tuple(Option(kind, size, 1.0) for kind, size in zip(kinds, sizes, strict=True))))
    least = least_bits(a, schemes, tuple(fused(a)), (8, 3, 4))
    assert average_bits(groups, spend(groups, least + 1e-6, "")) == pytest.approx(least)
    with pytest.raises(BuildError, match="the smallest choice takes"):
        spend(groups, least - 1e-3, "")
