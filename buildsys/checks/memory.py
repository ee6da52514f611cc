"""Whether the artifact fits its target GPU with the recipe's KV policy, session length and batch; known without a GPU.

The arithmetic is footprint.py's, after TurboMind. Two numbers: `needed_gib`, the least that serves one full session, and, where the recipe
names a target, `free_gib`, the margin that is left when the engine has taken its pool; below zero it does not start or holds no session.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from buildsys.measurement import Limit, Measurement
from buildsys.slots import Frozen

VERSION = 3  # also bumped when footprint.py or gpus.py comes to other numbers
READS = ("plan",)
LIMITS = {"max_gib": Limit("needed_gib", "max")}
FIXED: dict[str, tuple[Limit, float]] = {"free_gib": (Limit("free_gib", "min"), 0.0)}
OPTIONAL: frozenset[str] = frozenset({"free_gib"})  # where no target is named
ALWAYS = False
ASIDE: frozenset[str] = frozenset()


class Knobs(Frozen):
    """`max_gib`: the most of a GPU's memory that weights, workspace and one full session may need; none: reported only."""

    max_gib: Annotated[float, Field(gt=0)] | None = None


def measure(knobs: Knobs, inputs: Mapping[str, Any], context: Any) -> list[Measurement]:
    """Reads `context.facts`: `kv_cache` {policy, max_entry_count}, `target` {gpu, count, session_len, max_batch_size} or None."""
    from buildsys import footprint, gpus, remedies

    architecture, kv_cache, target = context.architecture, context.facts["kv_cache"], context.facts.get("target") or {}
    gpu = gpus.lookup(target["gpu"]) if target.get("gpu") else None
    policy = kv_cache["policy"]
    session_len = target.get("session_len") or architecture.max_positions
    if gpu is None:
        needed = footprint.needed_bytes(architecture, context.schemes, kv_policy=policy, session_len=session_len)
        return [Measurement.exact("needed_gib", needed / footprint.GIB, "GiB", f"one session of {session_len} tokens; no target GPU named")]
    asked = footprint.Asked(gpu, target["count"], policy, kv_cache["max_entry_count"], session_len, target["max_batch_size"])
    held = footprint.held(architecture, context.schemes, asked.count, gpu.sm)
    found = footprint.filled(architecture, context.schemes, held, asked)
    holds = f"{found.sessions} sessions of {session_len} tokens, {found.pool_tokens} tokens in the KV pool"
    fits = holds if found.fits else remedies.hint(architecture, context.schemes, asked)
    where = gpu.name if found.count == 1 else f"each of {found.count} {gpu.name}"
    return [
        Measurement.exact("needed_gib", found.needed_bytes / footprint.GIB, "GiB", f"on {where}"),
        Measurement.exact("free_gib", found.spare_bytes / footprint.GIB, "GiB", f"on {where}: {fits}"),
    ]
