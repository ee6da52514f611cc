"""What is named as a remedy is one: every change that a hint says is made here, and the model then fits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_footprint import LLAMA2_7B, LLAMA3_70B, W4, llama

from buildsys import footprint, gpus, remedies
from buildsys.architecture import Architecture
from buildsys.footprint import Asked
from buildsys.gpus import GPU, KvPolicy
from buildsys.scheme import Schemes


def asked(gpu: str, **changes: object) -> Asked:
    return replace(Asked(gpus.GPUS[gpu], 1, "none", 0.8, 4096, 32), **changes)  # type: ignore[arg-type]


def fits(architecture: Architecture, schemes: Schemes | None, said: Asked) -> bool:
    return footprint.filled(architecture, schemes, footprint.held(architecture, schemes, said.count), said).fits


def mended(said: Asked, hint: str) -> list[Asked]:
    """Every single change that a hint names, made."""
    found = []
    for way in re.split(", or | \\| ", hint.removeprefix("set ").replace("target.gpu: ", "")):
        change, _, share = way.partition(" with kv_cache.max_entry_count: ")
        other = replace(said, max_entry_count=float(share)) if share else said
        name, _, value = change.rpartition(": ")
        if name == "kv_cache.policy":
            other = replace(other, kv_policy=value)  # type: ignore[arg-type]
        elif name == "target.session_len":
            other = replace(other, session_len=int(value))
        elif name == "target.count":
            other = replace(other, count=int(value))
        else:
            other = replace(other, gpu=gpus.GPUS[change])
        found.append(other)
    return found


def test_what_fits_needs_no_remedy() -> None:
    assert remedies.hint(LLAMA2_7B, W4, asked("a100-40gb")) == ""


def test_a_share_that_leaves_no_room_is_told_its_bounds() -> None:
    greedy = asked("t4", max_entry_count=0.97)
    said = remedies.hint(LLAMA2_7B, W4, greedy)
    assert said.startswith("set kv_cache.max_entry_count between") and said.endswith("(now 0.97)")
    least, most = (float(word) for word in re.findall(r"0\.\d+", said.split("(")[0]))
    for share, holds in ((least, True), (most, True), (least - 0.02, False), (most + 0.02, False)):
        assert fits(LLAMA2_7B, W4, replace(greedy, max_entry_count=share)) == holds, share


def test_a_long_session_names_policy_length_count_and_gpus() -> None:
    long = asked("t4", session_len=24576)
    said = remedies.hint(LLAMA2_7B, W4, long)
    for word in ("kv_cache.policy: int8", "target.session_len: ", "target.count: ", "target.gpu: "):
        assert word in said, said
    ways = mended(long, said)
    assert len(ways) == 3 + remedies.GPUS_NAMED and all(fits(LLAMA2_7B, W4, way) for way in ways), said
    shorter = next(way for way in ways if way.session_len != 24576)
    longer = replace(shorter, session_len=shorter.session_len * 66 // 64 // 64 * 64 + 64)
    assert not any(fits(LLAMA2_7B, W4, replace(longer, max_entry_count=share / 100)) for share in range(1, 100)), "nearly the longest"
    assert not any(f"{gpu} " in said for gpu in ("h200", "b200")), "the smallest that do"


def test_only_what_an_engine_runs_is_named() -> None:
    def runs(gpu: GPU, policy: KvPolicy) -> bool:
        return gpu.sm >= 90 and policy != "int4"

    said = remedies.hint(LLAMA2_7B, W4, asked("t4", session_len=32768), runs)
    assert "policy" not in said and "target.gpu: h100" in said and "a10" not in said


def test_weights_that_no_gpu_holds_alone() -> None:
    said = remedies.hint(LLAMA3_70B, None, asked("a100-80gb"))
    assert said.startswith("set target.count: 2") and "policy" not in said and "session_len" not in said
    huge = replace(LLAMA3_70B, layers=8000)
    assert remedies.hint(huge, None, asked("b200")).startswith("quantize to fewer bits or choose a smaller model")


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(sorted(gpus.GPUS)),
    st.sampled_from([0.01, 0.5, 0.9]),
    st.sampled_from([4096, 65536, 1 << 20]),
    st.sampled_from(["none", "int8", "int4"]),
    st.booleans(),
)
def test_every_way_that_is_named_works(gpu: str, share: float, session_len: int, policy: KvPolicy, packed: bool) -> None:
    model, schemes = llama(16, 4096, 11008, 32, 8), W4 if packed else None
    said = asked(gpu, max_entry_count=share, session_len=session_len, kv_policy=policy)
    hint = remedies.hint(model, schemes, said)
    assert (hint == "") == fits(model, schemes, said)
    if " between " in hint:
        bounds = [float(word) for word in hint.split("(")[0].split() if word.startswith("0.")]
        assert all(fits(model, schemes, replace(said, max_entry_count=bound)) for bound in bounds)
    elif hint.startswith("set"):
        assert all(fits(model, schemes, way) for way in mended(said, hint)), hint


@pytest.mark.parametrize(
    ("kv_heads", "count", "says"),
    [
        (8, 4, None),
        (2, 4, None),
        (8, 3, "32 attention heads are not shared out evenly over 3 GPUs"),
        (8, 64, "32 attention heads are not shared out evenly over 64 GPUs"),
    ],
)
def test_heads_are_shared_out_or_repeated(kv_heads: int, count: int, says: str | None) -> None:
    assert remedies.indivisible(llama(1, 4096, 11008, 32, kv_heads), count) == says


def test_kv_heads_that_are_neither_shared_out_nor_repeated() -> None:
    said = remedies.indivisible(replace(LLAMA2_7B, heads=24, kv_heads=6), 4)
    assert said == "6 KV heads are neither shared out nor repeated evenly over 4 GPUs"
