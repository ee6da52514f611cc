"""Why a step may have come out otherwise: what its two manifests record of code, inputs, tools and machine, and where that differs.

The names are those of `meta["built"]` in a manifest (worker.perform writes it); docs/reproducibility.md has the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from buildsys.history import Ingredients, change, flat
from buildsys.step import Step, canonical

Use = Literal["names it", "explains", "measured", "when"]
RECORDED: Mapping[str, Use] = MappingProxyType(
    {
        **dict.fromkeys(("kind", "title"), "names it"),
        **dict.fromkeys(("version", "knobs", "inputs", "hints", "versions", "device", "gpu", "machine", "products"), "explains"),
        **dict.fromkeys(("seconds", "peak_rss_bytes", "peak_gpu_bytes"), "measured"),
        **dict.fromkeys(("began", "ended"), "when"),
    }
)
"""What a manifest records of how its step was built. What explains a difference is compared as it stands, what was measured as numbers."""

SPOKEN = {
    "device": "device",
    "gpu.name": "GPU",
    "gpu.count": "number of GPUs",
    "gpu.cuda": "CUDA",
    "machine.cpu": "CPU",
    "machine.os": "system",
    "products": "products on the CPU",
}
SLOT_OF = {
    "methods": "methods",
    "own_methods": "methods",
    "dataset": "datasets",
    "format": "formats",
    "check": "checks",
    "backend": "backends",
    "model": "archs",
}
"""Under which knob of a step which slot's modules stand."""


@dataclass(frozen=True)
class Changes:
    """What a step is made of now and was not then."""

    code: tuple[str, ...] = ()  # VERSIONs: the recipe is the same, what runs it is not
    recipe: tuple[str, ...] = ()  # knobs: it is another recipe
    files: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # of a fetch: name -> sha256 then and now ("": absent)


def changes(then: Ingredients, step: Step) -> Changes:
    """`step` as it is planned now, against what it was made of."""
    knobs = json.loads(canonical(step.knobs))
    if step.kind == "fetch" and "files" in knobs:
        old, new = then.knobs.get("files", {}), knobs["files"]
        apart = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        return Changes(files={name: (old.get(name, ""), new.get(name, "")) for name in apart})
    code = [f"step {step.kind} VERSION {then.version} -> {step.version}"] if then.version != step.version else []
    recipe = []
    for name, old, new in _unequal(then.knobs, knobs):
        told = _version(name, then.knobs, knobs)
        if told is None:
            recipe.append(change(name, old, new))
        else:
            code.append(f"{told} VERSION {old} -> {new}")
    return Changes(tuple(code), tuple(recipe))


def _unequal(then: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Leaves that differ: dotted path, both values. What is None or empty is not said: a lock does not write it."""
    old, new = dict(flat(then, "")), dict(flat(now, ""))
    for name in {**old, **new}:
        if _said(old.get(name)) != _said(new.get(name)):
            yield name, old.get(name, "(unset)"), new.get(name, "(unset)")


def _said(value: Any) -> Any:
    return None if value in ([], {}) else value


def _version(path: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Whose VERSION stands at a path of the knobs: `methods/gptq`; None where it is none, or where another choice stands there now."""
    if path == "quant":
        return "quant"
    if path.rpartition(".")[2] != "version":
        return None
    slot = SLOT_OF.get(path.partition(".")[0].partition("[")[0])
    holder = path.rpartition(".")[0]
    names = {_name(dict(flat(knobs, "")), holder) for knobs in (then, now)}
    return f"{slot}/{names.pop()}" if slot is not None and len(names) == 1 else None


def _name(leaves: Mapping[str, Any], holder: str) -> str:
    return str(leaves.get(f"{holder}.name") or leaves.get(f"{holder}.arch") or "")


def tools(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """Versions of tools and kinds of machine that differ between two manifests' `built`; a tool that one of the two did not load says
    nothing: a process that ran other steps before has loaded more."""
    found = []
    old, new = then.get("versions", {}), now.get("versions", {})
    found += [f"{name} {old[name]} -> {new[name]}" for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    flat_then, flat_now = (dict(flat({name: said[name] for name in SAID if name in said}, "")) for said in (then, now))
    for name, spoken in SPOKEN.items():
        a, b = flat_then.get(name, "none"), flat_now.get(name, "none")
        if a != b:
            found.append(f"{spoken} {a} -> {b}")
    return tuple(found)


SAID = ("device", "gpu", "machine", "products")


def told(versions: Mapping[str, str], on: str, now: Mapping[str, Any]) -> tuple[str, ...]:
    """The same, of a build that a lock alone tells of: `versions` of its tools, and the GPU or CPU that it ran `on` ("": not told)."""
    new, gpu = now.get("versions", {}), now.get("gpu", {}).get("name")
    found = [f"{name} {versions[name]} -> {new[name]}" for name in sorted(versions.keys() & new.keys()) if versions[name] != new[name]]
    here = str(gpu or now.get("machine", {}).get("cpu", ""))
    return (*found, *([f"{'GPU' if gpu else 'CPU'} {on} -> {here}"] if on and here and on != here else []))


def inputs(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """Files that a step read and that were not what they are, by role."""
    unequal = _unequal_files(then.get("inputs", {}), now.get("inputs", {}))
    return tuple(f"input {role}/{name} differs ({shown(a)} -> {shown(b)})" for role, name, a, b in unequal)


def _unequal_files(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for role in sorted(then.keys() | now.keys()):
        old, new = then.get(role, {}), now.get(role, {})
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                yield role, name, old.get(name, ""), new.get(name, "")


def shown(sha256: str) -> str:
    return sha256[:12] if sha256 else "absent"
