"""What serves a recipe on its target: which engine, in how much memory, and whether this machine is that target."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buildsys import footprint, gpus
from buildsys.recipe import Recipe
from buildsys.relayout import Relayout, relayout
from buildsys.scheme import Schemes
from buildsys.serving.settings import PROFILE
from buildsys.slots import modules
from buildsys.survey import Survey, implementing

if TYPE_CHECKING:
    from buildsys.serving.host import Host


def relaid(recipe: Recipe, surveyed: Survey) -> Relayout:
    """The names and the config.json that the artifact is written under. Raises BuildError where its format has no such."""
    return relayout(surveyed.architecture, surveyed.config, recipe.at("format"), getattr(recipe.format.knobs, "as_", None))


def engine(recipe: Recipe, surveyed: Survey) -> tuple[str, tuple[str, ...]]:
    """The engine of LMDeploy that deploy/ names, "none" where there is none; and why it is not TurboMind, its faster one."""
    written, kinds, gpu = relaid(recipe, surveyed).config, recipe.quantization.kinds, target_gpu(recipe)
    lacks = [*gpus.turbomind_lacks(recipe.format.name, kinds, recipe.kv_cache.policy, surveyed.architecture.head_dim, gpu)]
    if not implementing(written, recipe.at("format")).TURBOMIND:
        lacks.insert(0, f"TurboMind does not implement {written['architectures'][0]}")
    if not lacks:
        return "turbomind", ()
    beside = [*gpus.engine_lacks("pytorch", recipe.format.name, kinds, gpu)]
    if not beside:
        return "pytorch", tuple(f"{reason}, so deploy/ names LMDeploy's PyTorch engine" for reason in lacks)
    return "none", (f"no engine of LMDeploy serves this, so there is no {PROFILE}: {'; '.join((*lacks, *beside))}",)


def engine_check(check: str) -> bool:
    """Whether a check reads what an engine did."""
    return "served" in modules("checks")[check].READS


def needs_engine(recipe: Recipe) -> bool:
    """Whether a check that the recipe names starts an engine: whoever plans it then looks for a GPU."""
    return any(map(engine_check, recipe.verify.checks))


def serves(recipe: Recipe, served_by: tuple[str, tuple[str, ...]], host: Host | str) -> Host | str:
    """The machine that the recipe's target is, or why this one is not it. `served_by`: as `engine` says."""
    named, lacks = served_by
    if named == "none":
        return "; ".join(lacks)
    if isinstance(host, str):
        return host
    target, gpu = recipe.target, target_gpu(recipe)
    if target is None or gpu is None:
        return host
    theirs = [gpus.is_device(gpu, device.name, device.memory_bytes) for device in host.devices]
    if len(theirs) >= target.count and all(theirs[: target.count]):  # an engine takes the first ones
        return host
    found = ", ".join(f"{device.name} with {device.memory_bytes / footprint.GIB:.0f} GiB" for device in host.devices)
    first = "; name the target's first in CUDA_VISIBLE_DEVICES" if sum(theirs) >= target.count else ""
    return f"the target is {target.count} x {target.gpu}, here {'is' if len(theirs) == 1 else 'are'} {found}{first}"


def target_gpu(recipe: Recipe) -> gpus.GPU | None:
    """A name that the table lacks was refused with the recipe."""
    return gpus.lookup(recipe.target.gpu) if recipe.target is not None else None


def session_len(recipe: Recipe, surveyed: Survey) -> int:
    asked = recipe.target.session_len if recipe.target is not None else None
    return asked or surveyed.architecture.max_positions


def source_engine(recipe: Recipe, surveyed: Survey) -> dict[str, str]:
    """What serves the source model on the target: {engine}, or {why} not. Speed is held beside the faster one of LMDeploy's two engines."""
    gpu, policy = target_gpu(recipe), recipe.kv_cache.policy
    target = recipe.target
    if target is not None and gpu is not None:
        alone = footprint.serving(
            surveyed.architecture,
            None,
            gpu,
            kv_policy="none",
            max_entry_count=recipe.kv_cache.max_entry_count,
            session_len=session_len(recipe, surveyed),
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
    target, gpu, kv = recipe.target, target_gpu(recipe), recipe.kv_cache
    if target is None or gpu is None:
        return None
    return footprint.Asked(gpu, target.count, kv.policy, kv.max_entry_count, session_len(recipe, surveyed), target.max_batch_size)


def serving_with(recipe: Recipe, surveyed: Survey, schemes: Schemes, policy: gpus.KvPolicy) -> tuple[footprint.Serving | None, str]:
    """How the recipe's target would serve it with another KV policy (None: it names none), and the engine that would."""
    other = recipe.model_copy(update={"kv_cache": recipe.kv_cache.model_copy(update={"policy": policy})})
    return serving(other, surveyed, schemes), engine(other, surveyed)[0]


def serving(recipe: Recipe, surveyed: Survey, schemes: Schemes) -> footprint.Serving | None:
    said = on_target(recipe, surveyed)
    if said is None:
        return None
    held = footprint.held(surveyed.architecture, schemes, said.count, said.gpu.sm)
    return footprint.filled(surveyed.architecture, schemes, held, said)
