"""What a release says of its own making: the recipe, every measurement, every input, and one in-toto statement over all of it.

in-toto Statement v1 (https://in-toto.io/Statement/v1) with SLSA's provenance predicate (https://slsa.dev/provenance/v1; no level is
claimed). Every byte is a function of the build's facts: equal builds say the same, and nothing tells whose machine it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from buildsys.errors import BuildError
from buildsys.release.resolved import resolved, text
from buildsys.slots import modules
from buildsys.step import KEY_FORMAT, digest

if TYPE_CHECKING:
    from buildsys.measurement import Measurement
    from buildsys.release.facts import Facts, Ran

SUMS, SIGNATURE = "SHA256SUMS", "model.sig"
FOLDER = "provenance"
RECIPE, MEASUREMENTS, INPUTS = f"{FOLDER}/recipe.yaml", f"{FOLDER}/measurements.json", f"{FOLDER}/inputs.json"
STATEMENT, ENVELOPE = f"{FOLDER}/statement.json", f"{FOLDER}/statement.intoto.jsonl"
STATEMENT_TYPE, PREDICATE_TYPE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
BUILD_TYPE, BUILDER = "urn:buildsys:recipe-build:1", "urn:buildsys:builder"
"""Names, not addresses. The number grows when externalParameters, or what they mean, change."""

_LINE = re.compile(r"([0-9a-f]{64})  (.+)", re.DOTALL)
_MACHINE = ("os", "cpu", "device", "gpu")
"""What may be told of a machine; anything else that is known of it (a host's name, say) stays where it is."""


def documents(facts: Facts, files: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, bytes]:
    """The files under provenance/ but for the signed envelope. `files` and `sizes`: sha256 and bytes of all else that is released."""
    made = {
        RECIPE: text(facts.plan.recipe).encode(),
        MEASUREMENTS: document(measurements(facts)),
        INPUTS: document(inputs(facts)),
    }
    named = {**files, **{name: hashlib.sha256(raw).hexdigest() for name, raw in made.items()}}
    whole = {**sizes, **{name: len(raw) for name, raw in made.items()}}
    made[STATEMENT] = document(statement(facts, named, whole))
    return made


def document(value: Any) -> bytes:
    """JSON for people and for digests: one spelling for each value. Raises ValueError on NaN."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


# What was measured


def measurements(facts: Facts) -> dict[str, Any]:
    """Every number with its 95% interval, what it was held to, and the verdicts in words."""
    found = {}
    for check, measured in sorted(facts.measurements.items()):
        verdicts = [{"state": verdict.state, "text": verdict.text} for verdict in facts.verdicts if verdict.check == check]
        found[check] = {"measurements": [_measured(facts, check, one) for one in measured], "verdicts": verdicts}
    for verdict in facts.verdicts:
        if verdict.check not in found:
            found[verdict.check] = {"measurements": [], "verdicts": [{"state": verdict.state, "text": verdict.text}]}
    return {"interval": "95%", "checks": found}


def _measured(facts: Facts, check: str, one: Measurement) -> dict[str, Any]:
    said = {key: _number(value) if isinstance(value, float) else value for key, value in asdict(one).items()}
    limits = [
        {"set_by": knob, "side": limit.side, "bound": _number(bound), "verdict": "passed" if limit.holds(one, bound) else "failed"}
        for knob, limit, bound in _limits(facts, check)
        if limit.measurement == one.name
    ]
    return said | {"limits": limits}


def _limits(facts: Facts, check: str) -> Iterator[tuple[str, Any, float]]:
    """What the recipe's knobs and the check itself hold its measurements to."""
    module = modules("checks").get(check)
    if module is None:
        return
    knobs = facts.plan.recipe.verify.checks.get(check)
    for knob, limit in module.LIMITS.items():
        if (bound := getattr(knobs, knob, None)) is not None:
            yield f"recipe: verify.{check}.{knob}", limit, bound
    for limit, bound in module.FIXED.values():
        yield f"check {check}", limit, bound


def _number(value: float) -> float | str:
    """JSON has no NaN and no Infinity; a measurement that is one says so in a word."""
    return value if math.isfinite(value) else str(value)


# What went in


def inputs(facts: Facts) -> dict[str, Any]:
    """Files by digest and where they came from, token windows, and each step with its tools, machine and time."""
    found: dict[str, Any] = {"source": _files(facts.source)}
    for role, tokens in _texts(facts).items():
        said = {key: tokens.step.knobs.get(key) for key in ("samples", "seqlen", "seed")}
        found[role] = {"windows": said | {"digest": tokens.output.digest()}, "text": _text(facts, tokens)}
    return found | {"steps": [_step(ran) for ran in facts.steps], "tools": _tools(facts)}


def _texts(facts: Facts) -> dict[str, Ran]:
    """The token windows of calibration and of verify, as the step knows them that holds them apart."""
    apart = [ran.step for ran in facts.of_kind("disjoint")]
    return {need.role: facts.ran(need.step) for step in apart for need in step.needs}


def _text(facts: Facts, tokens: Ran) -> dict[str, Any]:
    fetched = [facts.ran(need.step) for need in tokens.step.needs if need.role == "text"]
    return _files(fetched[0]) if fetched else {"from": {"place": "written by the source model"}, "files": {}}


def _files(fetched: Ran) -> dict[str, Any]:
    files = {name: {"sha256": file.sha256, "size": file.size} for name, file in fetched.output.files.items()}
    return {"from": _whence(fetched), "files": files}


def _whence(fetched: Ran) -> dict[str, str]:
    """A hub, a repository and a commit; of a folder, no more than that it was one."""
    hints = fetched.hints
    how, pin = hints.get("how") or {}, hints.get("pin")
    told = {key: str(how[key]) for key in ("kind", "repo", "commit", "revision") if how.get(key)}
    told |= {"pin": str(pin)} if pin and not told else {}  # small files are here as soon as they are planned: nothing is fetched
    return {"place": str(how.get("hub") or hints.get("module", "hub")), **told} if told else {"place": "local"}


def _step(ran: Ran) -> dict[str, Any]:
    built = ran.built
    said = {key: built[key] for key in ("began", "ended", "seconds", "peak_rss_bytes", "peak_gpu_bytes", "versions") if key in built}
    known = {**built.get("machine", {}), **{key: built[key] for key in ("device", "gpu") if key in built}}
    machine = {key: known[key] for key in _MACHINE if key in known}
    return {"kind": ran.step.kind, "title": ran.title, "key": ran.output.key, "output": ran.output.digest(), "machine": machine} | said


def _tools(facts: Facts) -> dict[str, str]:
    """Each tool's version; several, where steps that were kept were made with others than the last."""
    seen: dict[str, set[str]] = {}
    for ran in facts.steps:
        for tool, version in ran.built.get("versions", {}).items():
            seen.setdefault(tool, set()).add(str(version))
    return {tool: ", ".join(sorted(versions)) for tool, versions in sorted(seen.items())}


# The statement


def statement(facts: Facts, files: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, Any]:
    """in-toto's Statement: these files (name -> sha256) are what this recipe makes of those inputs."""
    subjects = [{"name": name, "digest": {"sha256": files[name]}, "annotations": {"size": sizes[name]}} for name in sorted(files)]
    definition = {
        "buildType": BUILD_TYPE,
        "externalParameters": {"name": facts.name, "recipe": resolved(facts.plan.recipe)},
        "internalParameters": {"key_format": KEY_FORMAT, "artifact_key": facts.artifact.key},
        "resolvedDependencies": list(_dependencies(facts)),
    }
    details = {"builder": {"id": BUILDER, "version": _tools(facts)}, "metadata": _metadata(facts)}
    predicate = {"buildDefinition": definition, "runDetails": details}
    return {"_type": STATEMENT_TYPE, "subject": subjects, "predicateType": PREDICATE_TYPE, "predicate": predicate}


def _dependencies(facts: Facts) -> Iterator[dict[str, Any]]:
    """A ResourceDescriptor for each file that was read. Calibration and verify may share one: it is an input twice."""
    read = {"source": _files(facts.source)} | {role: _text(facts, tokens) for role, tokens in _texts(facts).items()}
    for role, held in read.items():
        whence = held["from"]
        for name, file in sorted(held["files"].items()):
            said = {"name": f"{role}/{name}", "digest": {"sha256": file["sha256"]}, "annotations": {**whence, "size": file["size"]}}
            yield said | _uri(whence)


def _uri(whence: Mapping[str, str]) -> dict[str, str]:
    """The package URL of a model on the Hugging Face hub (github.com/package-url/purl-spec); the rest has no registered type."""
    if whence["place"] == "hf_hub" and whence.get("kind") == "model" and "commit" in whence:
        return {"uri": f"pkg:huggingface/{whence['repo']}@{whence['commit'].lower()}"}
    return {}


def _metadata(facts: Facts) -> dict[str, str]:
    """A build is called by the keys of its steps: the same build, looked at twice, is one invocation."""
    began = [ran.built["began"] for ran in facts.steps if "began" in ran.built]
    ended = [ran.built["ended"] for ran in facts.steps if "ended" in ran.built]
    said = {"invocationId": digest(sorted(ran.output.key for ran in facts.steps))}
    said |= {"startedOn": min(began)} if began else {}
    return said | ({"finishedOn": max(ended)} if ended else {})


# SHA256SUMS


def sums(files: Mapping[str, str]) -> bytes:
    """SHA256SUMS of a release (name -> sha256), as `sha256sum -c` reads it: sorted, each name as it is."""
    for name in files:
        if why := unlistable(name):
            raise BuildError(ascii(name), f"cannot be released: {why}", "rename the file, or leave it out")
    return "".join(f"{files[name]}  {name}\n" for name in sorted(files)).encode()


def parse_sums(raw: bytes, where: str) -> dict[str, str]:
    """The strict inverse of `sums`: every byte of the file means something, so that a change of any of them shows."""
    again = "download the folder again, or check what is there with `sha256sum -c SHA256SUMS`"
    try:
        lines = raw.decode().split("\n")
    except UnicodeDecodeError as error:
        raise BuildError(where, f"is not UTF-8 at byte {error.start}", again) from None
    if lines.pop():
        raise BuildError(where, "does not end with a line end", again)
    files: dict[str, str] = {}
    last = ""
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise BuildError(f"{where}:{number}", "is no line of 64 hexadecimal digits, two spaces and a file's name", again)
        sha256, name = match.groups()
        if why := unlistable(name):
            raise BuildError(f"{where}:{number}", f"names {name!r}: {why}", again)
        if name <= last:
            raise BuildError(f"{where}:{number}", f"names {name!r} after {last!r}; names are sorted, each there once", again)
        files[name], last = sha256, name
    return files


def unlistable(name: str) -> str | None:
    """Why a release cannot hold a file of this name; None where it can."""
    if name in (SUMS, SIGNATURE):
        return f"{name} is not among the files that it lists" if name == SUMS else f"{name} is written last, over all the others"
    if not name.isprintable() or "\\" in name:
        return "its name holds a backslash, or a character that cannot be printed"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "its name is no path below the folder"
    return None
