"""A review as one comment of a pull request, in GitHub's markdown: a summary, and each recipe's details folded away.

GitHub cuts a comment at 65,536 characters, so details are left out from the last recipe on, with a count. All that a recipe says is
written as character references, and inside <code>: nothing in it becomes markup, a mention or a table's end. Long words may break.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator

from buildsys.review import words
from buildsys.review.found import Change, Figure, Review

MOST = 64_000  # characters, of the 65,536 that a comment may have
ROWS = 40  # of the summary table; recipes that change alike share one
NAMES = 8  # of recipes that change alike
MARK = "<!-- buildsys diff -->"

BREAK = "\ue000"  # where a long word may break; becomes <wbr>
LONG = 16  # characters of a word

_ACTIVE = re.compile(r"[*`\[\]~|\\$#@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9\ue000])|(?<=[a-z]):(?=//)|(?<=www)\.")
_BREAKS = re.compile(r"(?<=[./_,=@])(?=[A-Za-z0-9])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff\ue000]+")


def code(text: str) -> str:
    """Text of a recipe's author, which may be anybody."""
    words_ = (_BREAKS.sub(BREAK, word) if len(word) > LONG else word for word in _CONTROL.sub(" ", text).split(" "))
    escaped = html.escape(" ".join(words_), quote=False)
    return f"<code>{_ACTIVE.sub(lambda found: f'&#{ord(found[0])};', escaped).replace(BREAK, '<wbr>')}</code>"


def markdown(review: Review) -> str:
    """The whole comment."""
    head = "\n".join([MARK, f"## Recipes: {words.counts(review)}", "", *_summary(review)])
    parts, left = [], MOST - len(head) - 400
    told = [alike for alike in _alike(review.changes) if alike[0].kind != "deleted"]
    for alike in told:
        part = "\n".join(_details(alike))
        if len(part) > left:
            break
        parts.append(part)
        left -= len(part) + 1
    rest = sum(map(len, told[len(parts) :]))
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
    sums = [*filter(words.differs, review.sums)]
    if sums:
        yield "| sum of what changes | before | after | |\n| --- | ---: | ---: | ---: |"
        for sum_ in sums:
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


def _shape(change: Change) -> tuple[tuple[str, str, str], ...]:
    return tuple((step.kind, step.state, step.why) for step in change.steps)


def _row(alike: list[Change]) -> str:
    one = alike[0]
    return f"| {_names(alike, '<br>')} | {'<br>'.join(_what(one))} | {_builds(one)} |"


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
    if change.kind == "changed" and not (change.knobs or change.files or change.errors or change.notes):
        yield "its lock alone"


def _builds(change: Change) -> str:
    if change.kind in ("deleted", "broken"):
        return "nothing"
    return f"{words.steps(change)}<br>{words.took(change)}" if change.steps or change.kept else "not known"


def _names(alike: list[Change], between: str) -> str:
    names = between.join(code(change.name) for change in alike[:NAMES])
    return f"{names}{between}and {len(alike) - NAMES} more" if len(alike) > NAMES else names


def _details(alike: list[Change]) -> Iterator[str]:
    change = alike[0]
    was = f" (was {code(change.was)})" if change.was else ""
    each = " each" if len(alike) > 1 else ""
    yield f"<details><summary>{_names(alike, ', ')}{was}: {change.kind}, {words.steps(change)}{each}</summary>\n"
    yield f"{code(change.where)}\n"
    if change.errors:
        yield "\n".join(f"- {code(error)}" for error in change.errors) + "\n"
    if change.knobs:
        yield "| knob, and where it is written | before | after |\n| --- | --- | --- |"
        for knob in change.knobs:
            yield f"| {code(knob.key)}<br>{code(knob.where)} | {code(words.value(knob.before))} | {code(words.value(knob.after))} |"
        yield ""
    if change.files:
        yield f"Content changed: {', '.join(map(code, change.files))}.\n"
    if change.gates:
        yield "\n".join(f"- gate {code(words.gate(gate))}" for gate in change.gates) + "\n"
    yield from _steps(change)
    yield from _figures(change) if len(alike) == 1 else _of_each(alike)
    for one in alike[:ROWS]:
        yield from _measurements(one, each=len(alike) > 1)
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
        yield f"| {step.kind} {code(step.title)} | {'runs' if step.state == 'runs' else 'may run'}{roughly} | {code(step.why)} |"
    yield ""


def _figures(change: Change) -> Iterator[str]:
    moved = [*filter(words.differs, change.figures)]
    if not moved:
        if change.figures:
            yield "Predicted sizes, memory, speed and build time are as before.\n"
        return
    yield "| predicted | before | after | |\n| --- | ---: | ---: | ---: |"
    for one in moved:
        yield f"| {one.name} | {words.amount(one.before, one.unit)} | {words.amount(one.after, one.unit)} | {words.shift(one)} |"
    yield ""


def _of_each(alike: list[Change]) -> Iterator[str]:
    """One row a recipe: what it takes on disk and on its GPU, how fast it is, and its build."""
    wanted = (
        ("weights on disk", "disk"),
        ("KV cache", "KV cache, tokens"),
        ("decode at batch 1", "decode"),
        ("clean build", "clean build"),
    )
    tables = [{figure.name: figure for figure in change.figures} for change in alike]
    columns = [(name, head) for name, head in wanted if any(name in table and words.differs(table[name]) for table in tables)]
    if not columns:
        yield "Predicted sizes, memory, speed and build time are nearly as before.\n"
        return
    yield f"| predicted | {' | '.join(head for _, head in columns)} |\n| --- |{' ---: |' * len(columns)}"
    for change, table in list(zip(alike, tables, strict=True))[:ROWS]:
        cells = (_ends(table[name]) if name in table else "" for name, _ in columns)
        yield f"| {code(change.name)} | {' | '.join(cells)} |"
    if len(alike) > ROWS:
        yield f"| {len(alike) - ROWS} more |{' |' * len(columns)}"
    yield ""


def _ends(figure: Figure) -> str:
    before, after = (words.amount(number, figure.unit) for number in (figure.before, figure.after))
    return f"{before}<br>→ {after}" if before != after else before


def _measurements(change: Change, each: bool) -> Iterator[str]:
    moved = [one for one in change.measurements if one.state != "equal"]
    if each and (moved or change.measured):
        yield f"{code(change.name)}:\n"
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
