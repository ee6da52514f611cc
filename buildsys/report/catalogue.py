"""The page of all recipes: what each came to, quality against size, and what is not built.

Without its one script it is complete and sorted by name; the script adds buttons that sort by another column.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from buildsys.measurement import Measurement
from buildsys.recipe import Recipe
from buildsys.release.facts import Facts
from buildsys.report import sections
from buildsys.report.markup import in_bytes, number, render
from buildsys.report.scatter import Point, scatter

NOT_BUILT = "not built"


@dataclass(frozen=True)
class Entry:
    """A recipe in the catalogue. `state` "" is one without an artifact, `why` then says the reason."""

    name: str
    source: str
    scheme: str
    target: str
    state: str = ""
    size: int = 0  # bytes
    kl: Measurement | None = None
    limit: str = ""
    href: str = ""
    why: str = NOT_BUILT


def entry(facts: Facts, href: str) -> Entry:
    """A built recipe; `href` leads to its page."""
    recipe, row = facts.plan.recipe, sections.row_of(facts, "kl", "kl")
    return Entry(
        name=facts.name,
        source=sections.source_name(recipe),
        scheme=sections.scheme_name(recipe),
        target=sections.target_name(recipe),
        state=sections.state_of(facts.verdicts),
        size=facts.artifact.size,
        kl=row.one if row is not None else None,
        limit=row.limits if row is not None else "",
        href=href,
    )


def unbuilt(recipe: Recipe, why: str = NOT_BUILT) -> Entry:
    """A recipe without an artifact."""
    named = sections.source_name(recipe), sections.scheme_name(recipe), sections.target_name(recipe)
    return Entry(recipe.name, *named, why=why)


def catalogue(entries: Iterable[Entry], title: str = "Recipes") -> str:
    """HTML."""
    listed = sorted(entries, key=lambda one: one.name)
    built = [one for one in listed if one.state]
    return render(
        "catalogue.html.jinja",
        script="sort.js",
        title=title,
        count=Counter(one.state or NOT_BUILT for one in listed),
        whole=len(listed),
        built=built,
        missing=[one for one in listed if not one.state],
        plot=plot(built),
    )


def plot(built: Sequence[Entry]) -> Markup | str:
    """Quality against size, or why there is no such plot."""
    points = [Point(one.name, one.size, one.kl.value, one.kl.low, one.kl.high, one.state, one.href) for one in built if one.kl is not None]
    if not points:
        return "No recipe has an artifact with a measured KL yet." if built else "No recipe has an artifact yet: run doit build."
    best = min(points, key=lambda point: (point.value != point.value, point.value, point.name))
    said = f"{len(points)} recipes. The closest to its source is {best.name}: {number(best.value)} nats at {in_bytes(best.size)}."
    return scatter("KL and size of every artifact", points, "KL from the source in nats", said)
