"""The table of GPUs, close names, and what LMDeploy refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from buildsys import gpus
from buildsys.scheme import Scheme
from buildsys.slots import modules


def test_names_that_a_recipe_can_use() -> None:
    asked = ["t4", "v100", "a10", "a100-40gb", "a100-80gb", "rtx3090", "rtx4090", "l4", "l40s", "h100", "h200", "b200"]
    assert all(gpus.lookup(name) is not None for name in asked)
    assert gpus.lookup(" H100 ") is gpus.GPUS["h100"] and gpus.lookup("tpu") is None


@pytest.mark.parametrize("gpu", gpus.GPUS.values(), ids=lambda gpu: gpu.name)
def test_facts_are_of_real_devices(gpu: gpus.GPU) -> None:
    marketed_gb = int(gpu.product.split(" GB")[0].split()[-1])
    assert 0.84 * marketed_gb < gpu.memory_gib < marketed_gb, "usable memory is a little below what is printed on the box"
    assert gpu.sm in (70, 75, 80, 86, 89, 90, 100) and 250 < gpu.bandwidth_gb_s <= 8000 and 60 < gpu.fp16_tflops <= 2250
    assert gpu.product.count(";") == 1, "every row says where it is from"


@pytest.mark.parametrize(
    ("written", "meant"),
    [("a100", "a100-40gb"), ("h10", "h100"), ("rtx 4090", "rtx4090"), ("RTX_3090", "rtx3090"), ("l40", "l40s"), ("A100-80G", "a100-80gb")],
)
def test_close_names(written: str, meant: str) -> None:
    assert meant in gpus.close(written)


@pytest.mark.parametrize(
    ("printed", "meant"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla T4", "t4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_what_nvidia_smi_prints(printed: str, meant: str) -> None:
    assert gpus.close(printed) == (meant,)


@pytest.mark.parametrize(
    ("printed", "mebibytes", "named"),
    [
        ("Tesla T4", 15360, "t4"),
        ("Tesla V100-SXM2-16GB", 16384, "v100"),
        ("Tesla V100-SXM2-32GB", 32768, "v100-32gb"),
        ("NVIDIA A10", 24564, "a10"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 81920, "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx4090"),
        ("NVIDIA L40S", 46068, "l40s"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100"),
        ("NVIDIA H200", 143771, "h200"),
        ("NVIDIA B200", 183359, "b200"),
        ("NVIDIA H20", 143771, ""),
        ("NVIDIA L40", 46068, ""),
        ("NVIDIA A40", 24564, ""),
        ("NVIDIA A10G", 23028, ""),
        ("NVIDIA H800", 81559, ""),
        ("NVIDIA A800-SXM4-80GB", 81920, ""),
        ("NVIDIA H100 NVL", 95830, ""),
        ("NVIDIA H100 80GB HBM3 in MIG slices", 81559, ""),
        ("NVIDIA GeForce RTX 4080", 24564, ""),
        ("NVIDIA GeForce RTX 4090 D", 24564, ""),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, ""),
        ("NVIDIA H200", 18000, ""),
    ],
)
def test_a_device_is_one_of_the_table_or_none(printed: str, mebibytes: int, named: str) -> None:
    """What is only spelled like a GPU of the table is not measured in its place."""
    assert [name for name, gpu in gpus.GPUS.items() if gpus.is_device(gpu, printed, mebibytes << 20)] == ([named] if named else [])


def test_nothing_is_close_to_nonsense() -> None:
    assert gpus.close("") == () and gpus.close("zzzzzz") == () and gpus.close("NVIDIA") == ()


def test_the_gpu_of_this_machine(tmp_path: Path) -> None:
    """As the driver writes it; no CUDA is asked."""
    assert gpus.here(tmp_path / "none") is None
    for at, model in (("0000:1a:00.0", "NVIDIA H200"), ("0000:3b:00.0", "Tesla T4")):
        (tmp_path / at).mkdir()
        (tmp_path / at / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 64\nGPU UUID: \t GPU-0\n")
    assert gpus.here(tmp_path) is gpus.GPUS["h200"]
    (tmp_path / "0000:1a:00.0" / "information").write_text("Model: \t\t Riva 128\n")
    assert gpus.here(tmp_path) is None


def test_few_bits_wait_where_kernels_are_not_made_for_them() -> None:
    assert gpus.decode_layer_s(gpus.GPUS["h200"], True) > 2 * gpus.decode_layer_s(gpus.GPUS["h200"], False)
    assert gpus.decode_layer_s(gpus.GPUS["a100-80gb"], True) == gpus.decode_layer_s(gpus.GPUS["a100-80gb"], False)


INT8, FP8 = Scheme(8, -1, True, "int", "int8"), Scheme(8, -1, True, "fp8", "fp8")


def test_every_format_has_its_row() -> None:
    assert gpus.SUPPORT.keys() == {"fp16", *modules("formats")}


@pytest.mark.parametrize(
    ("gpu", "format", "kinds", "says"),
    [
        ("v100", "fp16", [], None),
        ("v100", "awq", [Scheme(4, 128)], None),
        ("t4", "awq", [Scheme(4, 128)], None),
        ("t4", "awq", [Scheme(4, 64)], None),  # by the PyTorch engine
        ("t4", "awq", [Scheme(4, -1)], "TurboMind loads format awq with groups of 128 only, group_size is -1; LMDeploy's PyTorch engine"),
        ("a100-40gb", "smooth_quant", [INT8], None),
        ("a100-40gb", "smooth_quant", [FP8], "PyTorch engine loads format smooth_quant from sm89, a100-40gb is sm80"),
        ("l4", "smooth_quant", [FP8], None),
        ("l4", "compressed_tensors", [FP8], "TurboMind loads format compressed_tensors with 4 bits only, bits is 8"),
        ("h100", "gptq", [Scheme(4, 128, True), Scheme(8, 128, True)], "one scheme for all linears, asked are 4-bit g128 symmetric, 8-bit"),
        ("h100", "gptq", [Scheme(4, 128)], "TurboMind loads format gptq with zeros in mid-range only, symmetric is false"),
        ("h100", "gptq", [Scheme(4, 128, True)], None),
        ("l4", "gguf", [Scheme(4, 128)], "not known to run format gguf; known: fp16, awq"),
    ],
)
def test_refusals_name_both_values(gpu: str, format: str, kinds: list[Scheme], says: str | None) -> None:
    found = gpus.refusal(gpus.GPUS[gpu], format, kinds)
    assert found is None if says is None else found is not None and says in found


@pytest.mark.parametrize(
    ("gpu", "format", "policy", "head_dim", "scheme", "says"),
    [
        ("t4", "awq", "int4", 64, Scheme(4, 128), None),
        ("h200", "awq", "int4", 64, Scheme(4, 128), "KV policy int4 for heads of 128, 256, head_dim is 64"),
        (None, "awq", "none", 80, Scheme(4, 128), None),
        ("h100", "awq", "none", 128, Scheme(4, 64), "groups of 128 only, group_size is 64"),
        (None, "awq", "none", 128, Scheme(4, -1), "group_size is -1"),
        ("h100", "compressed_tensors", "none", 128, Scheme(4, 32), None),
        ("h100", "compressed_tensors", "none", 128, Scheme(8, 32), "with 4 bits only, bits is 8"),
        ("h100", "gptq", "none", 128, Scheme(4, 128), "symmetric is false"),
        ("l4", "smooth_quant", "none", 128, FP8, "TurboMind does not load format smooth_quant"),
        ("a100-40gb", "awq", "int8", 192, Scheme(4, 128), None),
        ("a100-40gb", "awq", "int4", 192, Scheme(4, 128), "KV policy int4 for heads of 128, 256, head_dim is 192"),
        ("t4", "awq", "none", 192, Scheme(4, 128), "t4 (sm75)"),
        ("b200", "awq", "int8", 96, Scheme(4, 128), "head_dim is 96"),
    ],
)
def test_what_turbomind_lacks(gpu: str | None, format: str, policy: gpus.KvPolicy, head_dim: int, scheme: Scheme, says: str | None) -> None:
    found = list(gpus.turbomind_lacks(format, [scheme], policy, head_dim, gpus.GPUS[gpu] if gpu else None))
    assert not found if says is None else len(found) == 1 and says in found[0]


def test_what_the_pytorch_engine_lacks() -> None:
    assert not list(gpus.engine_lacks("pytorch", "awq", [Scheme(4, 32)]))
    assert list(gpus.engine_lacks("pytorch", "gptq", [Scheme(4, 128, True)])) == ["LMDeploy's PyTorch engine does not load format gptq"]
    assert not list(gpus.engine_lacks("pytorch", "smooth_quant", [FP8], gpus.GPUS["h200"]))


def test_planning_loads_no_torch() -> None:
    code = "import sys, buildsys.gpus, buildsys.effort, buildsys.remedies; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
