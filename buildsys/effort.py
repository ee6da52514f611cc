"""Seconds and bytes of building, before anything runs: what each kind of step takes on this machine's processors or on its GPU.

Work is counted from the shapes; what a machine does of it in a second was measured (benchmarks/RESULTS.md). No torch here: `doit plan`
uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from types import MappingProxyType
from typing import Literal

from buildsys.architecture import Architecture, Linear, Site
from buildsys.footprint import GIB, TensorBytes, weights
from buildsys.gpus import GPU
from buildsys.scheme import Schemes

SAMPLED_AT_ONCE = 16  # quant/sample.py MICRO_BATCH


@dataclass(frozen=True)
class Building:
    """What one clean build takes: seconds for each kind of step, disk that it fills, and the largest moment in memory."""

    seconds: Mapping[str, float]
    disk_bytes: Mapping[str, int]
    host_bytes: int
    gpu_bytes: int
    machine: str = "CPU"


@dataclass(frozen=True)
class Speed:
    """What a machine reaches in buildsys, not what its maker prints."""

    machine: str
    flops: float  # in large matrix products
    gram_flops: float  # in second moments, of which half of the products is left out
    serial_flops: float  # in what runs one after another: scale search and the solver
    bytes_per_s: float  # of memory, in elementwise work
    read_bytes_per_s: float  # of a checkpoint, to where it is computed with
    write_bytes_per_s: float  # packed, hashed and on disk
    column_s: float  # one column of GPTQ's loop
    token_s: float  # one layer of one token, for a micro-batch of sampling
    start_s: float  # of a step that computes: a process, torch, and on a GPU its context and kernels

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        return "cpu" if self.machine == "CPU" else "cuda"


def cpu_speed(threads: int) -> Speed:
    """60 GFLOP/s a core: torch reached 107 in one 1,024^3 product on this project's 2-core host, and half of it in whole forwards."""
    return Speed(
        machine="CPU",
        flops=60e9 * threads,
        gram_flops=60e9 * threads,
        serial_flops=60e9,
        bytes_per_s=6e9 * min(threads, 4),
        read_bytes_per_s=2e9,
        write_bytes_per_s=0.5e9,
        column_s=100e-6,
        token_s=1.5e-3 / threads,
        start_s=0.0,  # a fork of a process that has torch
    )


def cuda_speed(gpu: GPU) -> Speed:
    """Scaled from one H200 (benchmarks/RESULTS.md, "A 7B on one GPU"; docs/LOG.md), with 128 x 2,048 tokens and a layer of 7B width:
    calibrate's 0.27 s are 0.43 of its tensor peak, 0.06 s of AWQ's search and 0.24 s of GPTQ's solver 37 TFLOP/s; 32 are read in 2 s."""
    share = gpu.fp16_tflops / 989
    return Speed(
        machine=gpu.name,
        flops=430e12 * share,
        gram_flops=950e12 * share,
        serial_flops=37e12 * share,
        bytes_per_s=0.5 * gpu.bandwidth_gb_s * 1e9,
        read_bytes_per_s=8e9,
        write_bytes_per_s=1.6e9,
        column_s=0.0,  # kernels hold the loop
        token_s=0.75e-3,
        start_s=1.7,
    )


def building(
    architecture: Architecture,
    schemes: Schemes,
    speed: Speed,
    *,
    samples: int,
    seqlen: int,
    verify_windows: int,
    verify_seqlen: int,
    verify_streams: int = 2,
    gptq: bool = True,
    floats: bool = False,
    sampled: Sequence[tuple[int, int]] = (),
    held: Sequence[TensorBytes] | None = None,
    apart: bool = False,
) -> Building:
    """One clean build with `samples` x `seqlen` tokens of calibration; a step's seconds are its floating point work and its bytes.

    `verify_streams`: forwards of the verify text, held side by side: the source's, the artifact's, and one for each KV policy. `sampled`:
    (windows, tokens) of each text that the model writes itself, token by token. `held`: footprint.weights of the same, from who knows them.
    `apart`: what lies outside of the blocks is packed by a step of its own. `floats`: the float model is walked beside the quantized one.
    """
    tokens, scored = samples * seqlen, verify_windows * verify_seqlen
    held = weights(architecture, schemes) if held is None else held
    outside = (architecture.embed, architecture.final_norm, architecture.lm_head)
    source_bytes = 2 * sum(prod(each.shape) for each in held)
    packed_bytes = sum(each.disk_bytes for each in held)
    blocks_bytes = sum(each.disk_bytes for each in held if each.name not in outside)
    parts_bytes = {"outside": packed_bytes - blocks_bytes, "pack": blocks_bytes} if apart else {"pack": packed_bytes}
    kept = {*architecture.sites, *architecture.scale_sites}
    stats_bytes = architecture.layers * sum(_gram_bytes(architecture.width(site)) for site in kept)
    seconds = {
        "tokens": speed.start_s + _sampling_s(architecture, speed, sampled),
        "calibrate": speed.start_s + max(_calibrate_s(architecture, speed, tokens, seqlen), source_bytes / speed.read_bytes_per_s),
        "quantize": speed.start_s + source_bytes / speed.read_bytes_per_s + _quantize_s(architecture, speed, tokens, seqlen, gptq, floats),
        **{kind: size / speed.write_bytes_per_s for kind, size in parts_bytes.items()},
        "score": speed.start_s
        + (source_bytes + packed_bytes) / speed.read_bytes_per_s  # both models
        + verify_streams * _score_s(architecture, speed, scored, verify_seqlen),
    }
    scores_bytes = 16 * scored * (verify_streams - 1)
    disk_bytes = {"calibrate": stats_bytes, "quantize": blocks_bytes, **parts_bytes, "score": scores_bytes}
    held_tokens = max(tokens, scored * max(verify_streams, 3) // 3)
    work_bytes = max(_build_bytes(architecture, held_tokens, speed.device, floats), _sampling_bytes(architecture, sampled))
    on_cpu = speed.device == "cpu"
    host_bytes = int(0.4 * GIB) + (work_bytes if on_cpu else _block_bytes(architecture, 4))
    return Building(MappingProxyType(seconds), MappingProxyType(disk_bytes), host_bytes, 0 if on_cpu else work_bytes, speed.machine)


def _sampling_s(architecture: Architecture, speed: Speed, sampled: Sequence[tuple[int, int]]) -> float:
    written = sum(windows * length for windows, length in sampled)
    layer_tokens = architecture.layers * sum(ceil(windows / SAMPLED_AT_ONCE) * length for windows, length in sampled)
    longest = max((length for _, length in sampled), default=0)
    return layer_tokens * speed.token_s + (_forward_flops(architecture, longest) + _head_flops(architecture)) * written / speed.flops


def _calibrate_s(architecture: Architecture, speed: Speed, tokens: int, seqlen: int) -> float:
    kept = {*architecture.sites, *architecture.scale_sites}
    gram = 2 * 128 * sum(architecture.width(site) * _visits(architecture, site) for site in kept) * architecture.layers * tokens
    return (_forward_flops(architecture, seqlen) * tokens + gram) / speed.flops


def _quantize_s(architecture: Architecture, speed: Speed, tokens: int, seqlen: int, gptq: bool, floats: bool) -> float:
    """AWQ's search; with GPTQ a forward in which each block sees the quantized output of those before it, its second moments and solver;
    with GPTAQ the float forward too, how far both are apart, and what to aim at."""
    search = _awq_flops(architecture) / speed.serial_flops
    if not gptq:
        return search
    walk = _forward_flops(architecture, seqlen) * tokens / speed.flops
    moments = _hessian_flops(architecture, tokens) / speed.gram_flops
    columns = architecture.layers * sum(map(architecture.width, architecture.sites)) * speed.column_s
    beside = 0.0
    if floats:
        products = _apart_flops(architecture, tokens) / (speed.gram_flops / 2)  # of which no half is left out
        beside = 1.5 * walk + products + _aim_flops(architecture) / speed.serial_flops  # half again: what unrounded weights would give
    return search + walk + moments + _gptq_flops(architecture) / speed.serial_flops + columns + beside


def _score_s(architecture: Architecture, speed: Speed, scored: int, seqlen: int) -> float:
    """Of one forward and what is made of its logits."""
    products = (_forward_flops(architecture, seqlen) + _head_flops(architecture)) * scored / speed.flops
    return products + 10 * 4 * architecture.vocab_size * scored / speed.bytes_per_s


def _head_flops(architecture: Architecture) -> int:
    return 2 * architecture.vocab_size * architecture.hidden_size


def _visits(architecture: Architecture, site: Site) -> float:
    """What share of all tokens comes to a site: an expert is sent some, and here all are sent as many."""
    experts = architecture.experts
    return experts.per_token / experts.count if experts is not None and "." in site else 1


def _linear_flops(linear: Linear) -> int:
    return 2 * linear.in_features * linear.out_features


def _forward_flops(architecture: Architecture, seqlen: int) -> int:
    """Of one token in a window of `seqlen`: its matrix products, and scores and sums over half of the window on average."""
    attention = 4 * architecture.heads * architecture.head_dim * seqlen // 2
    products = sum(_linear_flops(linear) * _visits(architecture, linear.site) for linear in architecture.linears)
    return int(architecture.layers * (products + attention))


def _gram_bytes(width: int) -> int:
    """A site's statistics in float32: absmean, absmax, and the Gram matrix's diagonal blocks of 128 x 128."""
    return 4 * width * (1 + 1 + 128)


def _awq_flops(architecture: Architecture) -> int:
    """20 candidates for each layer's scales: error times Gram blocks times error, about as much again to quantize."""
    return architecture.layers * 20 * 2 * sum(2 * 128 * each.in_features * each.out_features for each in architecture.linears)


def _hessian_flops(architecture: Architecture, tokens: int) -> int:
    seen = sum(2 * tokens * _visits(architecture, site) * architecture.width(site) ** 2 for site in architecture.sites)
    return int(architecture.layers * seen)


def _gptq_flops(architecture: Architecture) -> int:
    """For each site three factorisations of its Hessian; for each layer the propagation of every column's error."""
    factors = sum(2 * architecture.width(site) ** 3 for site in architecture.sites)
    return architecture.layers * (factors + sum(each.out_features * each.in_features**2 for each in architecture.linears))


def _apart_flops(architecture: Architecture, tokens: int) -> int:
    """Products of what is read with how far that is from what the float model reads, or with how far its outputs are."""
    rows = {site: architecture.hidden_size if site in ("o_in", "down_in") else architecture.width(site) for site in architecture.sites}
    seen = sum(2 * tokens * _visits(architecture, site) * architecture.width(site) * rows[site] for site in architecture.sites)
    return int(architecture.layers * seen)


def _aim_flops(architecture: Architecture) -> int:
    """For each site four factorisations, three of them to try, and two triangular solves for each output."""
    factors = sum(4 * architecture.width(site) ** 3 // 3 for site in architecture.sites)
    return architecture.layers * (factors + sum(2 * each.out_features * each.in_features**2 for each in architecture.linears))


def _block_bytes(architecture: Architecture, width_bytes: int) -> int:
    return width_bytes * sum(prod(shape) for shape in architecture.block_tensors().values())


def _sampling_bytes(architecture: Architecture, sampled: Sequence[tuple[int, int]]) -> int:
    """The whole model in float32, since every token needs every block, and the KV cache of one micro-batch."""
    if not sampled:
        return 0
    longest = max(length for _, length in sampled)
    cache_bytes = architecture.layers * 2 * SAMPLED_AT_ONCE * architecture.kv_heads * longest * architecture.head_dim * 4
    return 4 * sum(prod(shape) for shape in architecture.tensors().values()) + cache_bytes


def _build_bytes(architecture: Architecture, tokens: int, device: Literal["cpu", "cuda"], floats: bool) -> int:
    """The largest moment, GPTQ of one block: three streams of hidden states (before and after attention, and what o_proj reads), the block
    in float32 twice, on a GPU the next one of a dense model, and the widest site's Hessian with its factor and a copy. With `floats` the
    float model's hidden states in float32, and two matrices of how far it is apart, as wide as that Hessian."""
    state_bytes = 3 * tokens * architecture.hidden_size * (4 if device == "cpu" else 2)
    widest = max(architecture.width(site) for site in architecture.sites)
    next_bytes = _block_bytes(architecture, 2) if device != "cpu" and architecture.experts is None else 0
    beside_bytes = 4 * tokens * architecture.hidden_size + 2 * 4 * widest * architecture.hidden_size if floats else 0
    return state_bytes + 2 * _block_bytes(architecture, 4) + next_bytes + 3 * 4 * widest**2 + beside_bytes
