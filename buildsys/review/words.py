"""Numbers and values of a review in words, the same in every form that shows it."""

from __future__ import annotations

from typing import Any

from buildsys import console
from buildsys.footprint import GIB
from buildsys.review.found import Change, Figure, Gate, Moved, Review

LONG = 60  # characters of one value


def value(said: Any) -> str:
    """A knob's value as a recipe would write it, short enough for a line."""
    text = (
        str(said).lower() if isinstance(said, bool) else "none" if said is None else _listed(said) if isinstance(said, list) else str(said)
    )
    if len(text) in (40, 64) and set(text) <= set("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= LONG else f"{text[: LONG - 1]}…"


def _listed(said: list[Any]) -> str:
    return f"[{', '.join(map(str, said))}]"


def amount(number: float | None, unit: str) -> str:
    if number is None:
        return "–"
    if unit == "s":
        return console.seconds(number)
    if unit == "bytes":
        return f"{number / GIB:,.2f} GiB" if number >= GIB / 10 else console.size(int(number))
    return f"{number:,.0f}{f' {unit}' if unit == 'tokens/s' else ''}"


def shift(figure: Figure) -> str:
    """How far a figure moved."""
    if figure.before is None or figure.after is None:
        return "new" if figure.before is None else "gone"
    if not differs(figure):
        return "same"
    if not figure.before:
        return "from 0"
    share = (figure.after - figure.before) / figure.before
    return f"{share:+.1%}" if abs(share) < 1 else f"x {figure.after / figure.before:.3g}"


def gate(moved: Gate) -> str:
    """`kl.max_nats 0.05 -> 0.08: LOOSENED`."""
    if moved.before is None or moved.after is None:
        way = f"{value(moved.after)}: added" if moved.before is None else f"{value(moved.before)} -> gone: {moved.state}"
        return f"{moved.name} {way}"
    return f"{moved.name} {value(moved.before)} -> {value(moved.after)}: {moved.state}"


def interval(ends: tuple[float, float, float] | None) -> str:
    if ends is None:
        return "–"
    middle, low, high = ends
    return f"{middle:.4g}" if low == high else f"{middle:.4g} ({low:.4g} to {high:.4g})"


def steps(change: Change) -> str:
    """How many run for certain, may run, and are kept."""
    runs = sum(step.state == "runs" for step in change.steps)
    unless = len(change.steps) - runs
    said = [f"{runs} step{'s run' if runs != 1 else ' runs'}"] if runs else []
    said += [f"{unless} run unless inputs come out equal"] if unless else []
    said += [f"{change.kept} kept"] if change.kept else []
    return ", ".join(said) or "no steps"


def differs(figure: Figure) -> bool:
    """Whether a figure moved by more than a rounding would hide."""
    if figure.before is None or figure.after is None or not figure.before:
        return figure.before != figure.after
    return abs(figure.after / figure.before - 1) >= 0.0005


def took(change: Change) -> str:
    """Roughly, of the steps that run and of those that may."""
    times = {state: sum(step.seconds or 0.0 for step in change.steps if step.state == state) for state in ("runs", "unless")}
    said = [console.seconds(times["runs"])] if times["runs"] else []
    said += [f"up to {console.seconds(times['runs'] + times['unless'])}"] if times["unless"] else []
    return ", ".join(said) or ("moments" if change.steps else "nothing")


def counts(review: Review) -> str:
    """`2 changed, 1 renamed; 9 as before`."""
    said = ", ".join(f"{count} {kind}" for kind, count in review.counts.items())
    return f"{said or 'no recipe changed'}; {review.same} as before"


def work(review: Review) -> str:
    """What all of it takes, a shared step once."""
    if not review.runs and not review.unless:
        return "no step runs"
    certain = f"{review.runs} step{'s run' if review.runs != 1 else ' runs'} ({console.seconds(review.runs_s)})"
    maybe = f"{review.unless} more unless their inputs come out equal (up to {console.seconds(review.unless_s)})"
    parts = ([certain] if review.runs else []) + ([maybe] if review.unless else [])
    return f"{' and '.join(parts)}, roughly, on {'the processors here' if review.machine == 'CPU' else review.machine}"


def moved(one: Moved) -> str:
    return f"{one.check}: {one.name} ({one.unit})" if one.unit else f"{one.check}: {one.name}"
