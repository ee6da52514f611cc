"""Bytes of serving, before anything runs: how one GPU of the target is filled, and how fast it would decode.

After TurboMind (LMDeploy 0.18's binary and Python; src/turbomind at commit 1263d5cd, weeks older): weights as builders/ and
linear_weight.cc hold them, the KV pool as turbomind.cc CreateEngine sizes it and memory/ cuts it up, buffers by
unified_attention_layer.cc, language_model.cc and generation.cc. What the source does not tell was measured (benchmarks/planner.py).
No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from types import MappingProxyType

from buildsys.architecture import Architecture, Linear
from buildsys.gpus import GPU, KvPolicy, decode_layer_s
from buildsys.scheme import Scheme, Schemes

GIB = 2**30
MIB = 2**20
KV_BITS: Mapping[KvPolicy, int] = MappingProxyType({"none": 16, "int8": 8, "int4": 4})

# TurboMind's own numbers.
KV_BLOCK_TOKENS = 64  # messages.py cache_block_seq_len: a session takes whole blocks
PREFILL_TOKENS = 8192  # messages.py max_prefill_token_num: a forward takes so many, and one of each session that decodes
PAGE_BYTES = 32 * MIB  # memory/object.cc kPageSize, and the least slab
SLAB_MOST_BYTES = GIB  # kMaxSlabSize
SLAB_USED = 0.95  # kUtilThresh
PHASES = 2  # turbomind.cc: buffers of a batch are there twice, since the next is prepared while one runs
SPLIT_K_TOKENS = 4096  # unified_attention_layer.h kMaxWorkspaceTokens
LOGPROBS = 1024  # utils/constant.h kMaxLogProb, of each session

# Measured on one H200 (benchmarks/planner.py); smaller GPUs have smaller contexts.
CONTEXT_BYTES = 955 * MIB  # before the pool is cut: CUDA context, TurboMind's kernels, workspace of matrix products
KERNELS_BYTES = 130 * MIB  # after it: what is loaded while the engine warms up
SM90_GROUP = 32  # weights for which an sm90 kernel has a scale and a zero of its own, however many the checkpoint's have
SM90_PARAMS_BYTES = 2.5  # of one: a float16 scale and a zero of 4 bits
SM90_LOADED_BYTES = 4.0  # the same until the weights are packed, scale and zero in float16

# To be measured.
GROUP_BYTES = int(0.3 * GIB)  # NCCL's buffers where several GPUs share a model
BANDWIDTH_SHARE = 0.8  # of the data sheet's, that weights and the cache stream at
PRODUCT_SHARE = 0.5  # of the tensor cores' throughput, that products of a large batch reach
CONTEXT_TOKENS = 1024  # that each session is taken to hold while it decodes, or all that it may


@dataclass(frozen=True)
class TensorBytes:
    """One tensor of the model, as the checkpoint holds it and as the engine does (over all GPUs, before it is shared out)."""

    name: str
    shape: tuple[int, ...]  # of the weight that it stands for
    quantized: bool
    disk_bytes: int
    gpu_bytes: int


@dataclass(frozen=True)
class Held:
    """Weights on one of `count` GPUs. `experts_bytes` is part of `total_bytes`, `loading_bytes` is not."""

    count: int
    total_bytes: int
    loading_bytes: int  # what loading them took beside them, which the driver's memory pool keeps
    table_bytes: int  # of the embedding, of which a step reads a row for each session
    experts_bytes: int
    computed: int  # numbers that one token is multiplied with

    def read_bytes(self, architecture: Architecture, batch: int) -> int:
        """What one decode step of `batch` sessions reads: of a mixture the experts that one of them asks, by chance."""
        experts = architecture.experts
        idle = 0.0 if experts is None else (1 - experts.per_token / experts.count) ** batch
        return int(self.total_bytes - self.table_bytes - idle * self.experts_bytes)


@dataclass(frozen=True)
class Pool:
    """The KV cache as memory/ cuts it up: pages of 32 MiB, of them slabs, of them blocks of one size."""

    total_bytes: int
    block_bytes: int
    slab_bytes: int
    slab_blocks: int

    @property
    def blocks(self) -> int:
        return self.total_bytes // PAGE_BYTES // (self.slab_bytes // PAGE_BYTES) * self.slab_blocks

    @property
    def tokens(self) -> int:
        return self.blocks * KV_BLOCK_TOKENS


@dataclass(frozen=True)
class Workspace:
    """What the engine allocates beside weights and pool. `forward` and `head` are never alive together."""

    fixed_bytes: int  # from its start to its end
    forward_bytes: int  # the largest forward through the blocks
    head_bytes: int  # logits of a whole batch and what sampling makes of them

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + max(self.forward_bytes, self.head_bytes)


@dataclass(frozen=True)
class Decode:
    """Tokens a second of `batch` sessions together, each with `context_tokens` in the cache."""

    batch: int
    context_tokens: int
    tokens_per_s: float


@dataclass(frozen=True)
class Asked:
    """What a recipe asks of its target: `count` of these GPUs together, and the engine's settings."""

    gpu: GPU
    count: int
    kv_policy: KvPolicy
    max_entry_count: float
    session_len: int
    max_batch_size: int


@dataclass(frozen=True)
class Serving:
    """One GPU of the target, as TurboMind would fill it. `fits`: workspace fits beside the pool, and one full session in it."""

    gpu: str
    count: int
    memory_bytes: int
    context_bytes: int  # and what loading leaves
    weights_bytes: int
    workspace_bytes: int
    pool_bytes: int  # max_entry_count of what is free after context and weights
    kv_bytes_per_token: int
    session_bytes: int  # KV of session_len tokens
    pool_tokens: int
    sessions: int  # of session_len tokens at once, max_batch_size at most
    decode: tuple[Decode, ...]  # at batch 1, and at max_batch_size; estimates from bandwidth
    spare_bytes: int  # the smaller margin of the two that decide; below 0 where it does not fit

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0

    @property
    def needed_bytes(self) -> int:
        """The least that this model can be served from: context, weights, workspace and one full session."""
        return self.context_bytes + self.weights_bytes + self.workspace_bytes + self.session_bytes


def weights(architecture: Architecture, schemes: Schemes | None, sm: int = 0) -> tuple[TensorBytes, ...]:
    """Every tensor's bytes, on a GPU of that compute capability; `schemes` None is the source model in float16.

    A quantized [out, in] weight is out x in codes of `bits`, and for each of its out x groups a float16 scale and, on disk, a zero of
    `bits`. The engine fuses scale and zero to two float16 (linear_weight.cc, fuse_scales_and_zeros); on sm90 it repeats them for every
    SM90_GROUP weights (builders/_base.py, bridge). Tied embeddings are one tensor on disk and two on the GPU, where the head has a layout
    of its own.
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
            params_bytes = int(_sm90_groups(linear) * SM90_PARAMS_BYTES) if _bridged(scheme, sm) else pairs * 4
            on_disk = codes_bytes + pairs * 2 + ceil(pairs * scheme.bits / 8)
            found.append(TensorBytes(name, shape, True, on_disk, codes_bytes + params_bytes))
    return tuple(found)


def _bridged(scheme: Scheme, sm: int) -> bool:
    return scheme.bits == 4 and sm == 90


def _sm90_groups(linear: Linear) -> int:
    return linear.out_features * ceil(linear.in_features / SM90_GROUP)


def part(architecture: Architecture, tensor: str) -> str:
    """What a tensor is a part of: embeddings, output head, attention, MLP, norms and biases."""
    if tensor in (architecture.embed, architecture.lm_head):
        return "embeddings" if tensor == architecture.embed else "output head"
    role = next((each.role for each in architecture.linears if tensor.endswith(f".{each.name}.weight")), None)
    return "norms and biases" if role is None else "MLP" if role in ("gate", "up", "gate_up", "down") else "attention"


def held(architecture: Architecture, schemes: Schemes | None, count: int = 1, sm: int = 0) -> Held:
    """On one of `count` GPUs of that compute capability. Matrices are shared out over them; norms, biases and routers are copied to each
    (builders/_base.py).

    What does not divide is padded first: builders/attention.py repeats KV heads, ffn.py rounds the inner size up to whole groups on every
    GPU, text_model.py gives the head's rows a multiple of 8 on every GPU.
    """
    linears = {architecture.prefix(layer) + each.name: each for layer in range(architecture.layers) for each in architecture.linears}
    total = experts = table = computed = spread = 0.0
    asked = 1.0 if architecture.experts is None else architecture.experts.per_token / architecture.experts.count
    for each in weights(architecture, schemes, sm):
        module = each.name.removesuffix(".weight")
        linear = linears.get(module)
        if each.name in (architecture.embed, architecture.lm_head):
            padded = ceil(architecture.vocab_size / (8 * count)) * 8 * count if count > 1 else architecture.vocab_size
            size = each.gpu_bytes / count * (padded / architecture.vocab_size if each.name == architecture.lm_head else 1)
            table += 2 * prod(each.shape) / count if each.name == architecture.embed else 0
            computed += prod(each.shape) / count if each.name == (architecture.lm_head or architecture.embed) else 0
        elif linear is None or len(each.shape) == 1:
            size = float(each.gpu_bytes)
        else:
            scheme = schemes.of(module) if schemes is not None else None
            size = each.gpu_bytes / count * _padding(architecture, linear, scheme, count)
            if scheme is not None and _bridged(scheme, sm):
                spread += _sm90_groups(linear) / count * (SM90_LOADED_BYTES - SM90_PARAMS_BYTES)
            experts += size if linear.expert is not None else 0
            computed += prod(each.shape) / count * (asked if linear.expert is not None else 1)
        total += size
    return Held(count, ceil(total), int(spread + _staged_bytes(architecture, schemes, count)), int(table), int(experts), int(computed))


def _staged_bytes(architecture: Architecture, schemes: Schemes | None, count: int) -> float:
    """The most that a tensor needs beside itself while it is laid out for the kernels (linear_weight.cc, prepare): gate and up in one, two
    times in 16 bits where they are quantized and once where they are not, or an embedding that comes in bfloat16."""
    wide = 2 * architecture.hidden_size * architecture.intermediate_size / count
    if schemes is not None:
        return 2 * 2 * wide
    return max(2 * wide, 2 * architecture.vocab_size * architecture.hidden_size / count)


def _padding(architecture: Architecture, linear: Linear, scheme: Scheme | None, count: int) -> float:
    """How many times as large a matrix is when it divides over `count` GPUs."""
    heads, kv_heads = architecture.heads, architecture.kv_heads
    repeated = ceil(kv_heads / count) * count
    if linear.role in ("k", "v"):
        return repeated / kv_heads
    if linear.role == "qkv":
        return (heads + 2 * repeated) / (heads + 2 * kv_heads)
    if linear.role in ("q", "o") or count == 1:
        return 1.0
    inner = architecture.intermediate_size
    unit = count * max(1, scheme.group_size if scheme is not None else 1)
    return ceil(inner / unit) * unit / inner


def kv_bytes_per_token(architecture: Architecture, policy: KvPolicy, count: int = 1) -> int:
    """On one of `count` GPUs: layers x heads x (K, V) x (head_dim numbers, and a float16 scale and zero where they are quantized).

    attention/block.h Layout::layer_size. Where there are more GPUs than KV heads, each GPU holds one.
    """
    params_bytes = 0 if policy == "none" else 2 * 2
    head_bytes = architecture.head_dim * KV_BITS[policy] // 8 + params_bytes
    return architecture.layers * ceil(architecture.kv_heads / count) * 2 * head_bytes


def pool(total_bytes: int, block_bytes: int) -> Pool:
    """A slab is the least power of two, from 32 MiB to 1 GiB, of which blocks fill 95%; the rest of it is lost (memory/slab.h)."""
    slab_bytes = max(PAGE_BYTES, 1 << (block_bytes - 1).bit_length())
    while slab_bytes // block_bytes * block_bytes < SLAB_USED * slab_bytes and slab_bytes < SLAB_MOST_BYTES:
        slab_bytes *= 2
    return Pool(total_bytes, block_bytes, slab_bytes, slab_bytes // block_bytes)


def fuses_silu(architecture: Architecture, schemes: Schemes | None) -> bool:
    """Whether the kernel that multiplies with gate and up multiplies them too: in all layers, as of quantized weights (builders/ffn.py)."""
    gates = [linear.name for linear in architecture.linears if linear.role in ("gate", "up", "gate_up")]
    names = (architecture.prefix(layer) + name for layer in range(architecture.layers) for name in gates)
    return schemes is not None and all(schemes.of(name) is not None for name in names)


def workspace(architecture: Architecture, session_len: int, max_batch_size: int, count: int = 1, *, fused: bool) -> Workspace:
    """Buffers on one of `count` GPUs, float16 unless said, of the largest forward that the scheduler makes.

    A forward prefills PREFILL_TOKENS at most, no more than session_len of context (turbomind.cc max_context_token_num), and decodes a token
    of each other session. Alive in it: the residual and three times hidden states; of attention q, k, v, its output and the context's keys
    and values unpacked; of an MLP gate and up, or where the kernel fuses them their product (`fuses_silu`), of a mixture for each expert
    that a token asks, with their routes and outputs.
    Fixed: kernels; float32 partial sums of split-k, ids and log-probabilities of every session, tables of blocks.
    """
    context = session_len if session_len > max_batch_size else session_len * session_len
    tokens = min(PREFILL_TOKENS, context) + max_batch_size
    head_dim, heads, kv_heads = architecture.head_dim, ceil(architecture.heads / count), ceil(architecture.kv_heads / count)
    hidden, inner, experts = architecture.hidden_size, ceil(architecture.intermediate_size / count), architecture.experts
    unpacked = 2 * 2 * (context + KV_BLOCK_TOKENS) * kv_heads * head_dim
    attention = 2 * tokens * (2 * heads + 2 * kv_heads) * head_dim + unpacked
    mlp = 2 * tokens * (1 if fused else 2) * inner
    if experts is not None:
        mlp = tokens * experts.per_token * (2 * 2 * inner + 2 * hidden + 4 * 4) + 2 * 4 * tokens * experts.count
    split = 4 * SPLIT_K_TOKENS * (heads * (head_dim + 2) + 1)
    tables = PHASES * 8 * max_batch_size * ceil(session_len / KV_BLOCK_TOKENS)
    sessions = max_batch_size * (4 * session_len + PHASES * 8 * LOGPROBS)
    shared = 2 * max((PREFILL_TOKENS + max_batch_size) * hidden, max_batch_size * architecture.vocab_size) + GROUP_BYTES if count > 1 else 0
    return Workspace(
        fixed_bytes=KERNELS_BYTES + split + tables + sessions + shared,
        forward_bytes=2 * 4 * tokens * hidden + max(attention, mlp),
        head_bytes=max_batch_size * (2 * hidden + architecture.vocab_size * (2 + 4 + 4)),
    )


def decode(
    architecture: Architecture,
    schemes: Schemes | None,
    gpu: GPU,
    *,
    kv_policy: KvPolicy,
    batch: int,
    context_tokens: int = CONTEXT_TOKENS,
    count: int = 1,
) -> Decode:
    """From bandwidth: a step reads the weights once and every session's cache, unless its products take longer, and every layer waits for
    a chain of kernels."""
    return _decode(architecture, held(architecture, schemes, count, gpu.sm), schemes, gpu, kv_policy, batch, context_tokens)


def _decode(
    architecture: Architecture, here: Held, schemes: Schemes | None, gpu: GPU, kv_policy: KvPolicy, batch: int, context_tokens: int
) -> Decode:
    cache_bytes = batch * context_tokens * kv_bytes_per_token(architecture, kv_policy, here.count)
    streamed_s = (here.read_bytes(architecture, batch) + cache_bytes) / (gpu.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE)
    products_s = 2 * batch * here.computed / (gpu.fp16_tflops * 1e12 * PRODUCT_SHARE)
    step_s = max(streamed_s, products_s) + architecture.layers * decode_layer_s(
        gpu, few_bits=schemes is not None and schemes.default.bits < 8
    )
    return Decode(batch, context_tokens, batch / step_s)


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
    workspace's. `schemes` None is the source model in float16."""
    asked = Asked(gpu, count, kv_policy, max_entry_count, session_len, max_batch_size)
    return filled(architecture, schemes, held(architecture, schemes, count, gpu.sm), asked)


def filled(architecture: Architecture, schemes: Schemes | None, here: Held, asked: Asked) -> Serving:
    """`serving` where the weights are known: `here` is of `asked.count` such GPUs."""
    gpu, session_blocks = asked.gpu, ceil(asked.session_len / KV_BLOCK_TOKENS)
    memory_bytes = int(gpu.memory_gib * GIB)
    context_bytes = CONTEXT_BYTES + here.loading_bytes
    free_bytes = max(0, memory_bytes - context_bytes - here.total_bytes)
    per_token = kv_bytes_per_token(architecture, asked.kv_policy, asked.count)
    cache = pool(int(free_bytes * asked.max_entry_count), per_token * KV_BLOCK_TOKENS)
    fused = fuses_silu(architecture, schemes)
    work_bytes = workspace(architecture, asked.session_len, asked.max_batch_size, asked.count, fused=fused).total_bytes
    beside_bytes = memory_bytes - context_bytes - here.total_bytes - cache.total_bytes - work_bytes
    context_tokens = min(CONTEXT_TOKENS, asked.session_len)
    rates = [
        _decode(architecture, here, schemes, gpu, asked.kv_policy, batch, context_tokens)
        for batch in dict.fromkeys((1, asked.max_batch_size))
    ]
    return Serving(
        gpu=gpu.name,
        count=asked.count,
        memory_bytes=memory_bytes,
        context_bytes=context_bytes,
        weights_bytes=here.total_bytes,
        workspace_bytes=work_bytes,
        pool_bytes=cache.total_bytes,
        kv_bytes_per_token=per_token,
        session_bytes=session_blocks * cache.block_bytes,
        pool_tokens=cache.tokens,
        sessions=min(asked.max_batch_size, cache.blocks // session_blocks),
        decode=tuple(rates),
        spare_bytes=min(beside_bytes, (cache.blocks - session_blocks) * cache.block_bytes),
    )


def needed_bytes(architecture: Architecture, schemes: Schemes | None, *, kv_policy: KvPolicy, session_len: int) -> int:
    """The least memory of one GPU that serves one session, where a recipe names no target."""
    session_bytes = ceil(session_len / KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS * kv_bytes_per_token(architecture, kv_policy)
    here, work = held(architecture, schemes), workspace(architecture, session_len, 1, fused=fuses_silu(architecture, schemes))
    return CONTEXT_BYTES + here.loading_bytes + here.total_bytes + work.total_bytes + session_bytes
