"""What real servers did on the target: the artifact beside its source, with and without the KV policy, and plain transformers.

Numbers are those of the `serve` step (trials.py): medians over its repetitions, with the least and the greatest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from buildsys.footprint import GIB
from buildsys.release.facts import Facts
from buildsys.report.markup import number
from buildsys.report.sections import Row

CHECK = "serve"
TABLED = ("tokens_per_s_", "first_token_s_", "speedup_")
"""Measurements, one for each batch, that stand in the table and not among the others."""


@dataclass(frozen=True)
class Cell:
    """A number with the ends between which its repetitions lie, as text."""

    title: str
    text: str
    spread: str = ""


@dataclass(frozen=True)
class Line:
    """One server, or transformers. `why`: there is none of it, and this is the reason."""

    name: str
    own: bool
    told: str
    cells: tuple[Cell, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Engines:
    """The table, and what it was measured on."""

    lines: tuple[Line, ...]
    titles: tuple[str, ...]
    machine: str
    load: str


def engines(facts: Facts, served: Mapping[str, Any] | None) -> Engines | None:
    """None: no server was asked."""
    if not served:
        return None
    trials = list(served["trials"])
    seen = [trial["name"] for trial in trials]
    beside = [served["transformers"]] if "transformers" in served else []
    lines = [_line(facts, trial) for trial in (*sorted(trials, key=lambda trial: _place(trial["name"])), *beside)]
    if "why" in served["source"] and "source" not in seen:
        lines.insert(0, Line("source", False, "", why=str(served["source"]["why"])))
    host = served["host"]
    gpus = ", ".join(f"{name}, driver {driver}" for name, driver in host["gpus"])
    rate = next(iter(trials[0]["rates"]))
    load = f"{rate['prompt_tokens']} tokens in, {rate['new_tokens']} out, greedy; {len(rate['tokens_per_s'])} runs, the median"
    titles = next(tuple(cell.title for cell in line.cells) for line in lines if line.cells)
    return Engines(tuple(lines), titles, f"{gpus}, LMDeploy {host['lmdeploy']}", load)


def in_the_table(row: Row) -> bool:
    return row.check == CHECK and row.one.name.startswith(TABLED)


def _place(name: str) -> int:
    """The source first, then what is changed in it one by one."""
    order = ("source", "plain", "source_kv", "artifact")
    return order.index(name) if name in order else len(order)


def _line(facts: Facts, trial: Mapping[str, Any]) -> Line:
    name = str(trial.get("name", "transformers"))
    recipe = facts.plan.recipe
    weights, policy = f"W{recipe.quantization.bits}A{_activations(facts)}", f"KV {recipe.kv_cache.policy}"
    alone = recipe.kv_cache.policy == "none"
    names = {
        "source": "source",
        "plain": weights,
        "source_kv": policy,
        "artifact": weights if alone else f"{weights} + {policy}",
        "transformers": "transformers",
    }
    own = name == "artifact"
    share = f"max_entry_count {name.removeprefix('share_')}" if name.startswith("share_") else ""
    title = names.get(name, names["artifact"])
    if "why" in trial:
        return Line(title, False, share, why=str(trial["why"]))
    told = "the recipe’s own" if own else share or ("the source, without an engine" if name == "transformers" else str(trial["engine"]))
    return Line(title, own, told, tuple(_cells(trial)))


def _activations(facts: Facts) -> int:
    return 16 if facts.plan.recipe.quantization.activations == "none" else 8


def _cells(trial: Mapping[str, Any]) -> Iterator[Cell]:
    yield Cell("All prompts", f"{number(trial['seconds'])} s")
    for rate in trial["rates"]:
        runs = rate["tokens_per_s"]
        yield Cell(
            f"Tokens/s at {rate['batch']}",
            number(round(median(runs), 1)),
            f"{number(round(min(runs), 1))} to {number(round(max(runs), 1))}",
        )
    firsts = trial["rates"][0]["first_token_s"]
    yield Cell("First token", f"{number(round(1000 * median(firsts), 1))} ms", f"at batch {trial['rates'][0]['batch']}")
    yield Cell("GPU memory", f"{trial['vram_bytes'] / GIB:.2f} GiB", f"{trial['loaded_bytes'] / GIB:.2f} once loaded")
    tokens = trial["pool_tokens"]
    yield Cell("KV cache", *(("–", "not told") if tokens is None else (f"{tokens:,}", "tokens")))
