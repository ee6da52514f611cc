"""A recipe becomes a graph of steps, and every misfit that can be known without a GPU is refused here, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from buildsys import effort, footprint, gpus, remedies
from buildsys.architecture import Linear
from buildsys.errors import BuildError, BuildErrors
from buildsys.linears import Linears, linears
from buildsys.located import Located
from buildsys.measurement import scores_file
from buildsys.quant import VERSION as QUANT
from buildsys.recipe import Recipe
from buildsys.relayout import Relayout, relayout
from buildsys.scheme import Scheme, Schemes
from buildsys.serving.settings import PROFILE
from buildsys.slots import Choice, modules
from buildsys.step import Need, Step
from buildsys.store import Store
from buildsys.survey import Survey, describe, survey

if TYPE_CHECKING:
    from buildsys.serving.host import Host

WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json")
"""What a step reads that computes with a model."""

CHAT = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json")
"""Beside the tokenizer, what turns a conversation into text, and special tokens into their ids."""

SERVED = ("rope_scaling", "tool_call_parser")
"""Knobs of the target that change no number that planning knows."""

LOADED = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", PROFILE)
"""What an engine reads of an artifact: not what is written there for people."""

CHOSEN = "schemes.json"
"""What allocate writes: the scheme of each linear."""

VERSIONS = MappingProxyType(
    {
        **dict.fromkeys(("fetch", "tokens", "disjoint", "calibrate", "allocate", "measure", "generate", "serve"), 1),
        **dict.fromkeys(("quantize", "score"), 2),
        **dict.fromkeys(("assemble", "pack"), 3),
    }
)
"""Of the steps' own glue in steps.py; arithmetic, methods, formats and checks have VERSIONs of their own, which are in the keys too."""


@dataclass(frozen=True)
class Plan:
    """One recipe's graph. `steps` are in topological order and end with the measurements."""

    recipe: Recipe
    survey: Survey
    layers: Linears
    steps: tuple[Step, ...]
    artifact: Step  # its output is the deployable folder
    quantized: Step  # its output names each layer's error
    measures: tuple[tuple[str, Step], ...]
    generated: Step | None  # both models' answers to the recipe's prompts; only a report runs it
    source: Located
    building: effort.Building
    serving: footprint.Serving | None  # None: the recipe names no target
    notes: tuple[str, ...]
    skipped: Mapping[str, str]  # checks that the recipe names and that cannot run here, each with why

    @property
    def name(self) -> str:
        return self.recipe.name


def plan(
    recipe: Recipe,
    store: Store,
    threads: int = 2,
    host: Host | str = "nobody looked for a GPU",
    device: Literal["auto", "cpu", "cuda"] = "cpu",
) -> Plan:
    """The graph of `recipe`; `threads` and `device` tell only how long it takes, `host` what can run an engine here, or why nothing can.
    Raises BuildErrors with every misfit of the recipe and its model."""
    source = located(recipe, ("source",), recipe.source, store)
    surveyed = survey(source.files, source.sizes)
    layers, errors = linears(recipe, surveyed)
    errors += [*misfits(recipe, surveyed, layers.schemes), *_backend_misfits(recipe, surveyed, layers.schemes)]
    if errors:
        raise BuildErrors(errors)
    graph = Graph(recipe, surveyed, layers, store, source)
    fetched = graph.fetch("source", "sources", recipe.source.name, source)
    calibration = graph.tokens("calibration", fetched)
    text = graph.tokens("verify", fetched)
    disjoint = graph.disjoint(calibration, text)
    calibrated = graph.calibrate(fetched, calibration, disjoint)
    if recipe.quantization.mixed is not None:
        graph = replace(graph, allocated=graph.allocate(fetched, calibrated, calibration))
    quantized = graph.quantize(fetched, calibrated, calibration, disjoint)
    packed = graph.pack(fetched, quantized)
    artifact = graph.assemble(fetched, packed, source.names)
    host = _serves(recipe, surveyed, host)
    skipped = {name: host for name in recipe.verify.checks if isinstance(host, str) and _needs_engine(name)}
    served = None if isinstance(host, str) else partial(graph.serve, fetched, packed, artifact, text, host)
    measures = tuple(graph.measures(fetched, quantized, packed, text, served))
    last = (artifact, *(step for _, step in measures))
    steps = {step.planned_key: step for end in last for step in end.walk()}
    return Plan(
        recipe=recipe,
        survey=surveyed,
        layers=layers,
        steps=tuple(steps.values()),
        artifact=artifact,
        quantized=quantized,
        measures=measures,
        generated=graph.generate(fetched, packed, source.names),
        source=source,
        building=_building(recipe, surveyed, layers.schemes, threads, device),
        serving=_serving(recipe, surveyed, layers.schemes),
        notes=(
            *engine(recipe, surveyed)[1],
            *_ungated(recipe),
            *_unmeasured(recipe, surveyed),
            *(f"verify.{name} is skipped here: {why}" for name, why in skipped.items()),
        ),
        skipped=skipped,
    )


def located(recipe: Recipe, where: tuple[str, ...], chosen: Choice, store: Store) -> Located:
    """The files of the recipe's choice at `where`; what is wrong with them is told at the recipe's own line."""
    try:
        found: Located = chosen.module.locate(chosen.knobs, recipe.folder(*where), store.home / "hub")
    except BuildError as error:
        raise BuildError(recipe.at(*where, chosen.name), f"{error.where}: {error.what}", error.fix) from None
    return found


# What does not fit


def misfits(recipe: Recipe, surveyed: Survey, schemes: Schemes) -> list[BuildError]:
    """Where the recipe and the model do not go together."""
    a = surveyed.architecture
    errors: list[BuildError] = []
    try:
        made = _relaid(recipe, surveyed)
    except BuildError as error:
        return [error]
    default, mixed = recipe.quantization.scheme, recipe.quantization.mixed
    seen, kinds = set(), dict[Scheme, None]()
    for linear, layer in ((linear, layer) for linear in made.architecture.linears for layer in range(a.layers)):
        name = a.prefix(layer) + made.parts[linear.name].name  # as the recipe calls it
        scheme = schemes.of(name)
        if scheme is None:
            continue
        kinds[scheme] = None
        few = [replace(scheme, bits=bits) for bits in mixed.bits] if mixed is not None and scheme.bits == default.bits else []
        for kind in (scheme, *few):
            if (linear.role, linear.in_features, linear.out_features, kind) not in seen:
                seen.add((linear.role, linear.in_features, linear.out_features, kind))
                errors += _unfit(recipe, name, linear, kind)
    reason = recipe.format.module.mixes(tuple(kinds)) if len(kinds) > 1 else None
    if reason is not None:
        fix = "give all linears one scheme, or name another format"
        errors.append(BuildError(recipe.at("quantization", "overrides"), f"format {recipe.format.name} {reason}", fix))
    reason = recipe.format.module.keeps_float([*sorted(schemes.left_float), *a.routers()])
    if reason is not None:
        where, fix = recipe.at("format"), "name another format"
        if schemes.left_float:
            where, fix = recipe.at("quantization", "skip"), f"{fix}, or skip lm_head alone"
        errors.append(BuildError(where, f"format {recipe.format.name} {reason}", fix))
    for section, asked in (("calibration", recipe.calibration), ("verify", recipe.verify)):
        if asked.seqlen > a.max_positions:
            what = f"{section}.seqlen is {asked.seqlen}; the model has {a.max_positions} positions"
            errors.append(BuildError(recipe.at(section, "seqlen"), what, f"set {section}.seqlen: {a.max_positions}"))
    return errors + _target_misfits(recipe, surveyed, schemes)


def _relaid(recipe: Recipe, surveyed: Survey) -> Relayout:
    return relayout(surveyed.architecture, surveyed.config, recipe.at("format"), getattr(recipe.format.knobs, "as_", None))


def _unfit(recipe: Recipe, name: str, linear: Linear, scheme: Scheme) -> Iterator[BuildError]:
    """Why one linear cannot be held in its scheme."""
    format, short = recipe.format.module, name.rpartition(".")[2]
    reason = format.accepts(scheme) or format.fits(scheme, linear.in_features, linear.out_features)
    if not scheme.divides(linear.in_features):
        divisors = [size for size in (128, 64, 32) if linear.in_features % size == 0]
        fix = f"set group_size: {divisors[0] if divisors else -1}, or skip {short}"
        what = f"quantization.group_size {scheme.group_size} does not divide the {linear.in_features} input channels of {name}"
        yield BuildError(recipe.at("quantization", "group_size"), what, fix)
    elif reason is not None:
        yield BuildError(recipe.at("format"), f"format {recipe.format.name} cannot hold {name}: {reason}", f"skip {short}")


def _backend_misfits(recipe: Recipe, surveyed: Survey, schemes: Schemes) -> Iterator[BuildError]:
    """Why another tool cannot quantize this model."""
    for key, what, fix in recipe.quantization.backend.module.unfit(surveyed.config, surveyed.architecture, schemes.left_float):
        yield BuildError(recipe.at("quantization", key), what, fix)


def _target_misfits(recipe: Recipe, surveyed: Survey, schemes: Schemes) -> list[BuildError]:
    target, gpu = recipe.target, _gpu(recipe)
    if target is None or gpu is None:
        return []
    errors = []
    kinds = recipe.quantization.kinds
    reason = gpus.refusal(gpu, recipe.format.name, kinds)
    if reason is not None:
        several = "leave target out: vLLM reads several schemes in one model, and no engine of LMDeploy"
        fix = several if len(kinds) > 1 else "name another GPU or format"
        errors.append(BuildError(recipe.at("target", "gpu"), f"target.gpu: {reason}", fix))
    errors += _positions(recipe, surveyed)
    reason = remedies.indivisible(surveyed.architecture, target.count)
    if reason is not None:
        errors.append(BuildError(recipe.at("target", "count"), f"target.count: {reason}", "set count to 1, 2, 4 or 8"))
        return errors
    serving = _serving(recipe, surveyed, schemes)
    if serving is not None and not serving.fits:
        errors.append(_too_small(recipe, surveyed, schemes, serving))
    return errors


def _too_small(recipe: Recipe, surveyed: Survey, schemes: Schemes, serving: footprint.Serving) -> BuildError:
    """With each part, and each single change that would make it fit."""
    said, kinds, gib = on_target(recipe, surveyed), recipe.quantization.kinds, footprint.GIB
    assert said is not None

    def runs(gpu: gpus.GPU, policy: gpus.KvPolicy) -> bool:
        heads = gpus.head_dims(gpu.sm, policy)
        return gpus.refusal(gpu, recipe.format.name, kinds) is None and surveyed.architecture.head_dim in heads

    parts = {"context": serving.context_bytes, "weights": serving.weights_bytes, "workspace": serving.workspace_bytes}
    told = ", ".join(f"{name} {size / gib:.1f}" for name, size in parts.items())
    told += f", one session of {said.session_len} tokens {serving.session_bytes / gib:.1f}"
    what = f"needs {serving.needed_bytes / gib:.1f} GiB ({told}), with {said.max_entry_count:g} of what is free for the KV pool; "
    what += f"{serving.memory_bytes / gib:.1f} GiB are there, {-serving.spare_bytes / gib:.1f} GiB too few"
    fix = remedies.hint(surveyed.architecture, schemes, said, runs)
    return BuildError(recipe.at("target"), f"target {said.gpu.name} x {said.count}: {what}", fix)


def _positions(recipe: Recipe, surveyed: Survey) -> Iterator[BuildError]:
    """Sessions beyond the model's own positions, where these are not stretched or cannot be."""
    assert recipe.target is not None
    asked, own, rope = recipe.target.rope_scaling, surveyed.architecture.max_positions, surveyed.architecture.rope
    session_len = _session_len(recipe, surveyed)
    said = f"target.session_len is {session_len}; the model has {own} positions"
    if asked is None and session_len <= own:
        return
    if asked is not None and session_len <= own:
        fix = f"leave rope_scaling out, or set a session_len beyond {own}"
        yield BuildError(recipe.at("target", "rope_scaling"), f"target.rope_scaling: {asked} has nothing to stretch: {said}", fix)
        return
    within, lacks = f"set session_len: {own}", None
    if rope.kind not in ("default", "dynamic"):
        lacks = f"a rule of its own for them, {rope.kind}, which is not stretched again"
    elif engine(recipe, surveyed)[0] != "turbomind":
        lacks = "no TurboMind to serve it, and LMDeploy's PyTorch engine turns all sessions of a batch by its longest one"
    if asked is not None and lacks is not None:
        fix = f"{within} and leave rope_scaling out"
        yield BuildError(recipe.at("target", "rope_scaling"), f"target.rope_scaling: {asked} stretches no such model: it has {lacks}", fix)
    elif asked is None:
        fix = f"{within}, or rope_scaling: dynamic beside it" if lacks is None else within
        yield BuildError(recipe.at("target", "session_len"), said, fix)


def engine(recipe: Recipe, surveyed: Survey) -> tuple[str, tuple[str, ...]]:
    """The engine of LMDeploy that deploy/ names, "none" where there is none; and why it is not TurboMind, its faster one."""
    written, kinds, gpu = _relaid(recipe, surveyed).config, recipe.quantization.kinds, _gpu(recipe)
    lacks = [*gpus.turbomind_lacks(recipe.format.name, kinds, recipe.kv_cache.policy, surveyed.architecture.head_dim, gpu)]
    if not describe(written, recipe.at("format"))[1].TURBOMIND:
        lacks.insert(0, f"TurboMind does not implement {written['architectures'][0]}")
    if not lacks:
        return "turbomind", ()
    beside = [*gpus.engine_lacks("pytorch", recipe.format.name, kinds, gpu)]
    if not beside:
        return "pytorch", tuple(f"{reason}, so deploy/ names LMDeploy's PyTorch engine" for reason in lacks)
    return "none", (f"no engine of LMDeploy serves this, so there is no {PROFILE}: {'; '.join((*lacks, *beside))}",)


def _needs_engine(check: str) -> bool:
    return "served" in modules("checks")[check].READS


def needs_engine(recipe: Recipe) -> bool:
    """Whether a check that the recipe names starts an engine: whoever plans it then looks for a GPU."""
    return any(map(_needs_engine, recipe.verify.checks))


def _serves(recipe: Recipe, surveyed: Survey, host: Host | str) -> Host | str:
    """The machine that the recipe's target is, or why this one is not it."""
    named, lacks = engine(recipe, surveyed)
    if named == "none":
        return "; ".join(lacks)
    if isinstance(host, str):
        return host
    target, found = recipe.target, [device.name for device in host.devices]
    if target is None:
        return host
    theirs = [name for name in found if target.gpu.lower() in gpus.close(name)]
    if len(theirs) < target.count:
        return f"the target is {target.count} x {target.gpu}, here {'is' if len(found) == 1 else 'are'} {', '.join(found)}"
    return host


def _ungated(recipe: Recipe) -> Iterator[str]:
    """Qualities that the recipe measures and does not gate."""
    checks = recipe.verify.checks
    if getattr(checks.get("kl"), "max_nats", None) is None:
        yield "no gate on quality: verify: {kl: {max_nats: 0.05}} would refuse what drifts too far from the source"
    policy, kv = recipe.kv_cache.policy, checks.get("kv")
    if policy != "none" and getattr(kv, "max_nats", None) is None and getattr(kv, "max_increase_nats", None) is None:
        yield f"kl is measured without the KV cache's {policy}: verify: {{kv: {{max_increase_nats: 0.01}}}} would gate what that adds"


def scored_policies(recipe: Recipe) -> tuple[gpus.KvPolicy, ...]:
    """KV policies that are scored beside none: those that the kv check names, and the recipe's own."""
    own, named = recipe.kv_cache.policy, recipe.verify.checks.get("kv")
    asked = {own, *getattr(named, "policies", ())} - {"none"}
    return tuple(policy for policy in footprint.KV_BITS if policy in asked)


def _unmeasured(recipe: Recipe, surveyed: Survey) -> Iterator[str]:
    """What is served beyond what verify can see."""
    own = surveyed.architecture.max_positions
    if recipe.target is not None and recipe.target.rope_scaling is not None:
        yield f"prompts of more than {own} tokens are stretched; what verify measures holds for shorter ones"


def _gpu(recipe: Recipe) -> gpus.GPU | None:
    """A name that the table lacks was refused with the recipe."""
    return gpus.lookup(recipe.target.gpu) if recipe.target is not None else None


def _session_len(recipe: Recipe, surveyed: Survey) -> int:
    asked = recipe.target.session_len if recipe.target is not None else None
    return asked or surveyed.architecture.max_positions


def _source_engine(recipe: Recipe, surveyed: Survey) -> dict[str, str]:
    """What serves the source model on the target: {engine}, or {why} not. Speed is held beside the faster one of LMDeploy's two engines."""
    gpu, policy = _gpu(recipe), recipe.kv_cache.policy
    target = recipe.target
    if target is not None and gpu is not None:
        alone = footprint.serving(
            surveyed.architecture,
            None,
            gpu,
            kv_policy="none",
            max_entry_count=recipe.kv_cache.max_entry_count,
            session_len=_session_len(recipe, surveyed),
            max_batch_size=target.max_batch_size,
            count=target.count,
        )
        if not alone.fits:
            few = f"{-alone.spare_bytes / footprint.GIB:.1f} GiB too few"
            return {"why": f"the source model does not fit {target.gpu} x {target.count}: {few}"}
    lacks = [*gpus.turbomind_lacks("fp16", (), policy, surveyed.architecture.head_dim, gpu)]
    return {"engine": "pytorch" if lacks or not surveyed.turbomind else "turbomind"}


def on_target(recipe: Recipe, surveyed: Survey) -> footprint.Asked | None:
    """Of the target GPU; None where the recipe names none."""
    target, gpu, kv = recipe.target, _gpu(recipe), recipe.kv_cache
    if target is None or gpu is None:
        return None
    return footprint.Asked(gpu, target.count, kv.policy, kv.max_entry_count, _session_len(recipe, surveyed), target.max_batch_size)


def serving_with(recipe: Recipe, surveyed: Survey, schemes: Schemes, policy: gpus.KvPolicy) -> tuple[footprint.Serving | None, str]:
    """How the recipe's target would serve it with another KV policy (None: it names none), and the engine that would."""
    other = recipe.model_copy(update={"kv_cache": recipe.kv_cache.model_copy(update={"policy": policy})})
    return _serving(other, surveyed, schemes), engine(other, surveyed)[0]


def _serving(recipe: Recipe, surveyed: Survey, schemes: Schemes) -> footprint.Serving | None:
    said = on_target(recipe, surveyed)
    if said is None:
        return None
    held = footprint.held(surveyed.architecture, schemes, said.count)
    return footprint.filled(surveyed.architecture, schemes, held, said)


def _builder(recipe: Recipe, device: str) -> gpus.GPU | None:
    """The GPU that builds: this machine's; where `device=cuda` asks for one and there is none, the target's. None: the processors do."""
    if device == "cpu":
        return None
    return gpus.here() or (_gpu(recipe) if device == "cuda" else None)


def _building(recipe: Recipe, surveyed: Survey, schemes: Schemes, threads: int, device: str) -> effort.Building:
    gpu = _builder(recipe, device)
    building = effort.building(
        surveyed.architecture,
        schemes,
        effort.cpu_speed(threads) if gpu is None else effort.cuda_speed(gpu),
        samples=recipe.calibration.samples,
        seqlen=recipe.calibration.seqlen,
        verify_windows=recipe.verify.samples,
        verify_seqlen=recipe.verify.seqlen,
        verify_streams=2 + len(scored_policies(recipe)),
        gptq=bool(recipe.quantization.method[-1].module.SEES_TOKENS),
        sampled=[
            (asked.samples, asked.seqlen)
            for asked, dataset in ((recipe.calibration, recipe.calibration.dataset), (recipe.verify, recipe.verify.text))
            if dataset.module.READS == "model"
        ],
    )
    if not recipe.quantization.backend.module.TOOL:
        return building
    ours = ("calibrate", "quantize")  # a tool's own seconds are not known
    return replace(building, seconds={kind: seconds for kind, seconds in building.seconds.items() if kind not in ours})


# The graph


def _method(chosen: Choice) -> dict[str, Any]:
    return {"name": chosen.name, "version": chosen.module.VERSION, "knobs": chosen.knobs.model_dump()}


@dataclass(frozen=True)
class Graph:
    """Makes a recipe's steps; each names exactly the knobs and the files that it reads."""

    recipe: Recipe
    surveyed: Survey
    layers: Linears
    store: Store
    located: Located  # the source's files
    allocated: Step | None = None  # chooses each linear's bits, where the recipe leaves that open

    def _step(self, kind: str, title: str, knobs: Mapping[str, Any], *needs: Need, **more: Any) -> Step:
        return Step(kind, title, VERSIONS[kind], knobs, needs, **{"heavy": True, **more})

    @property
    def _packing(self) -> dict[str, Any]:
        """How the packed weights are to be read."""
        chosen = self.recipe.format
        return {
            "format": {"name": chosen.name, "version": chosen.module.VERSION, "knobs": chosen.knobs.model_dump()},
            **self.layers.schemes.to_json(),
        }

    @property
    def _bits(self) -> tuple[Need, ...]:
        """Where linears' bits are told, unless the recipe tells them."""
        return (Need("bits", self.allocated, (CHOSEN,)),) if self.allocated is not None else ()

    def fetch(self, what: str, slot: str, name: str, found: Located) -> Step:
        """Its key holds what the files are, never where they come from: a model on a hub and its copy on a disk are one step."""
        files = {file: found.sha256.get(file) or self.store.sha256(found.files[file]) for file in found.names}
        if found.how:
            hints: dict[str, Any] = {"how": dict(found.how), "slot": slot, "module": name}
        else:
            hints = {"paths": {file: str(path.absolute()) for file, path in found.files.items()}}
            hints |= {"module": name, "pin": found.pin} if found.pin else {}  # all of a hub's files may be here
        title = f"{what} ({name}{' ' + found.pin if found.pin else ''})"
        return self._step("fetch", title, {"files": files}, heavy=bool(found.how), hints=hints, promises=files)

    def tokens(self, section: str, source: Step) -> Step:
        """Windows of one of the recipe's two texts; files are fetched first where the dataset has any."""
        asked = self.recipe.calibration if section == "calibration" else self.recipe.verify
        key = "dataset" if section == "calibration" else "text"
        dataset: Choice = getattr(asked, key)
        module, written = dataset.module, dataset.knobs.model_dump(exclude=set(dataset.module.PLACES))
        knobs = {
            "dataset": {"name": dataset.name, "version": module.VERSION, "knobs": written},
            "samples": asked.samples,
            "seqlen": asked.seqlen,
            "seed": asked.seed,
        }
        where = self.recipe.at(section, "samples")
        if module.READS == "model":
            knobs |= {"model": self.surveyed.computed, "quant": QUANT}
            needs = [Need("source", source, WEIGHTS)]
        else:
            knobs |= {"vocab_size": self.surveyed.architecture.vocab_size}
            found = located(self.recipe, (section, key), dataset, self.store)
            text = self.fetch(f"{section} text", "datasets", dataset.name, found)
            if module.READS == "chat":
                fix = "use text_files for a base model, or the chat model of its family as the source"
                self._has_template(section, key, "the dataset holds conversations", fix)
            needs = [Need("source", source, self._tokenizer(module.READS == "chat")), Need("text", text)]
        title = f"{section} {dataset.name} {asked.samples} x {asked.seqlen}, seed {asked.seed}"
        return self._step("tokens", title, knobs, *needs, hints={"where": where}, computes=module.READS == "model")

    def _has_template(self, section: str, key: str, needed: str, fix: str) -> None:
        from buildsys.io.chat import has_template

        if not has_template(self.located.files):
            raise BuildError(self.recipe.at(section, key), f"the model has no chat template, and {needed}", fix)

    def _tokenizer(self, chat: bool) -> tuple[str, ...]:
        """Files of the source that turn text into tokens; tokenizer.json says it all, a sentencepiece model leaves added tokens out."""
        whole = self.surveyed.tokenizer == "tokenizer.json" and not chat
        return (self.surveyed.tokenizer,) if whole else (self.surveyed.tokenizer, *CHAT)

    def disjoint(self, calibration: Step, text: Step) -> Step:
        """Refuses verify text that calibration has seen; nothing reads its output, but nothing expensive starts before it."""
        needs = Need("calibration", calibration), Need("verify", text)
        return self._step("disjoint", "verify text is new", {}, *needs, hints={"where": self.recipe.at("verify", "text")})

    def calibrate(self, source: Step, tokens: Step, disjoint: Step) -> Step:
        knobs = {"model": self.surveyed.computed, "quant": QUANT}
        needs = Need("source", source, WEIGHTS), Need("tokens", tokens)
        return self._step("calibrate", "activation statistics", knobs, *needs, after=(disjoint,), computes=True)

    def _methods(self) -> list[dict[str, Any]]:
        return [_method(chosen) for chosen in self.recipe.quantization.method]

    def allocate(self, source: Step, stats: Step, tokens: Step) -> Step:
        """Bits for each linear from what it costs to have fewer there."""
        mixed = self.recipe.quantization.mixed
        assert mixed is not None
        knobs = {
            "model": self.surveyed.computed,
            "quant": QUANT,
            **self.layers.schemes.to_json(),
            "methods": self._methods()[:-1],
            "mixed": mixed.model_dump(mode="json"),
        }
        title = f"bits from {', '.join(map(str, mixed.bits))} under {mixed.budget_bits:g}"
        needs = Need("source", source, WEIGHTS), Need("stats", stats), Need("tokens", tokens)
        return self._step("allocate", title, knobs, *needs, computes=True, hints={"where": self.recipe.at("quantization", "mixed")})

    def quantize(self, source: Step, stats: Step, tokens: Step, disjoint: Step) -> Step:
        asked, own, backend = self.recipe.quantization, self.layers.methods, self.recipe.quantization.backend
        methods = {name: _method(chosen) for name, chosen in sorted(own.items())}
        knobs = {
            "model": self.surveyed.computed,
            "quant": QUANT,
            **self.layers.schemes.to_json(),
            "methods": self._methods(),
        } | ({"own_methods": methods} if methods else {})
        if backend.module.TOOL:  # its methods are the tool's, whatever version ours have
            knobs |= {"methods": [chosen.name for chosen in asked.method], "backend": _method(backend)}
        reads = backend.module.READS
        needs = [Need("source", source, WEIGHTS), *([Need("stats", stats)] if "stats" in reads else ()), *self._bits]
        if "stats" not in reads or any(chosen.module.SEES_TOKENS for chosen in (asked.method[-1], *own.values())):
            needs.append(Need("tokens", tokens))
        title = f"{asked.told}, {' + '.join(m.name for m in asked.method)}{f' by {backend.module.TOOL}' if backend.module.TOOL else ''}"
        hints = {"where": self.recipe.at("quantization", "backend")} if backend.module.TOOL else {}
        after = () if "stats" in reads else (disjoint,)
        return self._step("quantize", title, knobs, *needs, after=after, hints=hints, resumes=backend.module.RESUMES, computes=True)

    def pack(self, source: Step, blocks: Step) -> Step:
        knobs = {"model": self.surveyed.computed, "quant": QUANT, **self._packing}
        needs = Need("source", source, WEIGHTS), Need("blocks", blocks, ("*.safetensors",)), *self._bits
        return self._step("pack", f"format {self.recipe.format.name}", knobs, *needs, computes=True)

    def assemble(self, source: Step, packed: Step, files: tuple[str, ...]) -> Step:
        """Everything of the source that is not weights, the packed weights, and how to serve them."""
        target = self.recipe.target.model_dump() if self.recipe.target is not None else None
        if self.recipe.target is not None and self.recipe.target.tool_call_parser is not None:
            self._has_template("target", "tool_call_parser", "a server calls tools through it", "leave tool_call_parser out")
        knobs = {
            **self._packing,
            "model": self.surveyed.computed,
            "kv_cache": self.recipe.kv_cache.model_dump(),
            "target": target,
            "engine": engine(self.recipe, self.surveyed)[0],
        }
        rest = tuple(sorted(name for name in files if not name.endswith((".safetensors", ".safetensors.index.json"))))
        needs = Need("source", source, rest), Need("packed", packed), *self._bits
        return self._step("assemble", "deployable folder", knobs, *needs, heavy=False)

    def score(self, source: Step, packed: Step, tokens: Step, policies: tuple[str, ...]) -> Step:
        """One walk over both models for these KV policies. What is scored without one has the key that it had before there were several."""
        knobs = {"model": self.surveyed.computed, "quant": QUANT, **self._packing}
        knobs["kv"] = "none" if policies == ("none",) else list(policies)
        needs = Need("source", source, WEIGHTS), Need("packed", packed), Need("tokens", tokens), *self._bits
        title = "predictions beside the source's" + ("" if policies == ("none",) else f", KV cache {', '.join(policies)}")
        return self._step("score", title, knobs, *needs, computes=True)

    def scores(self, source: Step, packed: Step, tokens: Step) -> tuple[Need, ...]:
        """What checks read of predictions: without a KV policy, and with each that is asked for (docs/decisions/0017-kv-policies.md).

        A recipe that names the kv check has all its policies scored in one walk, the same for each of kv_cache.policy. One that only has a
        policy pays for it alone, beside the scores without one that its recipe without a policy has too.
        """
        own, named = self.recipe.kv_cache.policy, self.recipe.verify.checks.get("kv")
        asked = scored_policies(self.recipe)
        if named is not None:
            plain = with_kv = self.score(source, packed, tokens, ("none", *asked))
        else:
            plain, with_kv = self.score(source, packed, tokens, ("none",)), self.score(source, packed, tokens, (own,))
        needs = [Need("scores", plain, (scores_file("none"),))]
        return (*needs, Need("kv_scores", with_kv, tuple(map(scores_file, asked)))) if asked else tuple(needs)

    def generate(self, source: Step, packed: Step, files: tuple[str, ...]) -> Step | None:
        """Both models' greedy answers to the recipe's prompts."""
        asked = self.recipe.report
        prompts = [*asked.prompts, *self._prompts_file()]
        if not prompts:
            return None
        knobs = {
            "prompts": prompts,
            "max_new_tokens": asked.max_new_tokens,
            "chat": asked.chat,
            "model": self.surveyed.computed,
            "quant": QUANT,
            **self._packing,
        }
        beside = tuple(name for name in (self.surveyed.tokenizer, *CHAT, "generation_config.json") if name in files)
        needs = Need("source", source, (*WEIGHTS, *beside)), Need("packed", packed), *self._bits
        where = self.recipe.at("report")
        title = f"answers to {len(prompts)} prompts"
        return self._step("generate", title, knobs, *needs, hints={"where": where}, computes=True)

    def _prompts_file(self) -> list[str]:
        """Prompts of `report.path`, one a line."""
        if self.recipe.report.path is None:
            return []
        path = self.recipe.folder("report") / self.recipe.report.path
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            what = f"{path} cannot be read as text: {error.strerror if isinstance(error, OSError) else error}"
            raise BuildError(self.recipe.at("report", "path"), what, "write a UTF-8 file with one prompt a line") from None
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise BuildError(self.recipe.at("report", "path"), f"{path} holds no prompt", "write one prompt a line, or leave path out")
        return prompts

    def serve(self, source: Step, packed: Step, artifact: Step, tokens: Step, host: Host, asked: Any) -> Step:
        """A server of the artifact, and what it is held beside, on this machine's GPU: of another GPU, driver or engine it says nothing."""
        report, module = self.recipe.report, modules("checks")["serve"]
        chosen = asked.model_dump(mode="json", exclude={*module.LIMITS, *module.ASIDE})
        count = 1 if self.recipe.target is None else self.recipe.target.count
        policy = self.recipe.kv_cache.policy
        knobs = {
            "asked": chosen,
            "prompts": [*report.prompts, *self._prompts_file()],
            "chat": report.chat,
            "host": {"lmdeploy": host.lmdeploy, "gpus": [[device.name, device.driver] for device in host.devices[:count]]},
            "source": _source_engine(self.recipe, self.surveyed),
            "token_bytes": {said: footprint.kv_bytes_per_token(self.surveyed.architecture, said, count) for said in ("none", policy)},
            "kv": policy,
            "model": self.surveyed.computed,
            "quant": QUANT,
            **self._packing,
        }
        needs = (
            Need("source", source),
            Need("packed", packed),
            Need("artifact", artifact, LOADED),
            Need("tokens", tokens),
            *self._bits,
        )
        hints = {"python": host.python, "timeout_s": asked.timeout_s, "where": self.recipe.at("verify", "serve")}
        title = f"a server on {', '.join(sorted({device.name for device in host.devices[:count]}))}"
        return self._step("serve", title, knobs, *needs, hints=hints, computes=True, engine=True)

    def measures(
        self, source: Step, quantized: Step, packed: Step, tokens: Step, served: Callable[[Any], Step] | None
    ) -> Iterator[tuple[str, Step]]:
        """One step a check, without its limits: those are judged, and a change of them measures nothing again. `served` makes the step
        that a check reads which asks an engine; None: there is none here, and such a check is skipped."""
        policy = self.recipe.kv_cache.policy
        every = Need("packed", packed), Need("blocks", quantized, ("*.safetensors",)), *self.scores(source, packed, tokens)
        outputs = {need.role: need for need in every}
        named = self.recipe.verify.checks
        for name, module in modules("checks").items():
            if not (module.ALWAYS or name in named or ("kv_scores" in module.READS and policy != "none")):
                continue
            chosen = named[name] if name in named else module.Knobs()
            if _needs_engine(name):
                if served is None:
                    continue
                outputs["served"] = Need("served", served(chosen), ("served.json",))
            needs = [outputs[role] for role in module.READS if role in outputs]
            knobs = {
                "check": {"name": name, "version": module.VERSION, "knobs": chosen.model_dump(exclude={*module.LIMITS, *module.ASIDE})},
                "model": self.surveyed.computed,
                "quant": QUANT if module.READS != ("plan",) else None,
                **self._packing,
                "facts": self._facts(module.READS),
            }
            # config.json tells the architecture; where a check reads no weights, nothing else of the source is in its key.
            computes = "packed" in module.READS
            yield name, self._step("measure", name, knobs, Need("source", source, ("config.json",)), *needs, *self._bits, computes=computes)

    def _facts(self, reads: tuple[str, ...]) -> dict[str, Any]:
        """What planning knows, for the checks that ask for it."""
        kv_cache = self.recipe.kv_cache.model_dump()
        if "plan" in reads:
            target = self.recipe.target.model_dump(exclude=set(SERVED)) if self.recipe.target is not None else None
            return {"kv_cache": kv_cache, "target": target}
        return {"kv_cache": {"policy": kv_cache["policy"]}} if "kv_scores" in reads else {}
