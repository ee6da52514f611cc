"""Builds held against each other: one page and one table for the terminal. What can be paired is paired, the rest stands side by side.

Two artifacts of one source that were scored on the same windows differ by the mean of the differences, token by token: what the text makes
hard is hard for both, and cancels (quant/bootstrap.py). Everything is told of the first as against each of the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from markupsafe import Markup

from buildsys.console import seconds as in_time
from buildsys.console import size as in_size
from buildsys.release.facts import Facts, Ran
from buildsys.report import plots, sections
from buildsys.report.axes import fit, linear
from buildsys.report.markup import render

if TYPE_CHECKING:
    from buildsys.quant.bootstrap import Interval

SCORES = "scores.safetensors"
WEIGHTS = ("config.json", "*.safetensors")
KINDS = ("fetch", "tokens", "disjoint", "calibrate", "allocate", "quantize", "outside", "pack", "assemble", "score", "measure")
MAKING = ("calibrate", "allocate", "quantize", "outside", "pack", "assemble")
"""Kinds of steps that make the artifact; a kind that is in neither comes after all of these."""
CSS = {"calibrate": "c0", "allocate": "c4", "quantize": "c1", "outside": "c3", "pack": "c2", "assemble": "c5"}
QUALITIES = (
    ("perplexity", "quantized_perplexity", "perplexity"),
    ("perplexity", "ratio", "ratio"),
    ("agreement", "share", "agreement"),
)
AT_MOST = 8
"""Recipes that have room side by side."""
WORDS = {"better": "better", "worse": "worse", "noise": "within noise", "": "not to be paired"}


@dataclass(frozen=True)
class Spent:
    """What the steps of one kind took: seconds together, and the most memory that one of them held. 0 bytes: not recorded."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Difference:
    """KL of this recipe less that of the first, token by token; no interval: why they are not to be paired."""

    interval: Interval | None
    why: str = ""

    @property
    def verdict(self) -> str:
        if self.interval is None:
            return ""
        return "better" if self.interval.high < 0 else "worse" if self.interval.low > 0 else "noise"

    @property
    def text(self) -> str:
        if self.interval is None:
            return self.why
        one = self.interval
        return f"{WORDS[self.verdict]}: {signed(one.value)} nats, {signed(one.low)} to {signed(one.high)}"


@dataclass(frozen=True)
class Side:
    """One build. `letter` stands for its name where that has no room."""

    letter: str
    facts: Facts
    scores: Path  # of its predictions, token by token
    href: str = ""  # its own page
    difference: Difference | None = None  # None: the first

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def scheme(self) -> str:
        return sections.scheme_name(self.facts.plan.recipe)

    @property
    def format(self) -> str:
        return self.facts.plan.recipe.format.name

    @property
    def backend(self) -> str:
        return self.facts.plan.recipe.quantization.backend.name

    @property
    def state(self) -> sections.State:
        return sections.state_of(self.facts.verdicts)

    @property
    def gates(self) -> str:
        return sections.in_a_line(self.facts.verdicts)

    @property
    def kl(self) -> sections.Row | None:
        return sections.row_of(self.facts, "kl", "kl")

    @property
    def qualities(self) -> list[sections.Row | None]:
        return [sections.row_of(self.facts, check, name) for check, name, _ in QUALITIES]

    @property
    def spent(self) -> dict[str, Spent]:
        """By kind of step, in the order of a build."""
        kinds = [ran.step.kind for ran in self.facts.steps]
        found = {}
        for kind in sorted(set(kinds), key=lambda kind: (KINDS.index(kind) if kind in KINDS else len(KINDS), kind)):
            built = [ran.built for ran in self.facts.of_kind(kind)]
            found[kind] = Spent(sum(float(one.get("seconds", 0.0)) for one in built), max(one.get("peak_rss_bytes", 0) for one in built))
        return found

    @property
    def making(self) -> Spent:
        """From the float model to the artifact."""
        parts = [spent for kind, spent in self.spent.items() if kind in MAKING]
        return Spent(sum(one.seconds for one in parts), max(one.peak_bytes for one in parts))


def scored(facts: Facts) -> Ran:
    """The step that kept both models' predictions, which `kl` is of."""
    measure = dict(facts.plan.measures)["kl"]
    return facts.ran(next(need.step for need in measure.needs if need.role == "scores"))


def _windows(facts: Facts) -> str:
    """Of the text that both models were scored on."""
    step = scored(facts).step
    return facts.ran(next(need.step for need in step.needs if need.role == "tokens")).output.digest()


def difference(first: Side, other: Side) -> Difference:
    """Paired where the source and the windows of both are the same."""
    ours, theirs = (side.facts.source.output.digest(WEIGHTS) for side in (first, other))
    if ours != theirs:
        return Difference(None, f"not the same source as {first.name}")
    if _windows(first.facts) != _windows(other.facts):
        return Difference(None, f"not the same text as {first.name}")
    from buildsys.io.checkpoint import load
    from buildsys.quant.bootstrap import interval

    one, two = (load(side.scores)["kl"].double() for side in (first, other))
    return Difference(interval(two - one))


# The page


def page(sides: Sequence[Side]) -> str:
    """HTML."""
    kinds = [kind for kind in KINDS if any(kind in side.spent for side in sides)]
    kinds += sorted({kind for side in sides for kind in side.spent} - set(KINDS))
    return render(
        "compare.html.jinja",
        title=" · ".join(side.name for side in sides),
        sides=sides,
        first=sides[0],
        words=WORDS,
        qualities=[title for _, _, title in QUALITIES],
        strips=list(_strips(sides)),
        differences=list(_differences(sides)),
        kinds=kinds,
        seconds_bars=_seconds_bars(sides),
        machines={side.name: ", ".join(sections.machines(side.facts)) for side in sides},
        texts={side.name: _text(side.facts) for side in sides},
    )


def _text(facts: Facts) -> str:
    verify = facts.plan.recipe.verify
    return f"{verify.text.name}, {verify.samples} windows of {verify.seqlen} tokens, {_windows(facts)[:12]}"


def _strips(sides: Sequence[Side]) -> Iterator[tuple[Side, sections.Row, Markup]]:
    """KL of each, all on one axis."""
    shown = [(side, row) for side in sides if (row := side.kl) is not None and all(map(math.isfinite, (row.one.low, row.one.high)))]
    scale = fit([end for _, row in shown for end in (row.one.low, row.one.high)], zero=True, room=0.15)
    for side, row in shown:
        yield side, row, plots.interval(f"{side.letter}: {side.name}", "nats", scale, row.one.low, row.one.value, row.one.high, None)


def _differences(sides: Sequence[Side]) -> Iterator[tuple[Side, Markup]]:
    """Of what is paired, all on one axis that shows zero."""
    shown = [(side, side.difference.interval) for side in sides if side.difference is not None and side.difference.interval is not None]
    scale = fit([0.0, *(end for _, one in shown for end in (one.low, one.high))], room=0.15)
    for side, one in shown:
        title = f"{side.letter} less {sides[0].letter}"
        yield side, plots.interval(title, "nats, below 0: closer to the source", scale, one.low, one.value, one.high, None)


def _seconds_bars(sides: Sequence[Side]) -> Markup:
    rows = {side.letter: [plots.Part(kind, CSS[kind], side.spent[kind].seconds) for kind in MAKING if kind in side.spent] for side in sides}
    whole = max(side.making.seconds for side in sides)
    said = " ".join(f"{side.name} took {in_time(side.making.seconds)}." for side in sides)
    key = plots.legend([(CSS[kind], kind) for kind in MAKING if any(kind in side.spent for side in sides)])
    return plots.bars("Seconds from the float model to the artifact", rows, linear(0.0, max(whole, 0.001), 5), "seconds", said, key=key)


# The terminal


def lines(sides: Sequence[Side]) -> Iterator[str]:
    """One row a property, one column a recipe."""
    table = [["", *(side.name for side in sides)]]
    table += [[what, *cells] for what, cells in _properties(sides)]
    widths = [max(map(len, column)) for column in zip_longest(*table, fillvalue="")]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _properties(sides: Sequence[Side]) -> Iterator[tuple[str, list[str]]]:
    first = sides[0]
    yield "scheme", [side.scheme for side in sides]
    yield "format", [side.format for side in sides]
    yield "KL, nats", [_with_interval(side.kl) for side in sides]
    yield f"KL against {first.name}", ["" if side.difference is None else side.difference.text for side in sides]
    for at, (_, _, title) in enumerate(QUALITIES):
        yield title, [_with_interval(side.qualities[at]) for side in sides]
    yield "size", [in_size(side.facts.artifact.size) for side in sides]
    yield "to make it", [in_time(side.making.seconds) for side in sides]
    for kind in MAKING:
        if any(kind in side.spent for side in sides):
            yield f"  {kind}", [_spent(side.spent.get(kind)) for side in sides]
    yield "gates", [side.gates for side in sides]


def _with_interval(row: sections.Row | None) -> str:
    return "not measured" if row is None else f"{row.one.value:.4g} ({row.one.low:.4g} to {row.one.high:.4g})"


def _spent(spent: Spent | None) -> str:
    if spent is None:
        return "-"
    return in_time(spent.seconds) + (f", {in_size(spent.peak_bytes)} at most" if spent.peak_bytes else "")


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.3g}" if value else "0"


def file_name(names: Sequence[str]) -> str:
    """Of the page; no recipe's name holds a plus."""
    from buildsys.step import digest

    whole = "+".join(names)
    return f"compare-{whole if len(whole) <= 200 else digest(list(names))[:16]}.html"


def link(path: Path) -> str:
    """To a recipe's own page, where it has been written."""
    return quote(path.name) if path.is_file() else ""
