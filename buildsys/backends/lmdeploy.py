"""LMDeploy's own quantizer, `lmdeploy lite`, on the recipe's calibration windows: AWQ for W4A16, SmoothQuant for W8A8 (int8, fp8).

Lin et al. 2023 (arXiv:2306.00978) and Xiao et al. 2022 (arXiv:2211.10438), as LMDeploy 0.18 does them (lmdeploy/lite). The tool is the
step, so its version is in the step's key. It runs in a process of its own, holds the whole model, and cannot go on where it was killed.
What of 0.18 was tried before it was believed: docs/decisions/0018-lmdeploy-as-a-backend.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import Field, StrictBool

from buildsys.backends import Asked, Misfit, Progress, Work
from buildsys.errors import BuildError
from buildsys.lite import process
from buildsys.slots import Frozen

if TYPE_CHECKING:
    from pathlib import Path

    from buildsys.architecture import Architecture
    from buildsys.scheme import Scheme

VERSION = 1
RELEASE: Final = "0.18.0"
TOOL = f"lmdeploy {RELEASE}"
READS = ("tokens",)
RESUMES = False

METHODS = {"awq": "auto_awq", "smoothquant": "smooth_quant"}
"""The first of a recipe's two methods -> what lite calls it. It rounds to nearest after either."""

MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""That lite quantizes without a model's own code, each tried with transformers 5. Of its other tables InternLM2 and 3 need their code,
and of Mixtral and Qwen3-MoE it asks for modules that transformers 5 has no more."""

NATIVE = "leave backend out: buildsys's own does it"


class Knobs(Frozen):
    version: Literal["0.18.0"] = Field(RELEASE, description="the release of LMDeploy; another one makes other codes")
    search_scale: StrictBool = Field(False, description="try 20 ratios for each scale with forward passes, instead of 0.5 for all: slow")
    batch_size: int = Field(1, ge=1, le=1024, description="windows of calibration that go through a layer at once; a mean is taken of each")


def misfits(asked: Asked) -> Iterator[Misfit]:
    """lite has two recipes of its own, and nothing is left to choose in them."""
    names, scheme = [name for name, _ in asked.methods], asked.scheme
    wanted = ["awq", "rtn"] if scheme.activations == "none" else ["smoothquant", "rtn"]
    if names != wanted:
        what = f"quantization.method is [{', '.join(names)}]; for {scheme} backend lmdeploy does [{', '.join(wanted)}]"
        yield "method", what, f"write method: [{', '.join(wanted)}], or {NATIVE}"
    for name, knobs in asked.methods:
        if name in METHODS and knobs:
            what = f"quantization.method: {name} has {', '.join(knobs)} set, which backend lmdeploy does not know"
            yield "method", what, f"leave {', '.join(knobs)} out, or {NATIVE}"
    for key, there in (("overrides", asked.overrides), ("mixed", asked.mixed)):
        if there:
            yield key, f"quantization.{key} is for single linears, and backend lmdeploy does one scheme for all", f"remove it, or {NATIVE}"
    yield from _scheme_misfits(scheme, asked.format)


def _scheme_misfits(scheme: Scheme, format: str) -> Iterator[Misfit]:
    if scheme.activations != "none":
        if format != "smooth_quant":
            what = f"format {format} has no room for the float32 scales of backend lmdeploy's W8A8"
            yield "format", what, f"set format: smooth_quant, or {NATIVE}"
        return
    if scheme.bits != 4:
        yield "bits", f"quantization.bits is {scheme.bits}; backend lmdeploy packs 4-bit weights", f"set bits: 4, or {NATIVE}"
    if scheme.group_size == -1:
        what = "quantization.group_size is -1; backend lmdeploy needs groups for 4-bit weights"
        yield "group_size", what, f"set group_size: 128, or {NATIVE}"
    if scheme.symmetric:
        what = "quantization.symmetric is true; LMDeploy 0.18 finds zeros all the same, and then fails to pack them"
        yield "symmetric", what, f"set symmetric: false, or {NATIVE}"


def unfit(config: Mapping[str, Any], architecture: Architecture, left_float: Collection[str]) -> Iterator[Misfit]:
    """Models that lite does not know, or does wrongly, and linears that it would not leave float."""
    name = str(config["architectures"][0])
    if name not in MODELS:
        yield "backend", f"backend lmdeploy does not quantize {name}: it does {', '.join(MODELS)}", NATIVE
    elif architecture.linear("qkv") is not None and architecture.heads != architecture.kv_heads:
        what = f"backend lmdeploy scales rows of keys as if they were values where {name} has fewer of them than queries"
        yield "backend", f"{what} ({architecture.kv_heads} of {architecture.heads} heads)", NATIVE
    if left_float:
        what = f"quantization.skip leaves {min(left_float)} float, and backend lmdeploy quantizes every linear of a block"
        yield "skip", what, f"set skip: [lm_head], or {NATIVE}"


def ready(where: str) -> None:
    """Raises BuildError where the interpreter has no LMDeploy, or another release."""
    found = process.installed(where)
    if found != RELEASE:
        has = f"LMDeploy {found}" if found else "no LMDeploy"
        what = f"{process.interpreter()} has {has}; this backend is {TOOL}"
        fix = f"run `{process.interpreter()} -m pip install lmdeploy=={RELEASE}`"
        raise BuildError(where, what, f"{fix}, or name an interpreter that has it in {process.VARIABLE}")


def quantize(knobs: Knobs, work: Work, progress: Progress) -> dict[str, Any]:
    """lite's codes, in our blocks. The manifest gets what computed them and its peak memory (`tool`)."""
    import shutil

    from buildsys.lite.saved import Saved, write_blocks

    request, a = work.request, work.model.architecture
    where, folder = str(request.hints.get("where", "quantization.backend")), request.stage / "lite"
    does = METHODS[str(request.knobs["methods"][0])]
    job = {
        "does": does,
        "version": knobs.version,
        "model": str(_model(request.read("source").files, folder / "model")),
        "folder": str(folder / "saved"),
        "tokens": str(_tokens(request.read("tokens").path("tokens.safetensors"), folder / "tokens.npy")),
        "device": request.resources.device,
        "threads": request.resources.threads,
        "arguments": _arguments(does, knobs, work.job.schemes.default),
    }
    found = process.run(job, {"layers": a.layers, "linears": a.layers * len(a.linears)}, where, request.log, progress)
    saved = Saved(_checkpoint(folder / "saved"), a, work.job.schemes, work.formats[_layout(does)].unpack, where)
    saved.check_outside(request.read("source").files)
    write_blocks(saved, request.stage)
    shutil.rmtree(folder)
    return {"tool": found}


def _layout(does: str) -> str:
    """The format of ours that lies on disk as what lite saves."""
    return "awq" if does == "auto_awq" else "smooth_quant"


def _arguments(does: str, knobs: Knobs, scheme: Scheme) -> dict[str, Any]:
    chosen = {"search_scale": knobs.search_scale, "batch_size": knobs.batch_size, "w_bits": scheme.bits}
    if does == "auto_awq":
        return {**chosen, "w_sym": scheme.symmetric, "w_group_size": scheme.group_size}
    return {**chosen, "quant_dtype": "int8" if scheme.number == "int" else "float8_e4m3fn"}


def _model(files: Mapping[str, Path], folder: Path) -> Path:
    """The source as a folder that transformers opens: links, and nothing but weights and config.json."""
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path)
    return folder


def _tokens(path: Path, to: Path) -> Path:
    """The windows in numpy's own form, which another interpreter reads whatever it has installed."""
    import numpy as np

    from buildsys.io import checkpoint

    np.save(to, checkpoint.load(path)["tokens"].numpy())
    return to


def _checkpoint(folder: Path) -> Any:
    from buildsys.io.checkpoint import Checkpoint

    return Checkpoint({path.name: path for path in folder.iterdir() if path.name.endswith((".safetensors", ".safetensors.index.json"))})
