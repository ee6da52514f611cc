"""Bad input, as a user meets it: exit status 1; where, what and the fix; no traceback; and nothing built."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import runs

RECIPE = Path("recipes/tiny.yaml")
MODEL = Path("recipes/model")
Break = Callable[[Path], object]


def recipe(old: str, new: str) -> Break:
    return lambda workspace: runs.edit(workspace / RECIPE, old, new)


def config(**changed: object) -> Break:
    def apply(workspace: Path) -> None:
        path = workspace / MODEL / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return apply


def pickle_only(workspace: Path) -> None:
    (workspace / MODEL / "model.safetensors").unlink()
    (workspace / MODEL / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def truncated(workspace: Path) -> None:
    weights = workspace / MODEL / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 4096)


def lying_header(workspace: Path) -> None:
    """The header claims another shape for a tensor than its bytes hold."""
    weights = workspace / MODEL / "model.safetensors"
    raw = weights.read_bytes()
    assert raw.count(b'"shape":[320,128]') == 2
    weights.write_bytes(raw.replace(b'"shape":[320,128]', b'"shape":[321,128]', 1))


def not_a_number(workspace: Path) -> None:
    weights = workspace / MODEL / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    start = 8 + int.from_bytes(raw[:8], "little") + header["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
    raw[start : start + 4] = b"\x00\x00\xc0\x7f"
    weights.write_bytes(bytes(raw))


def overlapping(workspace: Path) -> None:
    """The same text under another name. It has less than 80 windows, so 40 and 40 of them have some in common."""
    shutil.copy(workspace / "recipes" / "calibration.txt", workspace / "recipes" / "verify.txt")
    path = workspace / RECIPE
    path.write_text(path.read_text().replace("samples: 4", "samples: 40"))


def too_little(workspace: Path) -> None:
    (workspace / "recipes" / "calibration.txt").write_text("the river of stone\n")


def two_of_one_name(workspace: Path) -> None:
    (workspace / "recipes" / "more").mkdir()
    shutil.copy(workspace / RECIPE, workspace / "recipes" / "more" / "tiny.yaml")


def remote_code(workspace: Path) -> None:
    config(
        architectures=["BaichuanForCausalLM"],
        model_type="baichuan",
        auto_map={"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
    )(workspace)
    (workspace / MODEL / "modeling_baichuan.py").write_text("import os\nos.system('touch EVIL')\n")


W8A8 = "{bits: 8, group_size: -1, symmetric: true, activations: int8"
CASES: dict[str, tuple[Break, list[str], str, str, str]] = {
    # what it is: (how it is broken, the command line, where, what, fix)
    "unknown key": (recipe("  seed: 0", "  sed: 0"), ["build", "recipe=tiny"], "recipes/tiny.yaml:7", "sed", "seed"),
    "3 bits in awq": (
        recipe("bits: 4", "bits: 3"),
        ["build", "recipe=tiny"],
        "recipes/tiny.yaml:9",
        "holds 4-bit codes, quantization.bits is 3",
        "bits: 4",
    ),
    "order of methods": (
        recipe("[awq, gptq]", "[gptq, awq]"),
        ["build", "recipe=tiny"],
        "recipes/tiny.yaml:8",
        "[gptq, awq] rounds first",
        "write [awq, gptq]",
    ),
    "group size": (
        lambda workspace: (recipe("group_size: 32", "group_size: 128")(workspace), narrow_model(workspace)),
        ["build", "recipe=tiny"],
        "recipes/tiny.yaml:8",
        "group_size 128 does not divide the 96 input channels of model.layers.0.mlp.down_proj",
        "set group_size: 32",
    ),
    "W8A8 in awq": (
        recipe("{bits: 4, group_size: 32, method: [awq, gptq]}", f"{W8A8}, method: [smoothquant, rtn]}}"),
        ["build", "recipe=tiny"],
        "recipes/tiny.yaml:9",
        "format: awq is for float activations, quantization.activations is int8",
        "format: compressed_tensors or smooth_quant",
    ),
    "W8A8 by groups": (
        recipe("{bits: 4, group_size: 32, method: [awq, gptq]}", f"{W8A8.replace('-1', '32')}, method: [smoothquant, rtn]}}"),
        ["build", "recipe=tiny"],
        "recipes/tiny.yaml:8",
        "quantization.activations: int8 goes with group_size: -1, group_size is 32",
        "set group_size: -1",
    ),
    "key of an override": (
        recipe("method: [awq, gptq]", "method: [awq, gptq], overrides: {down_proj: {bit: 8}}"),
        ["build", "recipe=tiny"],
        "recipes/tiny.yaml:8",
        "quantization.overrides.down_proj.bit is an unknown key",
        "did you mean bits?",
    ),
    "name in an override": (
        lambda workspace: (
            recipe("method: [awq, gptq]", "method: [awq, gptq], overrides: {dwn_proj: {bits: 8}}")(workspace),
            recipe("format: awq", "format: compressed_tensors")(workspace),
        ),
        ["build", "recipe=tiny"],
        "recipes/tiny.yaml:8",
        "quantization.overrides: dwn_proj matches no linear of this model",
        "model.layers.1.mlp.down_proj or down_proj",
    ),
    "two schemes in awq": (
        recipe("method: [awq, gptq]", "method: [awq, gptq], overrides: {down_proj: {group_size: 64}}"),
        ["build", "recipe=tiny"],
        "recipes/tiny.yaml:9",
        "format: awq holds one scheme for all linears, asked are 4-bit g32 asymmetric, 4-bit g64 asymmetric",
        "set format: compressed_tensors or gptq",
    ),
    "budget": (
        lambda workspace: (
            recipe("method: [awq, gptq]", "method: [awq, gptq], mixed: {budget_bits: 3.5}")(workspace),
            recipe("format: awq", "format: gptq")(workspace),
        ),
        ["build", "recipe=tiny"],
        "recipes/tiny.yaml:8",
        "the smallest choice takes 3.5938 bits a weight with its scales and zeros, budget_bits is 3.5",
        "set budget_bits: 3.6",
    ),
    "as llama": (
        lambda workspace: (recipe("format: awq", "format: {awq: {as: llama}}")(workspace), other_family(workspace)),
        ["build", "recipe=tiny"],
        "recipes/tiny.yaml:9",
        "the model has norms of queries and keys, which a Llama has not",
        "leave `as` out",
    ),
    "pickle only": (pickle_only, ["build", "recipe=tiny"], "recipes/model", "pickle", "safe_serialization=True"),
    "remote code": (remote_code, ["build", "recipe=tiny"], "config.json", "the model's own code (auto_map)", "buildsys/archs"),
    "unsupported architecture": (
        config(architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        ["build", "recipe=tiny"],
        "config.json",
        "architecture GPT2LMHeadModel is not implemented; implemented: InternLM2ForCausalLM, InternLM3ForCausalLM, LlamaForCausalLM",
        "buildsys/archs",
    ),
    "truncated": (truncated, ["build", "recipe=tiny"], "model.safetensors", "truncated", "again"),
    "header lies": (lying_header, ["build", "recipe=tiny"], "model.safetensors", "bytes", "again"),
    "path outside": (
        recipe("{path: model}", "{path: ../../elsewhere/model}"),
        ["build", "recipe=tiny"],
        "recipes/tiny.yaml:2",
        "outside the workspace",
        "outside: true",
    ),
    "two of one name": (
        two_of_one_name,
        ["build", "recipe=tiny"],
        "recipes/more/tiny.yaml",
        "the name tiny is taken by recipes/tiny.yaml",
        "rename",
    ),
    "close name": (lambda _: None, ["build", "recipe=tinny"], "recipe=tinny", "is no recipe", "did you mean tiny?"),
    "no recipe": (lambda _: None, ["build"], "doit build", "which recipe?", "write doit build recipe=tiny"),
    "empty argument": (lambda _: None, ["build", ""], "doit", 'empty argument ("")', "recipe=NAME"),
    "unknown variable": (lambda _: None, ["build", "recpe=tiny"], "recpe=", "no variable", "did you mean recipe=?"),
    # These have to run something before they can know.
    "not a number": (not_a_number, ["build", "recipe=tiny"], "model.safetensors", "model.layers.1.mlp.up_proj.weight", "publisher"),
    "overlapping text": (overlapping, ["build", "recipe=tiny"], "recipes/tiny.yaml:12", "repeats calibration text", "name other text"),
    "too little text": (too_little, ["build", "recipe=tiny"], "recipes/tiny.yaml:5", "0 windows of 32; 4 are needed", "add text"),
}
RUNS_SOMETHING = {"not a number", "overlapping text", "too little text"}


def narrow_model(workspace: Path) -> None:
    import models

    models.tiny_llama(workspace / MODEL, intermediate_size=96)


def other_family(workspace: Path) -> None:
    import models

    models.tiny_qwen3(workspace / MODEL)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.tiny(tmp_path_factory.mktemp("good") / "workspace")


@pytest.fixture(scope="module")
def ended(
    workspace: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[tuple[Path, runs.Ran]]]]:
    """Every case that is asked for in a workspace of its own, two at a time."""
    asked = [item.callspec.params["case"] for item in request.session.items if item.name.startswith("test_bad_input[")]

    def run(case: str) -> tuple[Path, runs.Ran]:
        broken = runs.copy(workspace, tmp_path_factory.mktemp(case.replace(" ", "_")) / "workspace")
        CASES[case][0](broken)
        return broken, runs.doit(broken, *CASES[case][1])

    with ThreadPoolExecutor(2) as pool:
        yield {case: pool.submit(run, case) for case in asked}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(ended: dict[str, Future[tuple[Path, runs.Ran]]], case: str) -> None:
    broken, ran = ended[case].result()
    _, _, where, what, fix = CASES[case]
    assert ran.status == 1, ran
    said = ran.out + ran.err
    assert "Traceback" not in said and "internal error" not in said
    first, _, rest = ran.err.partition("    fix: ")
    assert where in first and what in first, ran.err
    assert fix in rest, ran.err
    assert not nothing_linked(broken)
    kinds = {one["meta"]["built"]["kind"] for one in runs.manifests(broken).values()}
    assert kinds <= ({"fetch", "tokens", "disjoint"} if case in RUNS_SOMETHING else set())
    assert not list(broken.rglob("EVIL"))


def nothing_linked(workspace: Path) -> list[Path]:
    """What users would find in artifacts/."""
    folder = workspace / "artifacts"
    return [path for path in folder.iterdir() if path.name != ".store"] if folder.is_dir() else []


def test_every_mistake_of_a_recipe_is_told_at_once(workspace: Path, tmp_path: Path) -> None:
    broken = runs.copy(workspace, tmp_path / "workspace")
    runs.edit(broken / RECIPE, "samples: 4\n  seqlen: 32\n  seed", "samples: 0\n  seqlen: 32\n  sed")
    runs.edit(broken / RECIPE, "format: awq", "format: awk")
    ran = runs.doit(broken, "check")
    assert ran.status == 1 and "Traceback" not in ran.out + ran.err
    for line in (5, 7, 9):
        assert f"recipes/tiny.yaml:{line}  " in ran.err
    assert ran.err.count("    fix: ") == 3 and not (broken / "artifacts").exists()


# A full disk


def test_file_that_may_grow_no_further(tiny: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE: as on a full disk, a write ends short with an errno of its own."""
    full = runs.copy(tiny, tmp_path / "workspace", built=False)
    limit = 128 * 1024  # the statistics of one block are larger
    ran = runs.doit(full, "build", "recipe=tiny", before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    check_full(full, ran)
    assert runs.doit(full, "build", "recipe=tiny").fine() and runs.digest(full, "tiny") == runs.digest(tiny, "tiny")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("may not mount a small disk here; test_file_that_may_grow_no_further stands in")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk(tiny: Path, tmp_path: Path, small_disk: Path) -> None:
    full = runs.copy(tiny, tmp_path / "workspace", built=False)
    (full / "artifacts").symlink_to(small_disk)
    check_full(full, runs.doit(full, "build", "recipe=tiny"))
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    again = runs.doit(full, "build", "recipe=tiny").fine()
    assert again.rows("cached") and runs.digest(full, "tiny") == runs.digest(tiny, "tiny"), "it goes on from what was finished"


def check_full(workspace: Path, ran: runs.Ran) -> None:
    assert ran.status == 1
    said = ran.out + ran.err
    assert "Traceback" not in said and "internal error" not in said
    assert "cannot be written: " in ran.err and "MiB free" in ran.err and "    fix: make room on that disk" in ran.err
    assert not nothing_linked(workspace)
    assert "assemble" not in {one["meta"]["built"]["kind"] for one in runs.manifests(workspace).values()}
