"""The report of one build: a page that stands alone, for whoever decides whether to deploy it and for whoever asks later what it is.

Equal facts give equal bytes: no clock, no path and no name of a machine is asked for here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from buildsys.footprint import GIB
from buildsys.release.facts import Facts
from buildsys.release.resolved import text
from buildsys.report import engines, plots, policies, sections
from buildsys.report.axes import fit, linear
from buildsys.report.markup import in_bytes, in_seconds, number, render, unit_of
from buildsys.report.view import View

SITES = {
    "attn_in": "into attention (q, k, v)",
    "o_in": "into the attention's output (o)",
    "mlp_in": "into the MLP (gate, up)",
    "down_in": "into the MLP's output (down)",
}
OPEN_ANSWERS = 4
SERIES = {"largest": "s0", "channel": "s1"}


def page(facts: Facts, view: View | None = None) -> str:
    """HTML."""
    view = view or View()
    recipe, sizes, memory = facts.plan.recipe, sections.sizes(facts), sections.memory(facts)
    tabled = (policies.in_the_table, engines.in_the_table)
    rows, kv = tuple(row for row in sections.rows(facts) if not any(told(row) for told in tabled)), policies.policies(facts)
    return render(
        "page.html.jinja",
        facts=facts,
        view=view,
        title=facts.name,
        state=sections.state_of(facts.verdicts),
        verdict=sections.in_a_line(facts.verdicts),
        scheme=sections.scheme_name(recipe),
        source=sections.source_name(recipe),
        format=recipe.format.name,
        tiles=list(_tiles(facts, sizes)),
        rows=rows,
        intervals=list(intervals(rows)),
        kv=kv,
        engines=engines.engines(facts, view.served),
        skipped=facts.plan.skipped,
        kv_advice=list(policies.advice(kv)),
        kv_strips=list(policies.strips(facts, kv)),
        errors=errors(facts),
        worst=sections.worst(facts, 5),
        roles=sections.roles(facts),
        outliers=list(outliers(view)),
        sizes=sizes,
        parts=sections.PART_CSS,
        size_bars=size_bars(sizes),
        memory=memory,
        memory_bars=memory_bars(memory) if memory is not None else "",
        gib=GIB,
        answers=(view.generations[:OPEN_ANSWERS], view.generations[OPEN_ANSWERS:]),
        steps=steps(facts),
        took=sum(float(ran.built.get("seconds", 0.0)) for ran in facts.steps),
        recipe=text(recipe),
        inputs=list(sections.inputs(facts)),
        versions=sections.versions(facts),
        machines=sections.machines(facts),
    )


def _tiles(facts: Facts, sizes: sections.Sizes) -> Iterator[tuple[str, str, str, str]]:
    """The few numbers that decide: name, value, unit and what it is held against."""
    before, after = sizes.source_bytes, sizes.artifact_bytes
    smaller = f"{before / after:.2f}× smaller than the source's {in_bytes(before)}" if 0 < after < before else f"source: {in_bytes(before)}"
    value, unit = in_bytes(after).split(" ")
    yield "Size", value, unit, smaller
    named = (("kl", "kl", "KL from the source"), ("agreement", "share", "Same next token"), ("memory", "needed_gib", "Memory to serve"))
    for check, name, title in named:
        row = sections.row_of(facts, check, name)
        if row is not None:
            spread = "" if row.exact else f"95%: {number(row.one.low)} to {number(row.one.high)}"
            held = f"limit: {row.limits}" if row.bounds else row.one.detail or ("" if row.exact else "no limit set")
            yield title, number(row.one.value), row.one.unit, "; ".join(part for part in (spread, held) if part)


def intervals(rows: tuple[sections.Row, ...]) -> Iterator[tuple[sections.Row, Markup]]:
    """A strip for each measurement that has an interval. Those of one check and unit share an axis: they are compared."""
    shown = [row for row in rows if not row.exact and all(map(math.isfinite, (row.one.low, row.one.value, row.one.high)))]
    for row in shown:
        alike = [each for each in shown if (each.check, each.one.unit, bool(each.bounds)) == (row.check, row.one.unit, bool(row.bounds))]
        ends = [end for each in alike for end in (each.one.low, each.one.high, *(bound for _, bound in each.bounds))]
        bound = next(((limit.side, value) for limit, value in row.bounds), None)
        one = row.one
        yield row, plots.interval(row.title, one.unit, fit(ends, room=0.15), one.low, one.value, one.high, bound)


def errors(facts: Facts) -> Markup | str:
    """The heat map, or why there is none."""
    found = sections.worst(facts, 1)
    if not found:
        return "The quantize step wrote no errors."
    name, error = found[0]
    unit = "squared error of a layer's outputs, relative to the squared outputs"
    said = f"The largest is {number(error)}, at {name}"
    return plots.heat_map("Error by layer and role", sections.roles(facts), "linear", unit, said + ".")


def outliers(view: View) -> Iterator[Markup]:
    """A plot for each site, all on one scale."""
    every = [value for each in view.outliers for value in (each.largest, each.channel)]
    scale = fit(every, allow_log=True, zero=True, count=4)
    for site, name in SITES.items():
        here = sorted((each for each in view.outliers if each.site == site), key=lambda each: each.layer)
        if here:
            top = max(here, key=lambda each: each.largest if math.isfinite(each.largest) else -1.0)
            said = f"The largest value is {number(top.largest)} times the mean, in layer {top.layer}."
            series = {SERIES["largest"]: [each.largest for each in here], SERIES["channel"]: [each.channel for each in here]}
            yield plots.lines(name, series, scale, "times the mean" + (" (logarithmic)" if scale.logarithmic else ""), said)


def size_bars(sizes: sections.Sizes) -> Markup:
    rows = {"source": sections.parts_of(sizes.source), "artifact": sections.parts_of(sizes.artifact)}
    unit, width = unit_of(max(sizes.source_bytes, sizes.artifact_bytes))
    said = f"The source takes {in_bytes(sizes.source_bytes)}, the artifact {in_bytes(sizes.artifact_bytes)}."
    scale = linear(0.0, max(sizes.source_bytes, sizes.artifact_bytes) / width, 5)
    key = plots.legend([(css, name) for name, css in sections.PART_CSS.items()])
    return plots.bars("Files by part", rows, scale, unit, said, per=width, key=key)


def memory_bars(memory: sections.Memory) -> Markup:
    both = {"source": memory.source, "artifact": memory.artifact}
    rows = {name: memory.parts(serving) for name, serving in both.items()}
    whole = memory.artifact.memory_bytes / GIB
    needs = [sum(part.value for part in parts) / GIB for parts in rows.values()]
    said = " ".join(f"The {name} holds {each.sessions} full sessions." for name, each in both.items())
    scale = linear(0.0, max(whole, *needs) * 1.02, 4)
    key = plots.legend([*((css, name) for name, css in sections.MEMORY_CSS.items()), ("edge", "the GPU's end")])
    return plots.bars(f"One {memory.artifact.gpu} of {whole:.2f} GiB", rows, scale, "GiB", said, bound=whole, per=GIB, key=key)


def steps(facts: Facts) -> list[dict[str, Any]]:
    """Every step with its share of the time."""
    took = [float(ran.built.get("seconds", 0.0)) for ran in facts.steps]
    whole = sum(took)
    return [
        {
            "kind": ran.step.kind,
            "title": ran.title,
            "took": in_seconds(seconds) if "seconds" in ran.built else "not recorded",
            "bar": plots.share(seconds, whole),
            "peak": in_bytes(ran.built["peak_rss_bytes"]) if "peak_rss_bytes" in ran.built else "",
            "key": ran.output.key,
            "digest": ran.output.digest(),
            "size": ran.output.size,
        }
        for ran, seconds in zip(facts.steps, took, strict=True)
    ]
