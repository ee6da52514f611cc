"""GPUs that a recipe can name, and what LMDeploy runs on them: facts for planning, so that a misfit costs seconds and no build.

Memory is what the CUDA driver reports as the device's total (torch's "total capacity of ... GiB"; the data sheet's GB less ECC and
firmware; the smallest of the values that users' logs show). Bandwidth and tensor throughput are from NVIDIA's data sheets. What runs
where is from LMDeploy's docs and kernels at commit 1263d5cd (August 2026, the 0.18 line).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

KvPolicy = Literal["none", "int8", "int4"]


@dataclass(frozen=True)
class GPU:
    """One device. `sm` is the compute capability without its dot: 8.9 is 89."""

    name: str
    sm: int
    memory_gib: float
    bandwidth_gb_s: float
    fp16_tflops: float  # dense, tensor cores, 32-bit sums
    product: str  # the model whose numbers these are, and their source


_TABLE = (
    GPU("t4", 75, 14.56, 320, 65, "Tesla T4 16 GB; data sheet (2019)"),
    GPU("v100", 70, 15.77, 900, 125, "Tesla V100 SXM2 16 GB; data sheet (2020)"),
    GPU("v100-32gb", 70, 31.73, 900, 125, "Tesla V100 SXM2 32 GB; data sheet (2020)"),
    GPU("a10", 86, 21.96, 600, 125, "A10 24 GB; data sheet (2021)"),
    GPU("a100-40gb", 80, 39.38, 1555, 312, "A100 40 GB, SXM4 and PCIe; data sheet (2021)"),
    GPU("a100-80gb", 80, 79.14, 1935, 312, "A100 80 GB PCIe (SXM4: 2,039 GB/s); data sheet (2021)"),
    GPU("rtx3090", 86, 23.68, 936, 71, "GeForce RTX 3090 24 GB; GA102 white paper"),
    GPU("rtx4090", 89, 23.64, 1008, 165, "GeForce RTX 4090 24 GB; Ada white paper"),
    GPU("l4", 89, 22.03, 300, 121, "L4 24 GB; data sheet (2023), half of its sparse figure"),
    GPU("l40s", 89, 44.39, 864, 362, "L40S 48 GB; data sheet (2023)"),
    GPU("h100", 90, 79.10, 3350, 989, "H100 SXM5 80 GB; data sheet (2023), half of its sparse figure"),
    GPU("h200", 90, 139.72, 4800, 989, "H200 SXM 141 GB; data sheet (2024), half of its sparse figure"),
    GPU("b200", 100, 178.35, 8000, 2250, "B200 SXM 180 GB; DGX B200 data sheet (2024): 64 TB/s and 72 PFLOPS sparse FP8 over 8"),
)
GPUS: dict[str, GPU] = {gpu.name: gpu for gpu in _TABLE}


@dataclass(frozen=True)
class Support:
    """What it takes for LMDeploy to run one weight format."""

    engine: Literal["turbomind", "pytorch"]
    min_sm: int
    group_sizes: tuple[int, ...] | None  # None: no groups to speak of
    source: str


_GROUPS = "lmdeploy/turbomind/converter.py _SUPPORTED_GROUP_SIZES"
SUPPORT: dict[str, Support] = {
    "fp16": Support("turbomind", 70, None, "docs/en/get_started/installation.md: Volta sm70 and later"),
    # docs/en/quantization/w4a16.md lists V100 (sm70); kernels/gemm/kernel/sm70_884_4.cu. Builds with CUDA 13 leave sm70 and sm75 out
    # (CMakeLists.txt), so a V100 or a T4 needs a CUDA 12 build of LMDeploy.
    "awq": Support("turbomind", 70, (128,), f"docs/en/quantization/w4a16.md; {_GROUPS}"),
    "gptq": Support("turbomind", 70, (128,), f"docs/en/quantization/w4a16.md; {_GROUPS}"),
    "compressed_tensors": Support("turbomind", 70, (32, 128), f"docs/en/quantization/llm_compressor.md; {_GROUPS}"),
    "w8a8_int8": Support("pytorch", 70, None, "docs/en/quantization/w8a8.md: INT8 from V100 sm70"),
    "w8a8_fp8": Support("pytorch", 89, None, "docs/en/quantization/w8a8.md: FP8 from Ada sm89"),
}
"""Weight formats by the name of their module in formats/ (`fp16`: a model that is not quantized)."""

_SPELLED_OUT = frozenset(["nvidia", "tesla", "geforce", "pcie", "sxm", "sxm2", "sxm4", "sxm5", "hbm2", "hbm2e", "hbm3", "hbm3e"])
"""What drivers print around a device's name: NVIDIA A100-SXM4-80GB, NVIDIA H100 80GB HBM3."""


def lookup(name: str) -> GPU | None:
    """The GPU of that name, in any case; None where the table has none (see `close`)."""
    return GPUS.get(name.strip().lower())


def close(name: str) -> tuple[str, ...]:
    """Names that a user who wrote `name` may have meant, nvidia-smi's spelling included: the same, else those that start alike, else those
    that are spelled alike."""
    words = [word for word in re.split("[^a-z0-9]+", name.lower()) if word and word not in _SPELLED_OUT]
    asked = "-".join(words)
    same = [known for known in GPUS if words and known.replace("-", "") == "".join(words)]
    starts = [known for known in GPUS if asked and (known.startswith(asked) or re.match(rf"{known}(?!\d)", asked))]
    return tuple(same or sorted(starts, key=len, reverse=True) or difflib.get_close_matches(asked, GPUS, n=3, cutoff=0.6))


def head_dims(sm: int, kv_policy: KvPolicy) -> tuple[int, ...]:
    """Head sizes for which TurboMind has an attention kernel (kernels/attention/kernel/decoding_sm*_*.cu; 192 has no int4)."""
    return (64, 128, 192, 256) if sm >= 80 and kv_policy != "int4" else (64, 128, 256)


def refusal(gpu: GPU, format: str) -> str | None:
    """Why no engine of LMDeploy serves this format on `gpu`, with both values; None where one does."""
    support = SUPPORT.get(format)
    if support is None:
        return f"LMDeploy is not known to run format {format}; known: {', '.join(SUPPORT)}"
    if gpu.sm < support.min_sm:
        return f"format {format} runs from sm{support.min_sm} in LMDeploy, {gpu.name} is sm{gpu.sm}"
    return None


def turbomind_lacks(format: str, group_size: int, kv_policy: KvPolicy, head_dim: int, gpu: GPU | None) -> Iterator[str]:
    """Why TurboMind, the faster of LMDeploy's two engines, does not serve this; nothing where it does. No GPU: nothing is asked of one."""
    support = SUPPORT.get(format)
    if support is None or support.engine != "turbomind":
        yield f"TurboMind does not load format {format}"
        return
    if support.group_sizes is not None and group_size not in support.group_sizes:
        held = " or ".join(map(str, support.group_sizes))
        yield f"TurboMind loads format {format} with groups of {held} only, group_size is {group_size}"
    if gpu is not None and head_dim not in head_dims(gpu.sm, kv_policy):
        held = ", ".join(map(str, head_dims(gpu.sm, kv_policy)))
        where = f"TurboMind on {gpu.name} (sm{gpu.sm})"
        yield f"{where} has attention with KV policy {kv_policy} for heads of {held}, head_dim is {head_dim}"
