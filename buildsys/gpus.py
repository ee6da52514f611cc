"""GPUs that a recipe can name, and what LMDeploy runs on them: facts for planning, so that a misfit costs seconds and no build.

Memory is what the CUDA driver reports as the device's total (torch's "total capacity of ... GiB"; the data sheet's GB less ECC and
firmware; the smallest of the values that users' logs show). Bandwidth and tensor throughput are from NVIDIA's data sheets. What runs
where is from LMDeploy's docs, loaders and kernels at commit 1263d5cd (August 2026, the 0.18 line).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from buildsys.scheme import Activations, Scheme

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
    """How an engine of LMDeploy runs a format: from which GPU on, and what it takes of what the format holds (None: all of it).

    None of them takes several schemes in one model."""

    min_sm: int
    source: str
    bits: int | None = None
    group_sizes: tuple[int, ...] | None = None
    symmetric: bool = False  # whether that is all that it takes
    activations: tuple[Activations, ...] = ("none",)
    fp8_min_sm: int = 0

    def lacks(self, loads: str, kinds: Sequence[Scheme], gpu: GPU | None) -> Iterator[str]:
        """Why it does not load these schemes, or not on `gpu`; nothing where it does. A model that is not quantized has no scheme."""
        if len(set(kinds)) > 1:
            yield f"{loads} with one scheme for all linears, asked are {', '.join(map(str, kinds))}"
            return
        for scheme in kinds[:1]:
            if self.bits not in (None, scheme.bits):
                yield f"{loads} with {self.bits} bits only, bits is {scheme.bits}"
            elif scheme.activations not in self.activations:
                yield f"{loads} with activations {' or '.join(self.activations)} only, activations is {scheme.activations}"
            if self.group_sizes is not None and scheme.group_size not in self.group_sizes:
                yield f"{loads} with groups of {' or '.join(map(str, self.group_sizes))} only, group_size is {scheme.group_size}"
            if self.symmetric and not scheme.symmetric:
                yield f"{loads} with zeros in mid-range only, symmetric is false"
        least = self.fp8_min_sm if any(scheme.number == "fp8" for scheme in kinds) else self.min_sm
        if gpu is not None and gpu.sm < least:
            yield f"{loads} from sm{least}, {gpu.name} is sm{gpu.sm}"


Engine = Literal["turbomind", "pytorch"]
ENGINES: dict[Engine, str] = {"turbomind": "TurboMind", "pytorch": "LMDeploy's PyTorch engine"}

_GROUPS = "lmdeploy/turbomind/converter.py _SUPPORTED_GROUP_SIZES"
_SINCE = "docs/en/get_started/installation.md: Volta sm70 and later"
SUPPORT: dict[str, dict[Engine, Support]] = {
    "fp16": {"turbomind": Support(70, _SINCE), "pytorch": Support(70, _SINCE)},
    # docs/en/quantization/w4a16.md lists V100 (sm70); kernels/gemm/kernel/sm70_884_4.cu. Builds with CUDA 13 leave sm70 and sm75 out
    # (CMakeLists.txt), so a V100 or a T4 needs a CUDA 12 build of LMDeploy.
    "awq": {
        "turbomind": Support(70, f"docs/en/quantization/w4a16.md; {_GROUPS}", 4, (128,)),
        "pytorch": Support(70, f"{_SINCE}; pytorch/kernels/cuda/awq_kernels.py takes a group in one step", 4, (32, 64, 128)),
    },
    "gptq": {"turbomind": Support(70, f"lmdeploy/turbomind/converter.py get_tm_config asks for sym; {_GROUPS}", 4, (128,), True)},
    "compressed_tensors": {"turbomind": Support(70, f"docs/en/quantization/llm_compressor.md; {_GROUPS}", 4, (32, 128))},
    "smooth_quant": {
        "pytorch": Support(70, "docs/en/quantization/w8a8.md: INT8 from sm70, FP8 from sm89", 8, (-1,), True, ("int8", "fp8"), 89)
    },
}
"""Weight formats by the name of their module in formats/ (`fp16`: a model that is not quantized)."""

_SPELLED_OUT = frozenset(["nvidia", "tesla", "geforce", "pcie", "sxm", "sxm2", "sxm4", "sxm5", "hbm2", "hbm2e", "hbm3", "hbm3e"])
"""What drivers print around a device's name: NVIDIA A100-SXM4-80GB, NVIDIA H100 80GB HBM3."""

SAME_MEMORY = 0.12
"""How far a device's memory may be from the table's."""

DECODE_LAYER_S = 45e-6
FEW_BITS_LAYER_S = 210e-6
"""What a layer adds to a decode step beside what it reads, as seen on one H200 with TurboMind 0.18 and layers of 7B width: kernels that
wait for each other, and where weights have 4 bits products that do not reach the memory's speed on sm90."""


def decode_layer_s(gpu: GPU, few_bits: bool) -> float:
    """Seconds a layer and step, whatever the bandwidth; `few_bits`: weights of fewer than 8."""
    return FEW_BITS_LAYER_S if few_bits and gpu.sm >= 90 else DECODE_LAYER_S


def here(devices: Path = Path("/proc/driver/nvidia/gpus")) -> GPU | None:
    """This machine's first GPU, told without CUDA by the driver's own files; None where there is none or the table has none like it."""
    for said in sorted(devices.glob("*/information")):
        model = re.search(r"^Model:\s*(.+?)\s*$", said.read_text(errors="replace"), re.MULTILINE)
        if model is not None:
            return GPUS.get(next(iter(close(model[1])), ""))
    return None


def lookup(name: str) -> GPU | None:
    """The GPU of that name, in any case; None where the table has none (see `close`)."""
    return GPUS.get(name.strip().lower())


def close(name: str) -> tuple[str, ...]:
    """Names that a user who wrote `name` may have meant, nvidia-smi's spelling included: the same, else those that start alike, else those
    that are spelled alike."""
    words = _words(name)
    asked = "-".join(words)
    same = [known for known in GPUS if words and known.replace("-", "") == "".join(words)]
    starts = [known for known in GPUS if asked and (known.startswith(asked) or re.match(rf"{known}(?!\d)", asked))]
    return tuple(same or sorted(starts, key=len, reverse=True) or difflib.get_close_matches(asked, GPUS, n=3, cutoff=0.6))


def is_device(gpu: GPU, printed: str, memory_bytes: int) -> bool:
    """Whether what a driver prints is this GPU, and none that is only spelled like it: an H20 is no H200, an L40 no L40S.

    `memory_bytes`: the device's own, which tells siblings of one name apart; ECC takes a tenth of it, or not.
    """
    words = _words(printed)
    without_size = (word for word in words if not re.fullmatch(r"\d+gb", word))
    named = gpu.name.replace("-", "") in ("".join(words), "".join(without_size))
    return named and abs(memory_bytes / 2**30 / gpu.memory_gib - 1) < SAME_MEMORY


def _words(name: str) -> list[str]:
    return [word for word in re.split("[^a-z0-9]+", name.lower()) if word and word not in _SPELLED_OUT]


def head_dims(sm: int, kv_policy: KvPolicy) -> tuple[int, ...]:
    """Head sizes for which TurboMind has an attention kernel (kernels/attention/kernel/decoding_sm*_*.cu; 192 has no int4).

    An int4 cache of heads of 64 ends LMDeploy 0.18's process on an H200, with a misaligned address (benchmarks/kv_engine.py); its kernels
    are sm80's too."""
    if sm < 80:
        return (64, 128, 256)
    return (128, 256) if kv_policy == "int4" else (64, 128, 192, 256)


def engine_lacks(engine: Engine, format: str, kinds: Sequence[Scheme], gpu: GPU | None = None) -> Iterator[str]:
    """Why an engine does not load a model of this format and these schemes, or not on `gpu`; nothing where it does."""
    support = SUPPORT.get(format, {}).get(engine)
    if support is None:
        yield f"{ENGINES[engine]} does not load format {format}"
    else:
        yield from support.lacks(f"{ENGINES[engine]} loads format {format}", kinds, gpu)


def refusal(gpu: GPU | None, format: str, kinds: Sequence[Scheme]) -> str | None:
    """Why no engine of LMDeploy serves this format with these schemes on `gpu`, with both values; None where one does."""
    if format not in SUPPORT:
        return f"LMDeploy is not known to run format {format}; known: {', '.join(SUPPORT)}"
    reasons = [list(engine_lacks(engine, format, kinds, gpu)) for engine in SUPPORT[format]]
    return "; ".join(reason for each in reasons for reason in each) if all(reasons) else None


def turbomind_lacks(format: str, kinds: Sequence[Scheme], kv_policy: KvPolicy, head_dim: int, gpu: GPU | None) -> Iterator[str]:
    """Why TurboMind, the faster of LMDeploy's two engines, does not serve this; nothing where it does. No GPU: nothing is asked of one."""
    yield from engine_lacks("turbomind", format, kinds, gpu)
    if format in SUPPORT and "turbomind" in SUPPORT[format] and gpu is not None and head_dim not in head_dims(gpu.sm, kv_policy):
        held = ", ".join(map(str, head_dims(gpu.sm, kv_policy)))
        where = f"TurboMind on {gpu.name} (sm{gpu.sm})"
        yield f"{where} has attention with KV policy {kv_policy} for heads of {held}, head_dim is {head_dim}"
