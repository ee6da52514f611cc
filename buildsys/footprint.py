"""Bytes and seconds before anything runs: what an artifact takes on its target GPU, and what building it takes here.

Serving follows TurboMind (LMDeploy at commit 1263d5cd): weights as linear_weight.cc holds them, the KV pool as turbomind.cc CreateEngine
sizes it, workspace by the buffers of unified_attention_layer.cc and language_model.cc. No torch here: `doit plan` and `doit check` use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, prod
from types import MappingProxyType
from typing import Literal

from buildsys.architecture import Architecture, Linear, Site
from buildsys.gpus import GPU, KvPolicy
from buildsys.scheme import Schemes

GIB = 2**30
KV_BITS: Mapping[KvPolicy, int] = MappingProxyType({"none": 16, "int8": 8, "int4": 4})

# TurboMind's own numbers.
KV_BLOCK_TOKENS = 64  # messages.py cache_block_seq_len: a session takes whole blocks
PREFILL_TOKENS = 8192  # messages.py max_prefill_token_num: tokens of one forward
SPLIT_K_TOKENS = 4096  # unified_attention_layer.h kMaxWorkspaceTokens
GEMM_BYTES = 33 * 2**20  # gemm.h kBarriersSize + kPartialsSize

# Estimates, to be replaced by measurement on the target.
CONTEXT_BYTES = int(0.6 * GIB)  # CUDA context, loaded kernels, cuBLAS
GROUP_BYTES = int(0.3 * GIB)  # NCCL and symmetric buffers where several GPUs share a model
SAMPLED_AT_ONCE = 16  # quant/sample.py MICRO_BATCH
BANDWIDTH_SHARE = 0.6  # of the data sheet's, that weights stream at: gpu-kit, fp16 at batch 1 on an H200, reached 0.51


@dataclass(frozen=True)
class TensorBytes:
    """One tensor of the model, as the checkpoint holds it and as the engine does (over all GPUs, before it is shared out)."""

    name: str
    shape: tuple[int, ...]  # of the weight that it stands for
    quantized: bool
    disk_bytes: int
    gpu_bytes: int


@dataclass(frozen=True)
class Serving:
    """One GPU of the target, as TurboMind would fill it. `fits`: workspace fits beside the pool, and one full session in it."""

    gpu: str
    count: int
    memory_bytes: int
    context_bytes: int
    weights_bytes: int
    workspace_bytes: int
    pool_bytes: int  # max_entry_count of what is free after context and weights
    kv_bytes_per_token: int
    session_bytes: int  # KV of session_len tokens
    pool_tokens: int
    sessions: int  # of session_len tokens at once, max_batch_size at most
    decode_bound_tokens_per_s: float  # batch 1, from bandwidth alone: an upper bound
    spare_bytes: int  # the smaller margin of the two that decide; below 0 where it does not fit
    hint: str  # what to change where it does not fit; empty where it does

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0

    @property
    def needed_bytes(self) -> int:
        """The least that this model can be served from: context, weights, workspace and one full session."""
        return self.context_bytes + self.weights_bytes + self.workspace_bytes + self.session_bytes


@dataclass(frozen=True)
class Building:
    """What one clean build takes: seconds for each kind of step, disk that it fills, and the largest moment in memory."""

    seconds: Mapping[str, float]
    disk_bytes: Mapping[str, int]
    host_bytes: int
    gpu_bytes: int


@dataclass(frozen=True)
class Speed:
    """What a machine reaches in buildsys, not what its maker prints."""

    flops: float  # in large matrix products
    bytes_per_s: float  # of memory, in elementwise work
    serial_flops: float  # in what runs one after another: scale search and the solver
    column_s: float  # one column of GPTQ's loop
    token_s: float  # one layer of one token, for a micro-batch of sampling


def cpu_speed(threads: int) -> Speed:
    """60 GFLOP/s a core: torch reached 107 in one 1,024^3 product on this project's 2-core host, and half of it in whole forwards."""
    return Speed(60e9 * threads, 6e9 * min(threads, 4), 60e9, 100e-6, 1.5e-3 / threads)


def cuda_speed(gpu: GPU) -> Speed:
    """Scaled from one H200 (facts.md, a layer of 7B width, 128 x 2,048 tokens): forward and Gram 0.47 s is 0.23 of its tensor peak, GPTQ
    2.05 s over 35,584 columns."""
    flops = 0.23 * gpu.fp16_tflops * 1e12
    return Speed(flops, 0.5 * gpu.bandwidth_gb_s * 1e9, flops, 55e-6, 0.75e-3)


def weights(architecture: Architecture, schemes: Schemes | None) -> tuple[TensorBytes, ...]:
    """Every tensor's bytes; `schemes` None is the source model in float16.

    A quantized [out, in] weight is out x in codes of `bits`, and for each of its out x groups a float16 scale and, on disk, a zero of
    `bits`. The engine fuses scale and zero to two float16 (linear_weight.cc, fuse_scales_and_zeros). Tied embeddings are one tensor on
    disk and two on the GPU, where the head has a layout of its own.
    """
    linears = {architecture.prefix(layer) + each.name: each for layer in range(architecture.layers) for each in architecture.linears}
    found = []
    for name, shape in architecture.tensors().items():
        module = name.removesuffix(".weight")
        linear = linears.get(module) if module != name else None
        scheme = schemes.of(module) if schemes is not None and linear is not None else None
        if scheme is None or linear is None:
            copies = 2 if name == architecture.embed and architecture.lm_head is None else 1
            found.append(TensorBytes(name, shape, False, 2 * prod(shape), copies * 2 * prod(shape)))
        else:
            codes_bytes = ceil(linear.out_features * linear.in_features * scheme.bits / 8)
            pairs = linear.out_features * scheme.groups(linear.in_features)
            found.append(TensorBytes(name, shape, True, codes_bytes + pairs * 2 + ceil(pairs * scheme.bits / 8), codes_bytes + pairs * 4))
    return tuple(found)


def kv_bytes_per_token(architecture: Architecture, policy: KvPolicy, count: int = 1) -> int:
    """On one of `count` GPUs: layers x heads x (K, V) x (head_dim numbers, and a float16 scale and zero where they are quantized).

    attention/block.h Layout::layer_size. Where there are more GPUs than KV heads, each GPU holds one.
    """
    params_bytes = 0 if policy == "none" else 2 * 2
    head_bytes = architecture.head_dim * KV_BITS[policy] // 8 + params_bytes
    return architecture.layers * ceil(architecture.kv_heads / count) * 2 * head_bytes


def workspace_bytes(architecture: Architecture, session_len: int, max_batch_size: int, count: int = 1) -> int:
    """Activations of the largest forward and the engine's fixed buffers, on one of `count` GPUs. float16 unless said.

    Alive at once: the residual and two hidden states of PREFILL_TOKENS (fewer where no batch has so many); the larger of attention
    (q, k, v, its output, and one session's keys and values unpacked) and MLP (gate, up, their product, of a mixture for each expert that
    a token asks); split-k partial sums in float32;
    and a batch's logits in float16, then float32, then sampling's sorted copy and indices.
    """
    tokens = min(PREFILL_TOKENS, session_len * max_batch_size)
    head, kv_heads = architecture.head_dim, ceil(architecture.kv_heads / count)
    heads = ceil(architecture.heads / count)
    hidden_bytes = 3 * 2 * tokens * architecture.hidden_size
    unpacked_bytes = 2 * 2 * (session_len + KV_BLOCK_TOKENS) * kv_heads * head
    attention_bytes = 2 * tokens * (2 * heads + 2 * kv_heads) * head + unpacked_bytes
    asked = 1 if architecture.experts is None else architecture.experts.per_token
    mlp_bytes = 2 * tokens * asked * 3 * ceil(architecture.intermediate_size / count)
    split_bytes = 4 * SPLIT_K_TOKENS * heads * (head + 2)
    logits_bytes = max_batch_size * architecture.vocab_size * (2 + 4 + 4 + 4)
    return hidden_bytes + max(attention_bytes, mlp_bytes) + split_bytes + logits_bytes + GEMM_BYTES + (GROUP_BYTES if count > 1 else 0)


def serving(
    architecture: Architecture,
    schemes: Schemes | None,
    gpu: GPU,
    *,
    kv_policy: KvPolicy,
    max_entry_count: float,
    session_len: int,
    max_batch_size: int,
    count: int = 1,
) -> Serving:
    """Fills one of `count` GPUs as CreateEngine does: context, weights, then a pool of `max_entry_count` of what is free; the rest is
    workspace's. Matrices are shared out evenly over the GPUs, norms and biases are copied to each."""
    held = weights(architecture, schemes)
    matrices_bytes = sum(each.gpu_bytes for each in held if len(each.shape) == 2)
    weights_bytes = ceil(matrices_bytes / count) + sum(each.gpu_bytes for each in held if len(each.shape) != 2)
    memory_bytes = int(gpu.memory_gib * GIB)
    free_bytes = max(0, memory_bytes - CONTEXT_BYTES - weights_bytes)
    pool_bytes = int(free_bytes * max_entry_count)
    per_token = kv_bytes_per_token(architecture, kv_policy, count)
    block_bytes = per_token * KV_BLOCK_TOKENS
    blocks, session_blocks = pool_bytes // block_bytes, ceil(session_len / KV_BLOCK_TOKENS)
    session_bytes = session_blocks * block_bytes
    work_bytes = workspace_bytes(architecture, session_len, max_batch_size, count)
    beside_bytes = memory_bytes - CONTEXT_BYTES - weights_bytes - pool_bytes - work_bytes
    read_bytes = weights_bytes - (_embedding_bytes(architecture) + _idle_bytes(architecture, held)) // count
    return Serving(
        gpu=gpu.name,
        count=count,
        memory_bytes=memory_bytes,
        context_bytes=CONTEXT_BYTES,
        weights_bytes=weights_bytes,
        workspace_bytes=work_bytes,
        pool_bytes=pool_bytes,
        kv_bytes_per_token=per_token,
        session_bytes=session_bytes,
        pool_tokens=blocks * KV_BLOCK_TOKENS,
        sessions=min(max_batch_size, blocks // session_blocks),
        decode_bound_tokens_per_s=gpu.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE / read_bytes,
        spare_bytes=min(beside_bytes, pool_bytes - session_bytes),
        hint=_hint(free_bytes, work_bytes, session_bytes, per_token, pool_bytes, max_entry_count, kv_policy, session_len),
    )


def needed_bytes(architecture: Architecture, schemes: Schemes | None, *, kv_policy: KvPolicy, session_len: int) -> int:
    """The least memory of one GPU that serves one session, where a recipe names no target."""
    held_bytes = sum(each.gpu_bytes for each in weights(architecture, schemes))
    session_bytes = ceil(session_len / KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS * kv_bytes_per_token(architecture, kv_policy)
    return CONTEXT_BYTES + held_bytes + workspace_bytes(architecture, session_len, 1) + session_bytes


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
    device: Literal["cpu", "cuda"] = "cpu",
    gptq: bool = True,
    sampled: Sequence[tuple[int, int]] = (),
) -> Building:
    """One clean build with `samples` x `seqlen` tokens of calibration; a step's seconds are its floating point work or its bytes.

    `verify_streams`: forwards of the verify text, held side by side: the source's, the artifact's, and one for each KV policy. `sampled`:
    (windows, tokens) of each text that the model writes itself, token by token.
    """
    tokens, scored = samples * seqlen, verify_windows * verify_seqlen
    held = weights(architecture, schemes)
    packed_bytes = sum(each.disk_bytes for each in held)
    forward = _forward_flops(architecture, seqlen) * tokens
    kept = {*architecture.sites, *architecture.scale_sites}
    stats_bytes = architecture.layers * sum(_gram_bytes(architecture.width(site)) for site in kept)
    gram = 2 * 128 * sum(architecture.width(site) * _visits(architecture, site) for site in kept) * architecture.layers * tokens
    head = 2 * architecture.vocab_size * architecture.hidden_size
    serial = _awq_flops(architecture) + (_gptq_flops(architecture) if gptq else 0)
    walk = forward * 2 + _hessian_flops(architecture, tokens) if gptq else 0
    columns = architecture.layers * sum(map(architecture.width, architecture.sites)) if gptq else 0
    written = sum(windows * length for windows, length in sampled)
    layer_tokens = architecture.layers * sum(ceil(windows / SAMPLED_AT_ONCE) * length for windows, length in sampled)
    scoring = verify_streams * (_forward_flops(architecture, verify_seqlen) + head) * scored
    seconds = {
        "tokens": layer_tokens * speed.token_s + (_forward_flops(architecture, seqlen) + head) * written / speed.flops,
        "calibrate": (forward + gram) / speed.flops,
        "quantize": walk / speed.flops + serial / speed.serial_flops + columns * speed.column_s,
        "pack": 4 * packed_bytes / speed.bytes_per_s,
        "score": scoring / speed.flops + 10 * verify_streams * 4 * architecture.vocab_size * scored / speed.bytes_per_s,
    }
    outside = (architecture.embed, architecture.final_norm, architecture.lm_head)
    blocks_bytes = sum(each.disk_bytes for each in held if each.name not in outside)
    disk_bytes = {"calibrate": stats_bytes, "quantize": blocks_bytes, "pack": packed_bytes, "score": 16 * scored * (verify_streams - 1)}
    held_tokens = max(tokens, scored * max(verify_streams, 3) // 3)
    work_bytes = max(_build_bytes(architecture, held_tokens, device), _sampling_bytes(architecture, sampled))
    host_bytes = int(0.4 * GIB) + (work_bytes if device == "cpu" else _block_bytes(architecture, 4))
    return Building(MappingProxyType(seconds), MappingProxyType(disk_bytes), host_bytes, work_bytes if device == "cuda" else 0)


def _embedding_bytes(architecture: Architecture) -> int:
    """The table of which a decode step reads one row."""
    return 2 * architecture.vocab_size * architecture.hidden_size


def _visits(architecture: Architecture, site: Site) -> float:
    """What share of all tokens comes to a site: an expert is sent some, and here all are sent as many."""
    experts = architecture.experts
    return experts.per_token / experts.count if experts is not None and "." in site else 1


def _idle_bytes(architecture: Architecture, held: Sequence[TensorBytes]) -> int:
    """Weights of the experts that one token does not ask."""
    experts = architecture.experts
    if experts is None:
        return 0
    theirs = [f"{linear.name}.weight" for linear in architecture.linears if linear.expert is not None]
    names = {architecture.prefix(layer) + name for layer in range(architecture.layers) for name in theirs}
    return sum(each.gpu_bytes for each in held if each.name in names) * (experts.count - experts.per_token) // experts.count


def _hint(
    free_bytes: int, work_bytes: int, session_bytes: int, per_token: int, pool_bytes: int, share: float, policy: KvPolicy, session_len: int
) -> str:
    """The nearest change that makes it fit: the pool's share, then a shorter session or a smaller KV policy, then another GPU."""
    too_small, no_room = pool_bytes < session_bytes, free_bytes - pool_bytes < work_bytes
    if not too_small and not no_room:
        return ""
    if free_bytes >= work_bytes + session_bytes > 0:
        least, most = ceil(100 * session_bytes / free_bytes) / 100, floor(100 * (free_bytes - work_bytes) / free_bytes) / 100
        if least <= most:
            return f"set kv_cache.max_entry_count between {least:.2f} and {most:.2f} (now {share:g})"
    left_tokens = (free_bytes - work_bytes) // per_token // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS
    smaller = {"none": " or kv_cache.policy: int8,", "int8": " or kv_cache.policy: int4,", "int4": ""}[policy]
    if left_tokens > 0:
        shorter = f"set target.session_len to at most {left_tokens} (now {session_len})"
        return f"{shorter},{smaller} or target.count higher, or a larger target.gpu"
    return "set target.count higher, a larger target.gpu, or fewer quantization.bits: weights and workspace leave nothing for the KV cache"


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


def _block_bytes(architecture: Architecture, width_bytes: int) -> int:
    return width_bytes * sum(prod(shape) for shape in architecture.block_tensors().values())


def _sampling_bytes(architecture: Architecture, sampled: Sequence[tuple[int, int]]) -> int:
    """The whole model in float32, since every token needs every block, and the KV cache of one micro-batch."""
    if not sampled:
        return 0
    longest = max(length for _, length in sampled)
    cache_bytes = architecture.layers * 2 * SAMPLED_AT_ONCE * architecture.kv_heads * longest * architecture.head_dim * 4
    return 4 * sum(prod(shape) for shape in architecture.tensors().values()) + cache_bytes


def _build_bytes(architecture: Architecture, tokens: int, device: Literal["cpu", "cuda"]) -> int:
    """The largest moment, GPTQ of one block: three streams of hidden states (before and after attention, and what o_proj reads), the block
    in float32 twice, and the widest site's Hessian with its factor and a copy."""
    state_bytes = 3 * tokens * architecture.hidden_size * (4 if device == "cpu" else 2)
    widest = max(architecture.width(site) for site in architecture.sites)
    return state_bytes + 2 * _block_bytes(architecture, 4) + 3 * 4 * widest**2
