"""Bytes against counts made by hand and by a second, obvious way; the pool against a simulation of the engine's allocators."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildsys import footprint, gpus
from buildsys.architecture import Architecture, llama_family
from buildsys.archs import mixtral, qwen3_moe
from buildsys.footprint import GIB
from buildsys.scheme import Scheme, Schemes

W4 = Schemes(Scheme(4, 128))


def llama(
    layers: int = 32, hidden: int = 4096, inner: int = 11008, heads: int = 32, kv_heads: int = 32, vocab: int = 32000, tied: bool = False
) -> Architecture:
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
    }
    return llama_family(config, "config.json")


LLAMA2_7B = llama()
LLAMA3_70B = llama(80, 8192, 28672, 64, 8, 128256)


QWEN3_30B_A3B = qwen3_moe.describe(
    {
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    },
    "config.json",
)
MIXTRAL_8X7B = mixtral.describe(
    {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "config.json",
)


def serving(architecture: Architecture, gpu: str, schemes: Schemes | None = W4, **changes: object) -> footprint.Serving:
    asked = {"kv_policy": "none", "max_entry_count": 0.8, "session_len": 4096, "max_batch_size": 32} | changes
    return footprint.serving(architecture, schemes, gpus.GPUS[gpu], **asked)  # type: ignore[arg-type]


def test_llama2_7b_has_its_published_size() -> None:
    plain = footprint.weights(LLAMA2_7B, None)
    assert sum(each.disk_bytes for each in plain) == 2 * 6_738_415_616  # the paper's 6.7B, exactly
    packed = sum(each.disk_bytes for each in footprint.weights(LLAMA2_7B, W4))
    assert packed == pytest.approx(3.89e9, rel=0.005)  # TheBloke/Llama-2-7B-AWQ: model.safetensors of 3.89 GB


def test_one_quantized_matrix_by_hand() -> None:
    found = {each.name: each for each in footprint.weights(LLAMA2_7B, W4)}["model.layers.0.mlp.down_proj.weight"]
    codes, pairs = 4096 * 11008 // 2, 4096 * 11008 // 128
    assert found.disk_bytes == codes + pairs * 2 + pairs // 2 and found.gpu_bytes == codes + pairs * 4 and found.quantized
    whole_rows = {each.name: each for each in footprint.weights(LLAMA2_7B, Schemes(Scheme(4, -1)))}["model.layers.0.mlp.down_proj.weight"]
    assert whole_rows.disk_bytes == codes + 4096 * 2 + 4096 // 2


def test_packed_bytes_are_the_format_s_own() -> None:
    from buildsys.formats import awq

    size = {"I32": 4, "F16": 2}
    found = {each.name: each for each in footprint.weights(LLAMA2_7B, W4)}
    for linear in LLAMA2_7B.linears:
        name = LLAMA2_7B.prefix(3) + linear.name
        layout = awq.layout(name, W4.default, linear.in_features, linear.out_features)
        assert found[f"{name}.weight"].disk_bytes == sum(size[dtype] * shape[0] * shape[1] for dtype, shape in layout.values())


def test_skipped_linears_stay_float() -> None:
    name = "model.layers.0.mlp.down_proj"
    found = {each.name: each for each in footprint.weights(LLAMA2_7B, Schemes(W4.default, frozenset({name})))}
    assert not found[f"{name}.weight"].quantized and found[f"{name}.weight"].disk_bytes == 2 * 4096 * 11008
    assert found["model.layers.1.mlp.down_proj.weight"].quantized


def test_tied_embeddings_are_one_tensor_on_disk_and_two_on_the_gpu() -> None:
    tied, untied = footprint.weights(llama(tied=True), W4), footprint.weights(LLAMA2_7B, W4)
    embedding = 2 * 32000 * 4096
    assert sum(each.disk_bytes for each in untied) - sum(each.disk_bytes for each in tied) == embedding
    assert sum(each.gpu_bytes for each in untied) == sum(each.gpu_bytes for each in tied)


@pytest.mark.parametrize(("policy", "each_head"), [("none", 256), ("int8", 128 + 4), ("int4", 64 + 4)])
def test_kv_bytes_a_token(policy: gpus.KvPolicy, each_head: int) -> None:
    assert footprint.kv_bytes_per_token(LLAMA2_7B, policy) == 32 * 32 * 2 * each_head
    assert footprint.kv_bytes_per_token(LLAMA3_70B, policy, 4) == 80 * 2 * 2 * each_head
    assert footprint.kv_bytes_per_token(LLAMA3_70B, policy, 16) == 80 * 1 * 2 * each_head, "a GPU holds at least one head"


def test_sessions_take_whole_blocks() -> None:
    assert serving(LLAMA2_7B, "l4", session_len=65).session_bytes == 2 * 64 * serving(LLAMA2_7B, "l4").kv_bytes_per_token


@given(
    st.sampled_from(sorted(gpus.GPUS)),
    st.floats(0.01, 0.99),
    st.sampled_from([512, 4096, 32768]),
    st.sampled_from([1, 32]),
    st.sampled_from([1, 2, 4]),
)
def test_parts_add_up(gpu: str, share: float, session_len: int, batch: int, count: int) -> None:
    found = serving(LLAMA2_7B, gpu, max_entry_count=share, session_len=session_len, max_batch_size=batch, count=count)
    assert found.fits == (found.spare_bytes >= 0)
    assert found.fits <= (found.context_bytes + found.weights_bytes + found.pool_bytes + found.workspace_bytes <= found.memory_bytes)
    assert found.fits <= (found.sessions >= 1) and found.fits <= (found.needed_bytes <= found.memory_bytes)


def test_needed_without_a_target_is_what_one_session_takes_there() -> None:
    alone = footprint.needed_bytes(LLAMA2_7B, W4, kv_policy="int8", session_len=4096)
    assert alone == serving(LLAMA2_7B, "a100-80gb", kv_policy="int8", max_batch_size=1).needed_bytes
    assert 5 * GIB < alone < 9 * GIB


def test_mixtures_have_their_published_sizes() -> None:
    """arXiv:2401.04088, section 1, and the model page of Qwen3-30B-A3B; of active weights both count the embedding."""
    for architecture, billions, active in ((MIXTRAL_8X7B, 46.7, 12.9), (QWEN3_30B_A3B, 30.5, 3.3)):
        assert round(sum(each.disk_bytes for each in footprint.weights(architecture, None)) / 2e9, 1) == billions
        here = footprint.held(architecture, None)
        assert here.total_bytes / 2e9 == pytest.approx(billions, abs=0.05)
        assert (here.read_bytes(architecture, 1) + here.table_bytes) / 2e9 == pytest.approx(active, abs=0.06)
        assert here.read_bytes(architecture, 4096) == pytest.approx(here.total_bytes - here.table_bytes, rel=1e-6)
        assert here.read_bytes(architecture, 1) < here.read_bytes(architecture, 8) < here.read_bytes(architecture, 64)


def test_a_mixture_works_with_the_experts_that_it_asks() -> None:
    assert MIXTRAL_8X7B.experts is not None
    quarter, whole = (replace(MIXTRAL_8X7B, experts=replace(MIXTRAL_8X7B.experts, per_token=asked)) for asked in (2, 8))
    assert serving(quarter, "h200").weights_bytes == serving(whole, "h200").weights_bytes
    assert serving(quarter, "h200").workspace_bytes < serving(whole, "h200").workspace_bytes
    assert serving(quarter, "a100-80gb").decode[0].tokens_per_s > 2 * serving(whole, "a100-80gb").decode[0].tokens_per_s


# Several GPUs


def test_two_gpus_hold_half_each_and_every_norm() -> None:
    whole, half = (footprint.held(LLAMA3_70B, W4, count) for count in (1, 2))
    norms = 2 * 8192 * (2 * 80 + 1)
    assert half.total_bytes == (whole.total_bytes - norms) // 2 + norms and half.table_bytes == whole.table_bytes // 2


def test_what_does_not_divide_is_padded() -> None:
    """KV heads are repeated, the inner size is rounded up to a group on each GPU, the head to rows of 8 on each."""
    odd = llama(1, 4096, 11008, 32, 2, 32001)
    tensors = {each.name: each.gpu_bytes for each in footprint.weights(odd, W4)}
    k = tensors["model.layers.0.self_attn.k_proj.weight"]
    mlp = sum(size for name, size in tensors.items() if ".mlp." in name)  # 11,008 are 86 groups, 88 on 4 GPUs
    head = tensors["lm_head.weight"]
    even = sum(tensors.values())
    norms = 2 * 4096 * 3
    expected = (even - norms + 2 * k + mlp * 2 / 86 + head * 31 / 32001) / 4 + norms
    assert footprint.held(odd, W4, 4).total_bytes == pytest.approx(expected, abs=2)
    fused = replace(odd, linears=(replace(odd.linears[0], role="qkv", out_features=36 * 128), *odd.linears[3:]))
    extra = footprint.held(fused, None, 4).total_bytes - (footprint.held(fused, None).total_bytes - norms - head) / 4 - norms
    assert extra == pytest.approx(2 * 4096 * 4 * 128 / 4 + head * 32032 / 32001 / 4, abs=2), (
        "the fused matrix of 32 + 2 x 2 heads holds 32 + 2 x 4"
    )


def test_seventy_billion_fp16_need_four_of_them() -> None:
    alone, four = serving(LLAMA3_70B, "a100-80gb", None), serving(LLAMA3_70B, "a100-80gb", None, count=4)
    assert not alone.fits and alone.pool_tokens == 0
    assert four.fits and four.weights_bytes == pytest.approx(alone.weights_bytes / 4, rel=0.001)


# The pool


def allocated_blocks(pool_bytes: int, block_bytes: int) -> int:
    """As memory/slab.h and page.h do it, one slab after another, from a buddy allocator over whole pages."""
    slab = 32 << 20
    while slab < block_bytes:
        slab *= 2
    while slab // block_bytes * block_bytes / slab < 0.95 and slab < 1 << 30:
        slab *= 2
    pages, need = pool_bytes // (32 << 20), slab // (32 << 20)
    free, blocks = [True] * pages, 0
    for start in range(0, pages, need):  # a buddy of 2^k pages begins at a multiple of it
        if start + need <= pages and all(free[start : start + need]):
            free[start : start + need] = [False] * need
            blocks += slab // block_bytes
    return blocks


@given(st.integers(0, 40 << 30), st.integers(10_000, 64 << 20))
def test_blocks_of_a_pool_are_those_that_the_allocator_finds(total: int, block: int) -> None:
    assert footprint.pool(total, block).blocks == allocated_blocks(total, block)


@pytest.mark.parametrize(
    ("block_mib", "slab_mib", "blocks"),
    [(2, 32, 16), (20, 512, 25), (31, 32, 1), (33, 512, 15), (0.5, 32, 64)],
)
def test_slabs_by_hand(block_mib: float, slab_mib: int, blocks: int) -> None:
    """20 MiB, a block of Llama 3 70B: slabs of 32, 64, 128 and 256 MiB would be filled to 0.625 and 0.9375."""
    found = footprint.pool(10 << 30, int(block_mib * 2**20))
    assert (found.slab_bytes, found.slab_blocks) == (slab_mib << 20, blocks)


def test_the_pool_is_a_share_of_what_is_free_after_weights() -> None:
    found = serving(LLAMA2_7B, "a100-40gb", max_entry_count=0.5)
    free = found.memory_bytes - found.context_bytes - found.weights_bytes
    assert found.pool_bytes == free // 2
    assert found.pool_tokens == footprint.pool(free // 2, 64 * found.kv_bytes_per_token).blocks * 64
    assert 0.95 < found.pool_tokens * found.kv_bytes_per_token / found.pool_bytes <= 1
    assert found.sessions == found.pool_tokens // 4096 and found.fits
    assert serving(LLAMA2_7B, "a100-40gb", max_entry_count=0.5, max_batch_size=2).sessions == 2


def test_a_smaller_kv_policy_holds_more_tokens_in_the_same_pool() -> None:
    none, int8, int4 = (serving(LLAMA2_7B, "l4", kv_policy=policy) for policy in ("none", "int8", "int4"))
    assert none.pool_bytes == int8.pool_bytes == int4.pool_bytes
    assert int8.pool_tokens / none.pool_tokens == pytest.approx(256 / 132, rel=0.06)
    assert int4.pool_tokens / none.pool_tokens == pytest.approx(256 / 68, rel=0.06)


def test_a_pool_that_holds_no_session_does_not_fit() -> None:
    found = serving(LLAMA2_7B, "rtx4090", max_entry_count=0.01)
    assert not found.fits and found.sessions == 0 and found.spare_bytes < 0


# As measured


WIDE = llama(8, 4096, 14336, 32, 8, 92544)
OTHER = llama(6, 3584, 18944, 28, 4, 152064)


@pytest.mark.parametrize(
    ("model", "group_size", "weights_bytes", "free_bytes", "beside_bytes"),
    [
        (WIDE, 128, 2_525_110_272, 145_921_010_565, 4_899_557_868),
        (WIDE, 32, 2_525_110_272, 145_921_010_565, 4_899_557_868),
        (WIDE, None, 5_006_041_088, 143_337_319_301, 7_731_551_929),
        (OTHER, 128, 2_988_461_056, None, 5_402_874_348),
        (OTHER, None, 4_976_634_880, None, 8_127_494_226),
    ],
)
def test_turbomind_on_an_h200(
    model: Architecture, group_size: int | None, weights_bytes: int, free_bytes: int | None, beside_bytes: int
) -> None:
    """benchmarks/planner.py on one H200: weights in the pool, what was free when the KV pool was cut, what was in use beside it. OTHER was
    measured after the constants had been fitted to WIDE."""
    schemes = None if group_size is None else Schemes(Scheme(4, group_size))
    found = serving(model, "h200", schemes, max_entry_count=0.2, session_len=8192)
    assert found.weights_bytes == weights_bytes
    assert free_bytes is None or found.pool_bytes == pytest.approx(0.2 * free_bytes, rel=0.03)
    least = 300 * footprint.MIB
    assert found.context_bytes + found.weights_bytes + found.workspace_bytes == pytest.approx(beside_bytes, rel=0.05, abs=least)


def test_every_other_gpu_fuses_scale_and_zero_of_a_group() -> None:
    older, here = (footprint.held(WIDE, W4, 1, sm) for sm in (89, 90))
    quantized = 8 * sum(linear.in_features * linear.out_features for linear in WIDE.linears)
    assert here.total_bytes - older.total_bytes == quantized // 128 * (4 * 2.5 - 4)
    assert here.loading_bytes > older.loading_bytes > 0


# Workspace


def test_the_workspace_of_a_small_engine_by_hand() -> None:
    """One session of 100 tokens: a forward of 101 tokens, hidden 4,096, 32 heads of 128, the MLP 11,008 wide."""
    found = footprint.workspace(LLAMA2_7B, 100, 1, fused=False)
    assert found.forward_bytes == 2 * 4 * 101 * 4096 + 2 * 101 * 128 * 128 + 2 * 2 * 164 * 32 * 128
    wide = replace(LLAMA2_7B, kv_heads=8, intermediate_size=22016)
    plain, packed = (footprint.workspace(wide, 100, 1, fused=fused) for fused in (False, True))
    assert plain.forward_bytes == 2 * 4 * 101 * 4096 + 2 * 101 * 2 * 22016
    assert packed.forward_bytes == 2 * 4 * 101 * 4096 + 2 * 101 * 22016, "gate and up leave their product alone"
    one_float = Schemes(W4.default, frozenset({"model.layers.7.mlp.up_proj"}))
    assert [footprint.fuses_silu(wide, schemes) for schemes in (None, W4, one_float)] == [False, True, False]
    assert found.head_bytes == 2 * 4096 + 32000 * 10
    assert found.fixed_bytes == footprint.KERNELS_BYTES + 4 * 4096 * (32 * 130 + 1) + 2 * 8 * 2 + 4 * 100 + 2 * 8 * 1024
    assert found.total_bytes == found.fixed_bytes + found.forward_bytes


def test_a_long_session_unpacks_its_cache() -> None:
    short, long = (footprint.workspace(LLAMA2_7B, tokens, 1, fused=True) for tokens in (8192, 131072))
    assert long.forward_bytes - 2 * 4 * 8193 * 4096 - 2 * 8193 * 128 * 128 == 2 * 2 * (131072 + 64) * 32 * 128
    assert short.forward_bytes < long.forward_bytes


def test_few_tokens_make_a_small_forward_and_many_sessions_large_logits() -> None:
    few, more = (footprint.workspace(LLAMA2_7B, tokens, 32, fused=True) for tokens in (1024, 8192))
    assert few.forward_bytes < more.forward_bytes
    many = footprint.workspace(LLAMA3_70B, 256, 2048, fused=True)
    assert many.head_bytes > 2**31 and many.total_bytes == many.fixed_bytes + max(many.forward_bytes, many.head_bytes)
    assert footprint.workspace(LLAMA3_70B, 4096, 32, 4, fused=True).fixed_bytes > footprint.GROUP_BYTES


# Speed


def test_decode_is_of_the_measured_size() -> None:
    """One H200, TurboMind 0.18, 8 layers of 7B width: fp16 698 tokens/s at batch 1 and 19,034 at 32, W4A16 491 and 12,854."""
    wide = llama(8, 4096, 14336, 32, 8, 92544)
    for schemes, one, many in ((None, 698, 19034), (W4, 491, 12854)):
        for batch, measured in ((1, one), (32, many)):
            found = footprint.decode(wide, schemes, gpus.GPUS["h200"], kv_policy="none", batch=batch, context_tokens=300)
            assert 0.8 < found.tokens_per_s / measured < 1.25, (schemes, batch, found)


def test_where_memory_is_slow_few_bits_are_fast() -> None:
    plain, packed = (serving(LLAMA2_7B, "a10", schemes).decode for schemes in (None, W4))
    assert packed[0].tokens_per_s > 2 * plain[0].tokens_per_s and plain[1].batch == 32
    assert packed[1].tokens_per_s < 32 * packed[0].tokens_per_s, "every session's cache is read"
    int4 = serving(LLAMA2_7B, "a10", kv_policy="int4").decode
    assert int4[1].tokens_per_s > 1.3 * packed[1].tokens_per_s
    assert len(serving(LLAMA2_7B, "a10", max_batch_size=1).decode) == 1


def test_a_large_batch_waits_for_its_products() -> None:
    def rate(batch: int, context_tokens: int) -> float:
        asked = {"kv_policy": "int4", "batch": batch, "context_tokens": context_tokens}
        return footprint.decode(LLAMA2_7B, W4, gpus.GPUS["l4"], **asked).tokens_per_s  # type: ignore[arg-type]

    here = footprint.held(LLAMA2_7B, W4)
    assert here.computed == 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    bound = gpus.GPUS["l4"].fp16_tflops * 1e12 * footprint.PRODUCT_SHARE / 2 / here.computed
    assert 0.9 * bound < rate(4096, 16) <= bound and rate(4096, 16) == pytest.approx(rate(4096, 17), rel=1e-9)
    mixed = footprint.held(MIXTRAL_8X7B, None)
    assert mixed.computed / 1e9 == pytest.approx(12.9 - 32000 * 4096 / 1e9, abs=0.06)
