"""Where a recipe and its model, or its target, do not go together: refused before anything runs, each with both values and a fix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from buildsys import footprint, gpus, remedies
from buildsys.architecture import Linear
from buildsys.deployment import engine, on_target, relaid, session_len, source_engine, target_gpu
from buildsys.errors import BuildError
from buildsys.recipe import Recipe
from buildsys.scheme import Scheme, Schemes
from buildsys.survey import Survey


def misfits(
    recipe: Recipe,
    surveyed: Survey,
    schemes: Schemes,
    served_as: Callable[[], footprint.Serving | None],
    unheld: Callable[[], list[BuildError]],
) -> list[BuildError]:
    """Where the recipe and the model do not go together. `served_as`, `unheld`: deployment.serving and `unheld` of the same."""
    try:
        errors = unheld()
    except BuildError as error:
        return [error]
    for section, asked in (("calibration", recipe.calibration), ("verify", recipe.verify)):
        most = surveyed.architecture.max_positions
        if asked.seqlen > most:
            what = f"{section}.seqlen is {asked.seqlen}; the model has {most} positions"
            errors.append(BuildError(recipe.at(section, "seqlen"), what, f"set {section}.seqlen: {most}"))
    return [*errors, *_target_misfits(recipe, surveyed, schemes, served_as), *_serve_misfits(recipe, surveyed)]


def unheld(recipe: Recipe, surveyed: Survey, schemes: Schemes) -> list[BuildError]:
    """Why the format does not hold the model's linears in these schemes. Raises BuildError where the model is not of its kind."""
    a, made = surveyed.architecture, relaid(recipe, surveyed)
    errors: list[BuildError] = []
    default, mixed = recipe.quantization.scheme, recipe.quantization.mixed
    seen, kinds = set(), dict[Scheme, None]()
    layers = range(a.layers if schemes.own or schemes.left_float else 1)  # where no name is told apart, one block is all
    for linear, layer in ((linear, layer) for linear in made.architecture.linears for layer in layers):
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
    return errors


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


def backend_misfits(recipe: Recipe, surveyed: Survey, schemes: Schemes) -> Iterator[BuildError]:
    """Why another tool cannot quantize this model."""
    for key, what, fix in recipe.quantization.backend.module.unfit(surveyed.config, surveyed.architecture, schemes.left_float):
        yield BuildError(recipe.at("quantization", key), what, fix)


def _target_misfits(
    recipe: Recipe, surveyed: Survey, schemes: Schemes, served_as: Callable[[], footprint.Serving | None]
) -> list[BuildError]:
    target, gpu = recipe.target, target_gpu(recipe)
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
        errors.append(
            BuildError(recipe.at("target", "count"), f"target.count: {reason}", f"set count to {remedies.counts(surveyed.architecture)}")
        )
        return errors
    filled = served_as()
    if filled is not None and not filled.fits:
        errors.append(_too_small(recipe, surveyed, schemes, filled))
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


def _serve_misfits(recipe: Recipe, surveyed: Survey) -> Iterator[BuildError]:
    """What verify.serve asks of a server that it is not, whether or not one can run here."""
    asked: Any = recipe.verify.checks.get("serve")
    if asked is None:
        return
    prompt, length = min(asked.prompt_tokens, recipe.verify.seqlen), session_len(recipe, surveyed)
    if prompt + asked.new_tokens > length:
        what, half = f"verify.serve asks for {asked.new_tokens} tokens after prompts of {prompt}; a session holds {length}", length // 2
        fix = f"set prompt_tokens: {half} and new_tokens: {half}, or a longer target.session_len"
        yield BuildError(recipe.at("verify", "serve", "new_tokens"), what, fix)
    if asked.tools and (recipe.target is None or recipe.target.tool_call_parser is None):
        what = "verify.serve.tools asks for a tool call, and the server gets no parser for them"
        yield BuildError(recipe.at("verify", "serve", "tools"), what, "name target.tool_call_parser, or leave tools out")
    without = source_engine(recipe, surveyed).get("why") if asked.min_speedup is not None else None
    said = on_target(recipe, surveyed)
    if without is not None and said is not None:
        what = f"verify.serve.min_speedup is {asked.min_speedup:g}, beside a source that no server can be started with: {without}"
        way = remedies.hint(surveyed.architecture, None, replace(said, kv_policy="none"), lambda _, policy: policy == "none")
        yield BuildError(recipe.at("verify", "serve", "min_speedup"), what, f"{way}, or leave min_speedup out")


def _positions(recipe: Recipe, surveyed: Survey) -> Iterator[BuildError]:
    """Sessions beyond the model's own positions, where these are not stretched or cannot be."""
    assert recipe.target is not None
    asked, own, rope = recipe.target.rope_scaling, surveyed.architecture.max_positions, surveyed.architecture.rope
    length = session_len(recipe, surveyed)
    said = f"target.session_len is {length}; the model has {own} positions"
    if asked is None and length <= own:
        return
    if asked is not None and length <= own:
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


def ungated(recipe: Recipe) -> Iterator[str]:
    """Qualities that the recipe measures and does not gate."""
    checks = recipe.verify.checks
    if getattr(checks.get("kl"), "max_nats", None) is None:
        yield "no gate on quality: verify: {kl: {max_nats: 0.05}} would refuse what drifts too far from the source"
    policy, kv = recipe.kv_cache.policy, checks.get("kv")
    if policy != "none" and getattr(kv, "max_nats", None) is None and getattr(kv, "max_increase_nats", None) is None:
        yield f"kl is measured without the KV cache's {policy}: verify: {{kv: {{max_increase_nats: 0.01}}}} would gate what that adds"


def unmeasured(recipe: Recipe, surveyed: Survey) -> Iterator[str]:
    """What is served beyond what verify can see."""
    own = surveyed.architecture.max_positions
    if recipe.target is not None and recipe.target.rope_scaling is not None:
        yield f"prompts of more than {own} tokens are stretched; what verify measures holds for shorter ones"
