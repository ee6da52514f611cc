"""Whether the engine serves what was built: answers over HTTP, tokens as the arithmetic says, speed and memory beside the source model.

A real server of LMDeploy on a GPU of the recipe's target, started with the artifact's own deploy/lmdeploy.yaml (serving/trial.py).
Without one nothing is measured, and the check is skipped: that is never a pass, and `required: always` makes it a failure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, model_validator

from buildsys.measurement import Limit, Measurement
from buildsys.slots import Frozen

VERSION = 2
READS = ("served",)
LIMITS = {
    "min_speedup": Limit("speedup", "min"),
    "max_vram_gib": Limit("vram_gib", "max"),
    "min_agreement": Limit("agreement", "min"),
}
FIXED: dict[str, tuple[Limit, float]] = {"failures": (Limit("failures", "max"), 0.0)}
OPTIONAL: frozenset[str] = frozenset()
ALWAYS = False
ASIDE: frozenset[str] = frozenset(("required", "timeout_s"))

TIE_NATS = 0.02  # two tokens so close are one choice: half precision does not tell them apart
GIB = 2**30

Share = Annotated[StrictFloat, Field(gt=0, lt=1)]
Beside = Literal["source", "kv", "transformers"]


class Knobs(Frozen):
    """What is asked of the server, and the gates on what comes out; a gate that is left out is reported only."""

    required: Literal["auto", "always"] = Field(
        default="auto", description="auto: skipped, and said so, where no GPU of the target or no LMDeploy is; always: that fails"
    )
    timeout_s: Annotated[StrictInt, Field(ge=1, le=86_400)] = Field(default=900, description="the longest that one server may take for all")
    batches: tuple[Annotated[StrictInt, Field(ge=1, le=1024)], ...] = Field(
        default=(1, 8, 32), min_length=1, description="requests at once for which tokens/s and time to first token are measured"
    )
    prompt_tokens: Annotated[StrictInt, Field(ge=1, le=131_072)] = Field(default=128, description="tokens of a prompt of verify's text")
    new_tokens: Annotated[StrictInt, Field(ge=2, le=16_384)] = Field(default=128, description="tokens that each request asks for")
    prompts: Annotated[StrictInt, Field(ge=2, le=1024)] = Field(
        default=16, description="prompts cut from verify's text, where the recipe's report names none of its own"
    )
    repeats: Annotated[StrictInt, Field(ge=1, le=100)] = Field(default=3, description="times that each speed is measured")
    max_entry_counts: tuple[Share, ...] = Field(
        default=(), description="further shares of free memory for the KV cache to start the server with: [0.8, 0.5, 0.4, 0.01]"
    )
    beside: tuple[Beside, ...] = Field(
        default=("source", "kv", "transformers"),
        description="what is measured beside the artifact: the source model; the KV policy without the weights; the source in transformers",
    )
    tools: StrictBool | None = Field(
        default=None, description="ask for a tool call, forced by a grammar; left out: where target.tool_call_parser is named"
    )
    min_speedup: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="least ratio of tokens/s to the source model's, at the worst of the batches"
    )
    max_vram_gib: Annotated[float, Field(gt=0)] | None = Field(default=None, description="most memory of a GPU in use under load, in GiB")
    min_agreement: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="least share of greedy tokens that the dequantized model writes too (or holds within 0.02 nats)"
    )

    @model_validator(mode="after")
    def _source_is_measured(self) -> Knobs:
        if self.min_speedup is not None and "source" not in self.beside:
            raise ValueError("min_speedup compares with the source model, and beside does not name source")
        return self


def measure(knobs: Knobs, inputs: Mapping[str, Any], context: Any) -> list[Measurement]:
    """From what the `serve` step saw (served.json); no server is started here."""
    seen = json.loads(inputs["served"].path("served.json").read_text())
    trials = {trial["name"]: trial for trial in seen["trials"]}
    ours = trials["artifact"]
    failures = [f"{trial['name']}: {text}" for trial in seen["trials"] for text in trial["failures"]]
    found = [Measurement.exact("failures", len(failures), "answers", "; ".join(failures))]
    found += _agreement(ours)
    found += [_rate(ours, rate) for rate in ours["rates"]]
    found += [_first(rate) for rate in ours["rates"]]
    if "source" in trials:
        found += _speedups(ours, trials["source"])
    found += [
        Measurement.exact("vram_gib", ours["vram_bytes"] / GIB, "GiB", f"under load; {ours['loaded_bytes'] / GIB:.2f} GiB after loading"),
        Measurement.exact("load_s", ours["load_s"], "s", "from start to a healthy server"),
    ]
    if ours["pool_tokens"] is not None:
        found.append(Measurement.exact("pool_tokens", ours["pool_tokens"], "tokens", "that the KV cache holds"))
    return found


def _agreement(ours: Mapping[str, Any]) -> Iterator[Measurement]:
    """The share of tokens that are the arithmetic's own, an answer being one draw; a few that all agree say little."""
    import torch

    from buildsys.quant.bootstrap import share

    gaps = torch.tensor([[math.inf if nats is None else nats for nats in answer] for answer in ours["gaps"]])
    own, close = (gaps == 0).float(), (gaps <= TIE_NATS).float()
    found = share(close)
    yield Measurement("agreement", found.value, "of tokens", found.low, found.high, f"{float(own.mean()):.4g} without near ties")


def _rate(ours: Mapping[str, Any], rate: Mapping[str, Any]) -> Measurement:
    runs = rate["tokens_per_s"]
    detail = f"{ours['engine']}, batch {rate['batch']}, {rate['prompt_tokens']} + {rate['new_tokens']} tokens, {len(runs)} runs"
    return Measurement(f"tokens_per_s_{rate['batch']}", _middle(runs), "tokens/s", min(runs), max(runs), detail)


def _first(rate: Mapping[str, Any]) -> Measurement:
    runs = rate["first_token_s"]
    return Measurement(f"first_token_s_{rate['batch']}", _middle(runs), "s", min(runs), max(runs), f"batch {rate['batch']}")


def _speedups(ours: Mapping[str, Any], source: Mapping[str, Any]) -> Iterator[Measurement]:
    """For each batch, and `speedup`, the worst of them: its interval reaches from our slowest over their fastest to the other way round."""
    theirs = {rate["batch"]: rate["tokens_per_s"] for rate in source["rates"]}
    ratios = []
    for rate in ours["rates"]:
        mine, other = rate["tokens_per_s"], theirs[rate["batch"]]
        ratio = Measurement(
            f"speedup_{rate['batch']}",
            _middle(mine) / _middle(other),
            "times",
            min(mine) / max(other),
            max(mine) / min(other),
            f"{_middle(mine):,.0f} tokens/s, the source {_middle(other):,.0f}",
        )
        ratios.append(ratio)
    worst = min(ratios, key=lambda ratio: ratio.low)
    yield Measurement("speedup", worst.value, "times", worst.low, worst.high, f"the least, at batch {worst.name.rpartition('_')[2]}")
    yield from ratios


def _middle(runs: list[float]) -> float:
    """The median: of an even number the lower one."""
    return sorted(runs)[(len(runs) - 1) // 2]
