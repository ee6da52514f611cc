"""What `doit plan` says of the result before it exists: memory on the target GPU as a bar, what a clean build takes, and what to know."""

from __future__ import annotations

from collections.abc import Iterator

from buildsys.footprint import GIB, Serving
from buildsys.plan import Plan

BAR = 48  # characters for the whole of a GPU's memory


def outlook(plan: Plan) -> Iterator[str]:
    """Lines for people."""
    building = plan.building
    seconds, disk_gib = sum(building.seconds.values()), sum(building.disk_bytes.values()) / GIB
    took = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    yield f"  a clean build here (CPU, roughly): {took}, {building.host_bytes / GIB:.2f} GiB of memory, {disk_gib:.2f} GiB of disk"
    if plan.serving is None:
        yield "  no target GPU named: `target: {gpu: a100-40gb}` would show how it fits (every GPU that gpus.py knows is a choice)"
    else:
        yield from _memory(plan.serving)
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
    yield (
        f"     {serving.kv_bytes_per_token:,} bytes of KV a token, {serving.pool_tokens:,} tokens in the pool,"
        f" {serving.sessions} full sessions at once, at most {serving.decode_bound_tokens_per_s:,.0f} tokens/s at batch 1 (bandwidth)"
    )
