"""Seconds of a build against those that builds took, and their growth with what causes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_footprint import LLAMA2_7B, MIXTRAL_8X7B, W4, llama

from buildsys import effort, gpus
from buildsys.architecture import Architecture, llama_family
from buildsys.footprint import GIB

DEMO = Path(__file__).parent.parent / "recipes" / "demo" / "model" / "config.json"
SEVEN = llama(32, 4096, 14336, 32, 8, 92544)
FACTOR = 1.5


def near(found: float, measured: float) -> bool:
    return measured / FACTOR < found < measured * FACTOR


@pytest.mark.parametrize(
    ("method", "quantize", "gpu_bytes"),
    [("rtn", 4.7, 11.2e9), ("gptq", 27.4, 11.27e9), ("gptaq", 48.6, 17.4e9)],
    ids=lambda value: f"{value}",
)
def test_a_7b_on_an_h200_takes_what_it_took(method: str, quantize: float, gpu_bytes: float) -> None:
    """benchmarks/RESULTS.md, "A 7B on one GPU": seconds of each step after AWQ; `pack` with `outside`. Memory is planned for GPTQ."""
    speed, floats = effort.cuda_speed(gpus.GPUS["h200"]), method == "gptaq"
    asked = {"samples": 128, "seqlen": 2048, "verify_windows": 2, "verify_seqlen": 512}
    found = effort.building(SEVEN, W4, speed, **asked, gptq=method != "rtn", floats=floats)
    for kind, measured in {"calibrate": 10.6, "quantize": quantize, "pack": 2.6, "score": 4.7}.items():
        assert near(found.seconds[kind], measured), (kind, found.seconds[kind])
    assert near(sum(found.seconds.values()) - found.seconds["score"], 10.6 + quantize + 2.6 + 1.7)
    assert near(found.gpu_bytes, gpu_bytes) and found.machine == "h200"


def test_the_demo_takes_what_it_took() -> None:
    """benchmarks/RESULTS.md, "The demo": 7.6 s on 2 cores; the steps that compute 2.3 + 1.4, 0.4, 1.5, 0.1 and 0.7 s of one such run."""
    demo = llama_family(json.loads(DEMO.read_text()), "config.json")
    sampled = [(32, 256), (32, 256)]
    found = effort.building(demo, W4, effort.cpu_speed(2), samples=32, seqlen=256, verify_windows=32, verify_seqlen=256, sampled=sampled)
    assert near(sum(found.seconds.values()), 7.6)
    for kind, measured in {"tokens": 3.7, "calibrate": 0.4, "quantize": 1.5, "score": 0.7}.items():
        assert near(found.seconds[kind], measured), kind


def test_a_slower_gpu_takes_longer_where_it_computes() -> None:
    fast, slow = (
        effort.building(SEVEN, W4, effort.cuda_speed(gpus.GPUS[name]), samples=128, seqlen=2048, verify_windows=2, verify_seqlen=512)
        for name in ("h200", "a10")
    )
    assert slow.seconds["quantize"] > 3 * fast.seconds["quantize"] and slow.seconds["pack"] == fast.seconds["pack"]


def test_a_mixture_computes_with_the_experts_that_it_asks() -> None:
    def build(asked: int) -> effort.Building:
        assert MIXTRAL_8X7B.experts is not None
        architecture = replace(MIXTRAL_8X7B, experts=replace(MIXTRAL_8X7B.experts, per_token=asked))
        speed = effort.cuda_speed(gpus.GPUS["h200"])
        return effort.building(architecture, W4, speed, samples=128, seqlen=2048, verify_windows=40, verify_seqlen=2048)

    two, four, eight = (build(asked) for asked in (2, 4, 8))
    growth = eight.seconds["score"] - four.seconds["score"]
    assert growth == pytest.approx(2 * (four.seconds["score"] - two.seconds["score"])) and growth > 0
    assert two.disk_bytes == eight.disk_bytes and two.seconds["quantize"] < eight.seconds["quantize"]


def test_building_grows_with_its_causes() -> None:
    def build(architecture: Architecture = LLAMA2_7B, samples: int = 128, gptq: bool = True, threads: int = 2) -> effort.Building:
        speed = effort.cpu_speed(threads)
        return effort.building(architecture, W4, speed, samples=samples, seqlen=512, verify_windows=40, verify_seqlen=512, gptq=gptq)

    whole, half = build(), build(replace(LLAMA2_7B, layers=16))
    assert set(whole.seconds) == {"tokens", *whole.disk_bytes} and set(whole.disk_bytes) == {"calibrate", "quantize", "pack", "score"}
    assert half.seconds["calibrate"] * 2 == pytest.approx(whole.seconds["calibrate"])
    assert whole.host_bytes == half.host_bytes, "one block in memory at a time"
    assert build(threads=4).seconds["calibrate"] < whole.seconds["calibrate"]
    assert build(gptq=False).seconds["quantize"] < whole.seconds["quantize"] and build(samples=256).host_bytes > whole.host_bytes
    assert whole.disk_bytes["pack"] > whole.disk_bytes["quantize"] and whole.gpu_bytes == 0 and whole.machine == "CPU"
    assert 4 * GIB < whole.host_bytes < 64 * GIB
    with pytest.raises(TypeError):
        whole.seconds["calibrate"] = 0.0  # type: ignore[index]
