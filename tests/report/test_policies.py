"""The table of KV policies: what was measured of each, what each holds on the target, and nothing of it twice."""

from __future__ import annotations

import dataclasses
import re

import pytest

from buildsys import footprint
from buildsys.measurement import Measurement
from buildsys.release.facts import Facts
from buildsys.report import sections
from buildsys.report.page import page
from buildsys.report.policies import COLUMNS, advice, in_the_table, policies, strips
from buildsys.report.view import View

Shown = tuple[Facts, View]


def test_each_policy_has_its_numbers_and_its_memory(cached: Shown) -> None:
    facts, _ = cached
    found = policies(facts)
    assert [(one.name, one.own) for one in found] == [("none", False), ("int8", True), ("int4", False)]
    measured = {one.name: one for one in facts.measurements["kv"]}
    for one in found:
        assert one.found == {what: measured[f"{what}_{one.name}"] for what in COLUMNS} and one.serving is not None
        assert one.serving.kv_bytes_per_token == footprint.kv_bytes_per_token(facts.plan.survey.architecture, one.name)
    assert found[1].serving == facts.plan.serving
    assert found[0].found["kl"].value == next(one.value for one in facts.measurements["kl"])
    assert found[0].found["increase"].high == 0 < found[2].found["increase"].value


def test_the_own_one_is_what_its_gates_hold(cached: Shown) -> None:
    facts, _ = cached
    kl, increase = facts.measurements["kv"][:2]
    own = next(one for one in policies(facts) if one.own)
    assert (kl.value, increase.value) == (own.found["kl"].value, own.found["increase"].value)
    assert [verdict.state for verdict in facts.verdicts if verdict.check == "kv"] == ["passed"]


def test_what_stands_in_the_table_stands_there_alone(cached: Shown) -> None:
    html = page(*cached)
    rows = [row for row in sections.rows(cached[0]) if in_the_table(row)]
    assert len(rows) == 12 and not any(row.bounds for row in rows)
    assert not any(row.title in html for row in rows)
    assert len(re.findall("<tr[^>]*>", html.split('class="stack policies"')[1].split("</table>")[0])) == 4


def test_advice_says_what_a_policy_costs_and_buys(cached: Shown) -> None:
    lines = list(advice(policies(cached[0])))
    assert [line.split()[0] for line in lines] == ["int8", "int4"]
    assert all(re.search(r"adds \S+ nats \(\S+ to \S+\) and holds [123]\.\d\d times the tokens[.:]", line) for line in lines)
    assert len(list(strips(cached[0], policies(cached[0])))) == 2


@pytest.mark.parametrize("of", ["plain", "bare"])
def test_without_the_check_the_page_says_how_to_have_it(of: str, request: pytest.FixtureRequest) -> None:
    facts, view = request.getfixturevalue(of)
    assert policies(facts) == () and "verify: {kv: {}}" in page(facts, view)


def test_numbers_that_are_none_are_told_and_not_drawn(cached: Shown) -> None:
    facts, view = cached
    nan = float("nan")
    wild = tuple(Measurement(one.name, nan, one.unit, nan, nan) if one.name == "increase_int4" else one for one in facts.measurements["kv"])
    changed = dataclasses.replace(facts, measurements={**facts.measurements, "kv": wild})
    assert len(list(strips(changed, policies(changed)))) == 1 and "nan%" not in page(changed, view)
