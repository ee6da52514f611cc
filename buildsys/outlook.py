"""What `doit plan` says of the result before it exists: memory on the target GPU as a bar, what a clean build takes, and what to know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from buildsys import footprint
from buildsys.deployment import on_target, target_gpu
from buildsys.footprint import GIB, KV_BITS, Serving, kv_bytes_per_token
from buildsys.gpus import KvPolicy
from buildsys.plan import Plan

BAR = 48  # characters for the whole of a GPU's memory


def outlook(plan: Plan) -> Iterator[str]:
    """Lines for people."""
    building = plan.building
    seconds, disk_gib = sum(building.seconds.values()), sum(building.disk_bytes.values()) / GIB
    took = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    gpu = f", {building.gpu_bytes / GIB:.1f} GiB of the GPU's" if building.gpu_bytes else ""
    memory = f"{building.host_bytes / GIB:.2f} GiB of memory{gpu}"
    yield f"  a clean build here ({building.machine}, roughly): {took}, {memory}, {disk_gib:.2f} GiB of disk"
    if plan.serving is None:
        yield "  no target GPU named: `target: {gpu: a100-40gb}` would show how it fits (every GPU that gpus.py knows is a choice)"
    else:
        yield from _memory(plan.serving)
        yield _weights(plan)
        yield from _cache(plan, plan.serving)
        yield from _decode(plan, plan.serving)
    for note in plan.notes:
        yield f"  note: {note}"


def _memory(serving: Serving) -> Iterator[str]:
    parts = (
        ("context", serving.context_bytes, "."),
        ("weights", serving.weights_bytes, "#"),
        ("KV pool", serving.pool_bytes, "="),
        ("workspace", serving.workspace_bytes, "+"),
    )
    total = serving.memory_bytes
    bar = "".join(sign * round(BAR * size / total) for _, size, sign in parts)[:BAR].ljust(BAR)
    each = f"{serving.count} x {serving.gpu}, each " if serving.count > 1 else f"{serving.gpu}, "
    yield f"  on {each}{total / GIB:.1f} GiB: [{bar}]"
    yield "     " + ", ".join(f"{sign} {name} {size / GIB:.2f} GiB" for name, size, sign in parts)


def _weights(plan: Plan) -> str:
    """Of the whole model, however many GPUs share it."""
    sizes: dict[str, int] = {}
    gpu = target_gpu(plan.recipe)
    for tensor in footprint.weights(plan.survey.architecture, plan.layers.schemes, gpu.sm if gpu is not None else 0):
        part = footprint.part(plan.survey.architecture, tensor.name)
        sizes[part] = sizes.get(part, 0) + tensor.gpu_bytes
    return "     weights: " + ", ".join(f"{part} {size / GIB:.2f} GiB" for part, size in sizes.items())


def _cache(plan: Plan, serving: Serving) -> Iterator[str]:
    policies: list[KvPolicy] = list(KV_BITS)
    bytes_of = {policy: kv_bytes_per_token(plan.survey.architecture, policy, serving.count) for policy in policies}
    chosen = plan.recipe.kv_cache.policy
    others = ", ".join(f"{policy} {size:,}" for policy, size in bytes_of.items() if policy != chosen)
    session = on_target(plan.recipe, plan.survey)
    length = f" of {session.session_len:,} tokens" if session is not None else ""
    yield f"     {serving.kv_bytes_per_token:,} bytes of KV a token with policy {chosen} ({others})"
    yield f"     {serving.pool_tokens:,} tokens in the pool, {serving.sessions} full sessions{length} at once"


def _decode(plan: Plan, serving: Serving) -> Iterator[str]:
    """Beside the source on the same GPU, with its cache in float16."""
    said = on_target(plan.recipe, plan.survey)
    if said is None:
        return
    architecture = plan.survey.architecture
    here = footprint.held(architecture, None, said.count, said.gpu.sm)
    source = footprint.filled(architecture, None, here, replace(said, kv_policy="none"))
    rates = ", ".join(f"{one.tokens_per_s:,.0f} tokens/s at batch {one.batch}" for one in serving.decode)
    theirs = " and ".join(f"{one.tokens_per_s:,.0f}" for one in source.decode)
    yield f"     decode, roughly, by bandwidth, with {serving.decode[0].context_tokens:,} tokens in each session: {rates}"
    yield f"     source fp16 would: {theirs} tokens/s{'' if source.fits else ', if it had room'}"
    if serving.decode[0].tokens_per_s < source.decode[0].tokens_per_s:
        yield f"     slower than its source on {serving.gpu}: LMDeploy's products of 4-bit weights are not made for sm90 and later"
