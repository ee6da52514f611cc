"""A review as one comment of a pull request, in GitHub's markdown: a summary, and each recipe's details folded away.

GitHub cuts a comment at 65,536 characters, so details are left out from the last recipe on, with a count. All that a recipe says is
written as character references, and inside <code>: nothing in it becomes markup, a mention or a table's end. Long words may break.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator

from buildsys.review import words
from buildsys.review.found import Change, Review

MOST = 64_000  # characters, of the 65,536 that a comment may have
ROWS = 40  # of the summary table; recipes that change alike share one
NAMES = 8  # of recipes that change alike
MARK = "<!-- buildsys diff -->"

_ACTIVE = re.compile(r"[*`\[\]~|\\$#@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=[a-z]):(?=//)|(?<=www)\.")
_BREAKS = re.compile(r"(?<=[./@_,:=-])(?=[^\s<])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]+")


def code(text: str) -> str:
    """Text of a recipe's author, which may be anybody."""
    plain = _CONTROL.sub(" ", text)
    pieces = (_escaped(piece) for piece in (_BREAKS.split(plain) if len(plain) > 16 else [plain]))
    return f"<code>{'<wbr>'.join(pieces)}</code>"


def _escaped(text: str) -> str:
    return _ACTIVE.sub(lambda found: f"&#{ord(found[0])};", html.escape(text, quote=False))


def markdown(review: Review) -> str:
    """The whole comment."""
    head = "\n".join([MARK, f"## Recipes: {words.counts(review)}", "", *_summary(review)])
    parts, left = [], MOST - len(head) - 400
    told = [change for change in review.changes if change.kind != "deleted"]
    for change in told:
        part = "\n".join(_details(change))
        if len(part) > left:
            break
        parts.append(part)
        left -= len(part) + 1
    rest = len(told) - len(parts)
    if rest:
        parts.append(f"\nDetails of {rest} more recipe{'s' if rest != 1 else ''} do not fit a comment: `doit diff base=… recipe=NAME`.\n")
    return "\n".join([head, *parts, _foot(review)])


def _summary(review: Review) -> Iterator[str]:
    if review.errors:
        yield f"**{len(review.errors)} mistake{'s' if len(review.errors) != 1 else ''}: not everything could be compared.**\n"
    if review.loosened:
        recipes = len(dict.fromkeys(name for name, _ in review.loosened))
        gates = dict.fromkeys(words.gate(gate) for _, gate in review.loosened)
        listed = "<br>".join(code(gate) for gate in list(gates)[:NAMES])
        more = f"<br>and {len(gates) - NAMES} more" if len(gates) > NAMES else ""
        yield f"**Gates loosened in {recipes} recipe{'s' if recipes != 1 else ''}:**<br>{listed}{more}\n"
    if not review.changes:
        return
    yield f"{words.work(review)[:1].upper()}{words.work(review)[1:]}.\n"
    yield "| recipe | what changes | builds |\n| --- | --- | --- |"
    groups = _alike(review.changes)
    yield from (_row(alike) for alike in groups[:ROWS])
    if len(groups) > ROWS:
        yield f"| {sum(map(len, groups[ROWS:]))} more | in {len(groups) - ROWS} other ways | |"
    yield ""
    if review.sums:
        yield "| sum of what changes | before | after | |\n| --- | ---: | ---: | ---: |"
        for sum_ in review.sums:
            yield f"| {sum_.name} | {words.amount(sum_.before, sum_.unit)} | {words.amount(sum_.after, sum_.unit)} | {words.shift(sum_)} |"
        yield ""


def _alike(changes: Iterable[Change]) -> list[list[Change]]:
    """Recipes to which the same is done share a row."""
    groups: dict[object, list[Change]] = {}
    for change in changes:
        same = change.kind in ("changed",) and not change.errors
        told = tuple((knob.key, str(knob.before), str(knob.after), knob.where) for knob in change.knobs)
        key = (change.kind, told, change.files, change.gates, _shape(change)) if same else change.name
        groups.setdefault(key, []).append(change)
    return list(groups.values())


def _shape(change: Change) -> tuple[tuple[str, str], ...]:
    return tuple((step.kind, step.state) for step in change.steps)


def _row(alike: list[Change]) -> str:
    one = alike[0]
    names = "<br>".join(code(change.name) for change in alike[:NAMES])
    more = f"<br>and {len(alike) - NAMES} more" if len(alike) > NAMES else ""
    return f"| {names}{more} | {'<br>'.join(_what(one))} | {_builds(one)} |"


def _what(change: Change) -> Iterator[str]:
    if change.kind == "renamed":
        yield f"renamed from {code(change.was)}"
    elif change.kind != "changed":
        yield "is no valid recipe" if change.kind == "broken" else change.kind
    gates = {f"verify.{gate.name}" for gate in change.gates}
    knobs = [knob for knob in change.knobs if knob.key not in gates]
    for knob in knobs[:4]:
        yield f"{code(knob.key)} {code(words.value(knob.before))} → {code(words.value(knob.after))}"
    if len(knobs) > 4:
        yield f"and {len(knobs) - 4} more"
    if change.kind != "added":
        yield from (
            f"{'**' if gate.state == 'LOOSENED' else ''}gate {code(words.gate(gate))}{'**' if gate.state == 'LOOSENED' else ''}"
            for gate in change.gates
        )
    for path in change.files[:2]:
        yield f"content of {code(path)}"
    if len(change.files) > 2:
        yield f"and {len(change.files) - 2} more files"
    yield from (f"published to {code(place)}: **stays there**" for place in change.published)
    yield from (code(error) for error in change.errors[:1])
    if change.measurements and not change.knobs:
        yield "measured anew"


def _builds(change: Change) -> str:
    if change.kind in ("deleted", "broken"):
        return "nothing"
    return f"{words.steps(change)}<br>{words.took(change)}" if change.steps or change.kept else "not known"


def _details(change: Change) -> Iterator[str]:
    was = f" (was {code(change.was)})" if change.was else ""
    yield f"<details><summary>{code(change.name)}{was}: {change.kind}, {words.steps(change)}</summary>\n"
    yield f"{code(change.where)}\n"
    if change.errors:
        yield "\n".join(f"- {code(error)}" for error in change.errors) + "\n"
    if change.knobs:
        yield "| knob | before | after | written in |\n| --- | --- | --- | --- |"
        for knob in change.knobs:
            yield f"| {code(knob.key)} | {code(words.value(knob.before))} | {code(words.value(knob.after))} | {code(knob.where)} |"
        yield ""
    if change.files:
        yield f"Content changed: {', '.join(map(code, change.files))}.\n"
    if change.gates:
        yield "\n".join(f"- gate {code(words.gate(gate))}" for gate in change.gates) + "\n"
    yield from _steps(change)
    yield from _figures(change)
    yield from _measurements(change)
    notes = (*change.notes, *(f"published to {place}: what was published stays there" for place in change.published))
    if notes:
        yield "\n".join(f"- {code(note)}" for note in notes) + "\n"
    yield "</details>\n"


def _steps(change: Change) -> Iterator[str]:
    if not change.steps:
        return
    yield "| step | | why |\n| --- | --- | --- |"
    for step in change.steps:
        roughly = f"<br>{words.amount(step.seconds, 's')}" if step.seconds is not None else ""
        yield f"| {step.kind} {code(step.title)} | {step.state}{roughly} | {code(step.why)} |"
    yield ""


def _figures(change: Change) -> Iterator[str]:
    moved = [figure for figure in change.figures if figure.before != figure.after]
    if not moved:
        if change.figures:
            yield "Predicted sizes, memory, speed and build time are as before.\n"
        return
    yield "| predicted | before | after | |\n| --- | ---: | ---: | ---: |"
    for one in moved:
        yield f"| {one.name} | {words.amount(one.before, one.unit)} | {words.amount(one.after, one.unit)} | {words.shift(one)} |"
    yield ""


def _measurements(change: Change) -> Iterator[str]:
    moved = [one for one in change.measurements if one.state != "equal"]
    if moved:
        yield "| measured | before | after | |\n| --- | ---: | ---: | --- |"
        for one in moved:
            yield f"| {code(words.moved(one))} | {words.interval(one.before)} | {words.interval(one.after)} | {one.state} |"
        yield ""
    if change.measured:
        yield f"{change.measured}\n"


def _foot(review: Review) -> str:
    notes = "".join(f" {code(note)}." for note in review.notes)
    how = "A step that the store already has does not run. Sizes, speed and times are predicted; measurements are those of the locks."
    return f"<sub>Compared with {code(review.ref)} ({code(review.commit[:12])}). {how}{notes}</sub>\n"
