"""README.md of a release: the model card that hubs show, written from what was built and measured, never from hopes.

Front matter: Hugging Face, "Model Cards" (huggingface.co/docs/hub/model-cards). The text is a function of what was built and
measured alone: equal builds have equal cards. Every string that a model or a recipe brings along is escaped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from buildsys.console import size
from buildsys.footprint import GIB
from buildsys.measurement import Measurement
from buildsys.relayout import relayout
from buildsys.release.facts import Facts
from buildsys.release.resolved import text as recipe_text
from buildsys.scheme import Schemes
from buildsys.serving.guide import README as GUIDE
from buildsys.serving.guide import shell
from buildsys.serving.settings import PROFILE, Settings, settings
from buildsys.slots import Choice

HUB = "hf_hub"  # the source whose repositories `base_model` can name
LICENSES: Mapping[str, str] = {
    "llama 3.3 community license": "llama3.3",
    "llama 3.2 community license": "llama3.2",
    "llama 3.1 community license": "llama3.1",
    "meta llama 3 community license": "llama3",
    "llama 2 community license": "llama2",
    "gemma terms of use": "gemma",
    "apache license version 2.0": "apache-2.0",
    "mit license": "mit",
    "bsd 3-clause license": "bsd-3-clause",
}
"""What a licence's first lines say -> the hub's name for it."""
LICENSE_FILE = re.compile(r"LICEN[SC]E(\.(txt|md))?", re.IGNORECASE)
READ_ELSEWHERE = ("awq", "gptq", "compressed-tensors")
"""Values of `quant_method` that vLLM and transformers load too."""
VERIFY: Mapping[str, str] = {
    "pip install 'buildsys[signing]'": "once",
    "python -m buildsys verify --path .": "every file against its digests; names what it could not check",
    "python -m buildsys verify --path . --key PUBLIC.pem": "the signatures too",
    "sha256sum -c SHA256SUMS": "without buildsys",
}
"""How to check a release, in its folder -> what that does. `doit` would need a checkout around it."""
STATES: Mapping[str, str] = {"passed": "passed", "failed": "**failed**", "skipped": "*skipped: not checked*"}


def card(facts: Facts) -> str:
    """The whole file."""
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True, width=1000)
    sections = (_opening, _measured, _gates, _how, _serving, _memory, _recipe, _provenance)
    return f"---\n{front}---\n\n" + "\n\n".join("\n".join(section(facts)) for section in sections) + "\n"


# Front matter


def front_matter(facts: Facts) -> dict[str, Any]:
    """What hubs index, as huggingface_hub's ModelCardData names it."""
    recipe, formats = facts.plan.recipe, facts.plan.recipe.format
    found: dict[str, Any] = {}
    if recipe.source.name == HUB:
        found |= {"base_model": _knob(recipe.source, "repo"), "base_model_relation": "quantized"}
    bits = {kind.bits for kind in recipe.quantization.kinds}
    methods = [method.name for method in recipe.quantization.method]
    tags = [formats.name, f"{min(bits)}-bit" if len(bits) == 1 else "mixed-precision", "quantized", "lmdeploy", *methods]
    tags += [f"kv-cache-{recipe.kv_cache.policy}"] if recipe.kv_cache.policy != "none" else []
    return {
        **found,
        "quantized_by": "buildsys",
        **license_of(facts.plan.source.files),
        "library_name": "transformers" if _in_transformers(facts) else "lmdeploy",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(tags)),
        **_model_index(facts),
    }


def license_of(files: Mapping[str, Path]) -> dict[str, str]:
    """The source's licence, from its own card or else its licence file; nothing where neither is there."""
    if "README.md" in files and (said := _front_of(files["README.md"])):
        known = {key: said[key] for key in ("license", "license_name", "license_link") if isinstance(said.get(key), str)}
        if "license" in known:
            return known
    name = next((name for name in sorted(files) if LICENSE_FILE.fullmatch(name)), None)
    if name is None:
        return {}
    opening = " ".join(re.findall(r"[\w.-]+", _opened(files[name])[:2000].casefold()))
    known_as = next((license for phrase, license in LICENSES.items() if phrase in opening), None)
    return {"license": known_as} if known_as else {"license": "other", "license_link": name}


def _front_of(path: Path) -> dict[str, Any]:
    match = re.match(r"---\s*\n(.*?)\n---\s*\n", _opened(path), re.DOTALL)
    try:
        said = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}  # a card that the source's publisher broke says nothing; its licence file may
    return said if isinstance(said, dict) else {}


def _opened(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(100_000)


def _model_index(facts: Facts) -> dict[str, Any]:
    """Perplexity in the hub's standard form, where the text is a data set that others have too."""
    text, verify = facts.plan.recipe.verify.text, facts.plan.recipe.verify
    repo = _repo(text)
    one = next((one for one in facts.measurements.get("perplexity", ()) if one.name == "quantized_perplexity"), None)
    if repo is None or one is None:
        return {}
    split = _knob(text, "split")
    asked = {"samples": verify.samples, "seqlen": verify.seqlen, "seed": verify.seed}
    data = {"type": str(repo), "name": text.name} | ({"split": split} if split else {}) | {"args": asked}
    metric = {"type": "perplexity", "value": round(one.value, 4), "name": "Perplexity"}
    return {"model-index": [{"name": facts.name, "results": [{"task": {"type": "text-generation"}, "dataset": data, "metrics": [metric]}]}]}


# Sections, as lines


def _opening(facts: Facts) -> Iterator[str]:
    recipe = facts.plan.recipe
    methods = ", then ".join(method.name.upper() for method in recipe.quantization.method)
    methods += f", by {recipe.quantization.backend.module.TOOL}" if recipe.quantization.backend.module.TOOL else ""
    policy = recipe.kv_cache.policy
    yield f"# {plain(facts.name)}"
    yield ""
    yield (
        f"{plain(_source(facts))}, quantized to {recipe.quantization.told} ({plain(methods)}), stored as {plain(recipe.format.name)}"
        f"{'' if policy == 'none' else f', with keys and values in {policy}'}, for [LMDeploy](https://github.com/InternLM/lmdeploy)."
    )


def _measured(facts: Facts) -> Iterator[str]:
    verify = facts.plan.recipe.verify
    yield "## Measured"
    yield f"Against the source, on {plain(_text(verify.text))}: {verify.samples} windows of {verify.seqlen} tokens, seed {verify.seed}."
    yield ""
    rows = [(check, one.name, _value(one), _interval(one), one.detail) for check, found in facts.measurements.items() for one in found]
    empty = [(check, "nothing was measured", "", "", "") for check, found in facts.measurements.items() if not found]
    yield from _table(("check", "measured", "value", "95% interval", "note"), [tuple(map(plain, row)) for row in (*rows, *empty)])


def _gates(facts: Facts) -> Iterator[str]:
    counted = Counter(verdict.state for verdict in facts.verdicts)
    said = [f"{counted[state]} {state}" for state in ("passed", "failed", "skipped") if counted[state]]
    yield "## Gates"
    if not facts.verdicts:
        yield "None: no measurement was held to a limit."
        return
    yield f"{', '.join(said)}. A gate holds the worse end of the 95% interval to its limit; a skipped one has not passed."
    yield ""
    rows = [(plain(verdict.check), STATES[verdict.state], plain(verdict.text)) for verdict in facts.verdicts]
    yield from _table(("check", "verdict", "evidence"), rows)


def _how(facts: Facts) -> Iterator[str]:
    recipe, a = facts.plan.recipe, facts.plan.survey.architecture
    calibration, errors = recipe.calibration, facts.layer_errors
    weights = sum(prod(shape) for shape in a.tensors().values())
    yield "## How it was quantized"
    yield f"- Source: {plain(_source(facts))}; {plain(_class(facts))}, {a.layers} layers, {weights:,} weights."
    skipped = ", ".join(recipe.quantization.skip)
    yield f"- Scheme: {recipe.quantization.scheme}. Left in half precision: {plain(skipped)}, embeddings, norms."
    if recipe.quantization.overrides:
        yield f"- Other for {', '.join(map(plain, recipe.quantization.overrides))}: see the recipe below."
    if recipe.quantization.mixed is not None:
        mixed = recipe.quantization.mixed
        yield f"- Bits chosen for each layer from {', '.join(map(str, mixed.bits))} under {mixed.budget_bits:g} bits a weight on average."
    yield (
        f"- Calibration: {plain(_text(calibration.dataset))}, {calibration.samples} windows of {calibration.seqlen} tokens, "
        f"seed {calibration.seed}; none of it is in the text that the result was measured on."
    )
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        yield (
            f"- Relative output error of the {len(errors)} quantized linears: median {median(errors.values()):.3g}, "
            f"largest {errors[worst]:.3g} ({plain(worst)})."
        )
    yield f"- Size of all files to deploy: {size(facts.artifact.size)}; the weights in half precision would be {size(2 * weights)}."


def _serving(facts: Facts) -> Iterator[str]:
    decided = profile(facts)
    yield "## Serve it"
    if decided is None:
        yield "No engine of LMDeploy serves this format with this scheme: `doit plan` says why. vLLM reads it."
        return
    yield f"`{PROFILE}` holds the engine settings below, `{GUIDE}` also Python, a client and a container."
    yield "`MODEL` is this folder, or this repository's name on its hub."
    yield ""
    server, chat = shell(decided.arguments()), shell(decided.chat_arguments())
    yield from _fence(f"MODEL=.\nlmdeploy serve api_server $MODEL {server}\nlmdeploy chat $MODEL {chat}", "sh")
    if _read_elsewhere(facts):
        own = facts.plan.survey.architecture.max_positions  # what lies beyond, LMDeploy alone is told to stretch
        session = f"--max-model-len {min(decided.engine['session_len'], own)} --tensor-parallel-size {decided.engine['tp']}"
        yield ""
        loaded = "vLLM and transformers load" if _in_transformers(facts) else "vLLM loads"
        yield f"{loaded} the same files, without the KV policy and the limits above:"
        yield ""
        yield from _fence(f"vllm serve $MODEL {session}", "sh")
        if _in_transformers(facts):
            yield from _fence(_loading(facts), "python")


def _memory(facts: Facts) -> Iterator[str]:
    serving = facts.plan.serving
    yield "## Memory"
    if serving is None:
        yield "The recipe names no target GPU."
        return
    each = f"each of {serving.count} {serving.gpu}" if serving.count > 1 else serving.gpu
    yield (
        f"Computed for {plain(each)} ({_held(serving.memory_bytes)}): {serving.sessions} sessions of full length at once, "
        f"{serving.pool_tokens:,} tokens in the KV pool, {serving.kv_bytes_per_token:,} bytes of KV a token."
    )
    yield ""
    parts = (
        ("context", serving.context_bytes),
        ("weights", serving.weights_bytes),
        ("KV pool", serving.pool_bytes),
        ("workspace", serving.workspace_bytes),
    )
    yield from _table(("part", "takes"), [(name, _held(taken)) for name, taken in parts])


def _recipe(facts: Facts) -> Iterator[str]:
    yield "## Recipe"
    yield "Bases merged, defaults written out. Where its paths lead to the same files, `doit build` makes the same model of it."
    yield ""
    yield from _fence(recipe_text(facts.plan.recipe), "yaml")


def _provenance(facts: Facts) -> Iterator[str]:
    yield "## Provenance"
    yield (
        "`provenance/statement.json` is an in-toto statement with SLSA provenance: every file's sha256, the recipe, the inputs with their "
        "digests and the tools. `provenance/inputs.json` and `provenance/measurements.json` hold the details, `SHA256SUMS` all digests. "
        "Whether it is signed shows in the folder: `model.sig` and `provenance/statement.intoto.jsonl` are there if it is."
    )
    yield ""
    yield from _fence("\n".join(f"{command:<52} # {does}" for command, does in VERIFY.items()), "sh")
    yield ""
    yield f"Artifact `{facts.artifact.digest()}`, step `{facts.artifact.key}`."


# What sections say


def profile(facts: Facts) -> Settings | None:
    """The engine settings in the artifact's deploy/lmdeploy.yaml; None where no engine serves it."""
    knobs = facts.plan.artifact.knobs
    if knobs["engine"] == "none":
        return None
    a, method = facts.plan.survey.architecture, facts.plan.recipe.format.module.QUANT_METHOD
    return settings(knobs["engine"], method, knobs["kv_cache"], knobs["target"], a.max_positions, a.rope)


def _source(facts: Facts) -> str:
    """The repository and the commit that was fetched, be it another than the recipe's branch leads to by now."""
    source, hints = facts.plan.recipe.source, facts.source.hints
    repo = _knob(source, "repo")
    if repo is None:
        return "A model of the builder's own"
    how, pin = hints.get("how") or {}, str(hints.get("pin") or "")
    if how.get("commit"):
        return f"{how.get('repo') or repo} at {how['commit']}"
    asked = f"{repo} at {_knob(source, 'revision') or 'an unnamed revision'}"
    return asked if asked.startswith(pin) else pin  # of a commit that the recipe spells out, all digits


def _class(facts: Facts) -> str:
    """The source's architecture, and the one that it is written as where that is another."""
    theirs, ours = (str(config["architectures"][0]) for config in (facts.plan.survey.config, _written(facts)))
    return theirs if theirs == ours else f"{theirs}, written as {ours}"


def _written(facts: Facts) -> Mapping[str, Any]:
    """The source's config.json under the names that the model is written in (`as: llama`)."""
    recipe, surveyed = facts.plan.recipe, facts.plan.survey
    return relayout(surveyed.architecture, surveyed.config, recipe.at("format"), _knob(recipe.format, "as_")).config


def _text(dataset: Choice) -> str:
    if dataset.module.READS == "model":
        return f"text that the source model wrote ({dataset.name})"
    repo, split = _repo(dataset), _knob(dataset, "split")
    return dataset.name + (f" ({repo})" if repo else "") + (f", split {split}" if split else "")


def _repo(dataset: Choice) -> Any:
    """The data set's repository on the hub, where it has one."""
    return _knob(dataset, "repo") or getattr(dataset.module, "REPO", None)


def _knob(choice: Choice, name: str) -> Any:
    return getattr(choice.knobs, name, None)


def _read_elsewhere(facts: Facts) -> bool:
    chosen = facts.plan.recipe.format
    return chosen.module.config(Schemes(facts.plan.recipe.quantization.scheme), ["lm_head"]).get("quant_method") in READ_ELSEWHERE


def _in_transformers(facts: Facts) -> bool:
    """Whether transformers (5.23) loads the artifact. A model that came with code of its own has none here. Of GPTQ's layout it reads one
    scheme for every linear; the experts of a mixture it holds as one tensor, and only of compressed-tensors' symmetric codes makes that."""
    asked, chosen = facts.plan.recipe.quantization, facts.plan.recipe.format.name
    if not _read_elsewhere(facts) or "auto_map" in _written(facts):
        return False
    if facts.plan.survey.architecture.experts is not None:
        return chosen == "compressed_tensors" and len(asked.kinds) == 1 and asked.symmetric
    return chosen != "gptq" or (len(asked.kinds) == 1 and not facts.plan.layers.schemes.left_float)


def _loading(facts: Facts) -> str:
    """Python that loads it. Packed zeros transformers reads only where it is told to dequantize."""
    zeros = facts.plan.recipe.format.name == "compressed_tensors" and not all(
        kind.symmetric for kind in facts.plan.recipe.quantization.kinds
    )
    names, more = "AutoModelForCausalLM", ', device_map="auto"'
    if zeros:
        names, more = f"{names}, CompressedTensorsConfig", f"{more}, quantization_config=CompressedTensorsConfig(dequantize=True)"
    return f'from transformers import {names}\nmodel = AutoModelForCausalLM.from_pretrained("."{more})'


def _value(one: Measurement) -> str:
    return f"{one.value:.4g}" if one.unit in one.name.split("_") else f"{one.value:.4g} {one.unit}"


def _held(taken: int) -> str:
    return f"{taken / GIB:.2f} GiB" if taken >= GIB / 10 else f"{taken / 2**20:.1f} MiB"


def _interval(one: Measurement) -> str:
    return "exact" if one.low == one.high else f"{one.low:.4g} to {one.high:.4g}"


# Markdown


def plain(text: object) -> str:
    """Text that renders as itself in one line, in a table's cell too: nothing in it is markup, HTML or a line's end."""
    line = " ".join("".join(each if each.isprintable() else " " for each in str(text)).split())
    line = re.sub(r"&(?=#?\w+;)", "&amp;", line).replace("<", "&lt;")
    line = re.sub(r"[\\`*\[\]|~$>]", r"\\\g<0>", line)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\_", line)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Cells are Markdown already (see `plain`)."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _fence(text: str, language: str) -> Iterator[str]:
    """A code block that its text cannot end: the fence is longer than every run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    yield f"{fence}{language}"
    yield text.rstrip("\n")
    yield fence
