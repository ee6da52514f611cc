"""What would make a model fit its target: each change is computed, so that none is named that would not do.

A share of free memory that leaves room for both the pool and the workspace; else a smaller KV policy, a shorter session, more of the same
GPU, or another one of the table. No torch here: `doit plan` and `doit check` use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from buildsys.architecture import Architecture
from buildsys.footprint import KV_BLOCK_TOKENS, Asked, Held, filled, held
from buildsys.gpus import GPU, GPUS, KvPolicy
from buildsys.scheme import Schemes

SMALLER: dict[KvPolicy, tuple[KvPolicy, ...]] = {"none": ("int8", "int4"), "int8": ("int4",), "int4": ()}
COUNTS = (2, 4, 8, 16)
GPUS_NAMED = 3  # of those that would do, the smallest

Runs = Callable[[GPU, KvPolicy], bool]


def hint(architecture: Architecture, schemes: Schemes | None, asked: Asked, runs: Runs = lambda gpu, policy: True) -> str:
    """An imperative with every single change that makes it fit; empty where it does. `runs`: whether an engine serves this format on a
    GPU with a KV policy."""
    search = Search(architecture, schemes, {})
    if search.fits(asked):
        return ""
    shares = search.shares(asked)
    if shares:
        return f"set kv_cache.max_entry_count between {shares[0]:.2f} and {shares[-1]:.2f} (now {asked.max_entry_count:g})"
    ways = [*_policies(search, asked, runs), *_sessions(search, asked), *_counts(search, asked), *_gpus(search, asked, runs)]
    if not ways:
        return "quantize to fewer bits or choose a smaller model: no KV policy, session length or number of GPUs of the table would do"
    return f"set {', or '.join(ways)}"


def indivisible(architecture: Architecture, count: int) -> str | None:
    """Why tensor parallelism cannot share the model out over so many GPUs (unified_attention_layer.cc, builders/attention.py)."""
    if architecture.heads % count:
        return f"{architecture.heads} attention heads are not shared out evenly over {count} GPUs"
    if architecture.kv_heads % count and count % architecture.kv_heads:
        return f"{architecture.kv_heads} KV heads are neither shared out nor repeated evenly over {count} GPUs"
    return None


def counts(architecture: Architecture) -> str:
    """Numbers of GPUs that it is shared out over, for people."""
    *most, last = (str(count) for count in (1, *COUNTS) if indivisible(architecture, count) is None)
    return f"{', '.join(most)} or {last}" if most else last


@dataclass(frozen=True)
class Search:
    """One model, asked about in many ways. `known`: its weights by number and sm of GPUs, which take the longest to count."""

    architecture: Architecture
    schemes: Schemes | None
    known: dict[tuple[int, int], Held]

    def fits(self, asked: Asked) -> bool:
        key = asked.count, asked.gpu.sm
        if key not in self.known:
            self.known[key] = held(self.architecture, self.schemes, *key)
        return filled(self.architecture, self.schemes, self.known[key], asked).fits

    def shares(self, asked: Asked) -> list[float]:
        """Every max_entry_count in hundredths that makes it fit."""
        return [share / 100 for share in range(1, 100) if self.fits(replace(asked, max_entry_count=share / 100))]

    def way(self, said: str, asked: Asked) -> str | None:
        """`said`, and where the share asked for does not go with it the middle one of those that do; None where none does."""
        if self.fits(asked):
            return said
        shares = self.shares(asked)
        return f"{said} with kv_cache.max_entry_count: {shares[len(shares) // 2]:.2f}" if shares else None


def _policies(search: Search, asked: Asked, runs: Runs) -> Iterator[str]:
    """The first that does."""
    for policy in SMALLER[asked.kv_policy]:
        way = search.way(f"kv_cache.policy: {policy}", replace(asked, kv_policy=policy)) if runs(asked.gpu, policy) else None
        if way is not None:
            yield way
            return


def _sessions(search: Search, asked: Asked) -> Iterator[str]:
    """The longest that does, in whole blocks."""
    least, most = 0, asked.session_len // KV_BLOCK_TOKENS
    while most - least > max(1, least // 64):
        middle = (least + most) // 2
        if search.shares(replace(asked, session_len=middle * KV_BLOCK_TOKENS)):
            least = middle
        else:
            most = middle
    tokens = least * KV_BLOCK_TOKENS
    way = search.way(f"target.session_len: {tokens}", replace(asked, session_len=tokens)) if least else None
    if way is not None:
        yield way


def _counts(search: Search, asked: Asked) -> Iterator[str]:
    """The fewest that do."""
    for count in COUNTS:
        if count > asked.count and indivisible(search.architecture, count) is None:
            way = search.way(f"target.count: {count}", replace(asked, count=count))
            if way is not None:
                yield way
                return


def _gpus(search: Search, asked: Asked, runs: Runs) -> Iterator[str]:
    """The smallest that do."""
    others = sorted((gpu for gpu in GPUS.values() if gpu != asked.gpu), key=lambda gpu: gpu.memory_gib)
    able = (replace(asked, gpu=gpu) for gpu in others if runs(gpu, asked.kv_policy))
    found = [way for other in able if (way := search.way(other.gpu.name, other)) is not None][:GPUS_NAMED]
    if found:
        yield f"target.gpu: {' | '.join(found)}"
