"""Bytes against counts made by hand and by a second, obvious way; fits and hints at their edges."""

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


@pytest.mark.parametrize(
    ("architecture", "billions", "active"),
    [(MIXTRAL_8X7B, 46.7, 12.9), (QWEN3_30B_A3B, 30.5, 3.3)],
    ids=["mixtral", "qwen3_moe"],
)
def test_mixtures_have_their_published_sizes(architecture: Architecture, billions: float, active: float) -> None:
    """arXiv:2401.04088, section 1, and the model page of Qwen3-30B-A3B; of active weights both count the embedding."""
    assert round(sum(each.disk_bytes for each in footprint.weights(architecture, None)) / 2e9, 1) == billions
    read_bytes = (
        gpus.GPUS["h200"].bandwidth_gb_s * 1e9 * footprint.BANDWIDTH_SHARE / serving(architecture, "h200", None).decode_bound_tokens_per_s
    )
    assert read_bytes / 2e9 + architecture.vocab_size * architecture.hidden_size / 1e9 == pytest.approx(active, abs=0.06)


def test_a_mixture_computes_with_the_experts_that_it_asks() -> None:
    def build(asked: int) -> footprint.Building:
        assert MIXTRAL_8X7B.experts is not None
        architecture = replace(MIXTRAL_8X7B, experts=replace(MIXTRAL_8X7B.experts, per_token=asked))
        speed = footprint.cuda_speed(gpus.GPUS["h200"])
        return footprint.building(architecture, W4, speed, samples=128, seqlen=2048, verify_windows=40, verify_seqlen=2048, device="cuda")

    two, four, eight = (build(asked) for asked in (2, 4, 8))
    growth = eight.seconds["score"] - four.seconds["score"]
    assert growth == pytest.approx(2 * (four.seconds["score"] - two.seconds["score"])) and growth > four.seconds["score"] / 2
    assert two.disk_bytes == eight.disk_bytes and two.seconds["quantize"] < eight.seconds["quantize"]
    quarter, whole = (serving(replace(MIXTRAL_8X7B, experts=replace(MIXTRAL_8X7B.experts, per_token=asked)), "h200") for asked in (2, 8))
    assert quarter.weights_bytes == whole.weights_bytes and quarter.workspace_bytes < whole.workspace_bytes
    assert quarter.decode_bound_tokens_per_s > 2 * whole.decode_bound_tokens_per_s


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


def test_the_pool_is_a_share_of_what_is_free_after_weights() -> None:
    found = serving(LLAMA2_7B, "a100-40gb", max_entry_count=0.5)
    free = found.memory_bytes - found.context_bytes - found.weights_bytes
    assert found.pool_bytes == free // 2
    assert found.pool_tokens == found.pool_bytes // (64 * found.kv_bytes_per_token) * 64
    assert found.sessions == found.pool_tokens // 4096 and found.fits and not found.hint
    assert serving(LLAMA2_7B, "a100-40gb", max_entry_count=0.5, max_batch_size=2).sessions == 2


def test_a_smaller_kv_policy_holds_more_tokens_in_the_same_pool() -> None:
    none, int8, int4 = (serving(LLAMA2_7B, "l4", kv_policy=policy) for policy in ("none", "int8", "int4"))
    assert none.pool_bytes == int8.pool_bytes == int4.pool_bytes
    assert int8.pool_tokens / none.pool_tokens == pytest.approx(256 / 132, rel=0.01)
    assert int4.pool_tokens / none.pool_tokens == pytest.approx(256 / 68, rel=0.01)


def test_sessions_take_whole_blocks() -> None:
    assert serving(LLAMA2_7B, "l4", session_len=65).session_bytes == 2 * 64 * serving(LLAMA2_7B, "l4").kv_bytes_per_token


def test_seventy_billion_fp16_need_four_of_them() -> None:
    alone, four = serving(LLAMA3_70B, "a100-80gb", None), serving(LLAMA3_70B, "a100-80gb", None, count=4)
    assert not alone.fits and "target.count" in alone.hint and alone.pool_tokens == 0
    assert four.fits and four.weights_bytes == pytest.approx(alone.weights_bytes / 4, rel=0.001)


def test_hints_mend_what_they_are_about() -> None:
    greedy = serving(LLAMA2_7B, "t4", max_entry_count=0.97)
    assert not greedy.fits and greedy.hint.startswith("set kv_cache.max_entry_count between")
    least, most = (float(word) for word in greedy.hint.split() if word.startswith("0.") and "0.97" not in word)
    assert serving(LLAMA2_7B, "t4", max_entry_count=least).fits and serving(LLAMA2_7B, "t4", max_entry_count=most).fits
    long = serving(LLAMA2_7B, "t4", session_len=131072)
    assert not long.fits and "target.session_len to at most" in long.hint and "policy: int8" in long.hint
    assert "policy" not in serving(LLAMA2_7B, "t4", session_len=1 << 20, kv_policy="int4").hint


def test_a_pool_that_holds_no_session_does_not_fit() -> None:
    found = serving(LLAMA2_7B, "rtx4090", max_entry_count=0.01)
    assert not found.fits and found.sessions == 0 and found.spare_bytes == found.pool_bytes - found.session_bytes


@given(
    st.sampled_from(sorted(gpus.GPUS)),
    st.floats(0.01, 0.99),
    st.sampled_from([512, 4096, 32768]),
    st.sampled_from([1, 32]),
    st.sampled_from([1, 2, 4]),
)
def test_parts_add_up(gpu: str, share: float, session_len: int, batch: int, count: int) -> None:
    found = serving(LLAMA2_7B, gpu, max_entry_count=share, session_len=session_len, max_batch_size=batch, count=count)
    assert found.fits == (not found.hint) == (found.spare_bytes >= 0)
    assert found.fits <= (found.context_bytes + found.weights_bytes + found.pool_bytes + found.workspace_bytes <= found.memory_bytes)
    assert found.fits <= (found.sessions >= 1) and found.fits <= (found.needed_bytes <= found.memory_bytes)


def test_needed_without_a_target_is_what_one_session_takes_there() -> None:
    alone = footprint.needed_bytes(LLAMA2_7B, W4, kv_policy="int8", session_len=4096)
    assert alone == serving(LLAMA2_7B, "h100", kv_policy="int8", max_batch_size=1).needed_bytes
    assert 5 * GIB < alone < 9 * GIB


def test_decode_is_bounded_by_bandwidth() -> None:
    """gpu-kit: 8 layers of 7B width on an H200, fp16, reach 698 tok/s at batch 1; a bound must lie above, and not far."""
    found = serving(llama(8), "h200", None)
    assert 698 < found.decode_bound_tokens_per_s < 1.5 * 698


def test_build_seconds_are_of_the_measured_size() -> None:
    """facts.md: an H200, a layer of 7B width, 128 x 2,048 tokens: forward and Gram 0.47 s, AWQ 0.31 s, GPTQ 2.05 s."""
    layer = llama(1, vocab=256)
    speed = footprint.cuda_speed(gpus.GPUS["h200"])
    found = footprint.building(layer, W4, speed, samples=128, seqlen=2048, verify_windows=40, verify_seqlen=2048, device="cuda")
    assert 0.5 < found.seconds["calibrate"] / 0.47 < 2
    assert 0.5 < found.seconds["quantize"] / (2 * 0.47 + 0.31 + 2.05) < 2
    assert 4 * GIB < found.gpu_bytes < 12 * GIB  # 10.2 GB at its peak


def test_building_grows_with_its_causes() -> None:
    def build(architecture: Architecture = LLAMA2_7B, samples: int = 128, gptq: bool = True, threads: int = 2) -> footprint.Building:
        speed = footprint.cpu_speed(threads)
        return footprint.building(architecture, W4, speed, samples=samples, seqlen=512, verify_windows=40, verify_seqlen=512, gptq=gptq)

    whole, half = build(), build(replace(LLAMA2_7B, layers=16))
    assert set(whole.seconds) == {"tokens", *whole.disk_bytes} and set(whole.disk_bytes) == {"calibrate", "quantize", "pack", "score"}
    assert half.seconds["calibrate"] * 2 == pytest.approx(whole.seconds["calibrate"])
    assert whole.host_bytes == half.host_bytes, "one block in memory at a time"
    assert build(threads=4).seconds["calibrate"] < whole.seconds["calibrate"]
    assert build(gptq=False).seconds["quantize"] < whole.seconds["quantize"] and build(samples=256).host_bytes > whole.host_bytes
    assert whole.disk_bytes["pack"] > whole.disk_bytes["quantize"] and whole.gpu_bytes == 0
    with pytest.raises(TypeError):
        whole.seconds["calibrate"] = 0.0  # type: ignore[index]
