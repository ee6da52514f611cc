"""A review in words for the terminal, as markdown for a pull request, or as JSON for machines."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict

from buildsys.errors import BuildError
from buildsys.review import words
from buildsys.review.found import Change, Review
from buildsys.review.markdown import markdown

FORMATS = ("text", "markdown", "json")
VERSION = 1  # of the JSON: bumped when a key goes or means something else; keys may be added
WIDTH = 120
WHOLE = 25  # recipes that a terminal shows in full; of more, each has a line


def chosen(name: str) -> str:
    """The format that the line names."""
    if name not in FORMATS:
        raise BuildError(f"format={name}", "is no form of a review", f"say one of {', '.join(FORMATS)}")
    return name


def render(review: Review, form: str) -> Iterator[str]:
    if form == "markdown":
        yield markdown(review).rstrip("\n")
    elif form == "json":
        yield as_json(review)
    else:
        yield from text(review)


def as_json(review: Review) -> str:
    said = asdict(review)
    del said["errors"]
    said |= {"format": VERSION, "counts": dict(review.counts), "errors": [str(error) for error in review.errors]}
    return json.dumps(said, indent=1, ensure_ascii=False, allow_nan=False, sort_keys=True)


def text(review: Review) -> Iterator[str]:
    yield f"against {review.ref} ({review.commit[:12]}): {words.counts(review)}"
    for name, gate in review.loosened[:WHOLE]:
        yield f"  gate {words.gate(gate)}  ({name})"
    whole = len(review.changes) <= WHOLE
    for change in review.changes:
        yield from _whole(change) if whole else [_line(change)]
    if review.changes:
        yield f"in all: {words.work(review)}"
        for one in filter(words.differs, review.sums):
            before, after = (words.amount(number, one.unit) for number in (one.before, one.after))
            yield f"  {one.name:<34} {before:>14} -> {after:>14}  {words.shift(one)}"
    for note in review.notes:
        yield f"note: {note}"


def _line(change: Change) -> str:
    knobs = ", ".join(f"{knob.key} {words.value(knob.before)} -> {words.value(knob.after)}" for knob in change.knobs[:2])
    more = f" and {len(change.knobs) - 2} more" if len(change.knobs) > 2 else ""
    return f"  {change.kind:<8} {change.name:<32} {words.steps(change)}  {knobs}{more}".rstrip()


def _whole(change: Change) -> Iterator[str]:
    yield ""
    yield f"{change.kind} {change.name}{f', which was {change.was}' if change.was else ''}  ({change.where})"
    for error in change.errors:
        yield from _wrapped(error)
    for knob in change.knobs:
        yield f"  {knob.key}: {words.value(knob.before)} -> {words.value(knob.after)}  ({knob.where})"
    for path in change.files:
        yield f"  content of {path}"
    for gate in change.gates:
        yield f"  gate {words.gate(gate)}"
    if change.steps or change.kept:
        yield f"  steps: {words.steps(change)}; {words.took(change)}"
    for step in change.steps:
        yield from _wrapped(f"{step.state:<7} {step.kind:<9} {step.title}: {step.why}")
    for figure in filter(words.differs, change.figures):
        before, after = (words.amount(number, figure.unit) for number in (figure.before, figure.after))
        yield f"  {figure.name:<34} {before:>14} -> {after:>14}  {words.shift(figure)}"
    for one in (one for one in change.measurements if one.state != "equal"):
        yield f"  {words.moved(one):<34} {words.interval(one.before)} -> {words.interval(one.after)}: {one.state}"
    for note in (change.measured, *change.notes):
        yield from _wrapped(f"note: {note}") if note else ()
    for place in change.published:
        yield f"  published to {place}: what was published stays there"


def _wrapped(said: str) -> list[str]:
    return textwrap.wrap(said, WIDTH, initial_indent="  ", subsequent_indent="      ", break_long_words=False, break_on_hyphens=False)
