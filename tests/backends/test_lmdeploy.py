"""LMDeploy's `lite` as a backend: what it may be asked is known before it runs, and what it saves is in the artifact to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import lmdeploys
import models
import numpy as np
import psutil
import pytest
import runs
import torch
from safetensors.torch import load_file

from buildsys.backends import lmdeploy, native
from buildsys.errors import BuildError, BuildErrors
from buildsys.io import checkpoint
from buildsys.lite import process
from buildsys.plan import Plan, plan
from buildsys.quant.pack import AWQ_ORDER
from buildsys.scheme import Scheme
from buildsys.store import Store
from buildsys.workspace import Workspace

pytestmark = pytest.mark.slow

# What it may be asked


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return runs.tiny(tmp_path / "workspace")


def planned(workspace: Path, quantization: str, **edits: str) -> Plan:
    """The recipe `tiny` by LMDeploy, with other lines."""
    text = runs.TINY.replace("quantization: {bits: 4, group_size: 32, method: [awq, gptq]}", f"quantization: {{{quantization}}}")
    for old, new in edits.items():
        text = text.replace(f"{old}:", f"{old}: {new} #", 1)
    (workspace / "recipes" / "tiny.yaml").write_text(text)
    return plan(Workspace(workspace).load("tiny"), Store(workspace / "artifacts"))


LITE = "bits: 4, group_size: 32, method: [awq, rtn], backend: lmdeploy"
LITE8 = "bits: 8, group_size: -1, symmetric: true, activations: int8, method: [smoothquant, rtn], backend: lmdeploy"


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (LITE.replace("rtn", "gptq"), r"method is \[awq, gptq\]; for 4-bit g32 asymmetric backend lmdeploy does \[awq, rtn\]"),
        (LITE.replace("awq, ", ""), r"method is \[rtn\]"),
        (LITE.replace("awq,", "{awq: {ratios: 10}},"), "awq has ratios set, which backend lmdeploy does not know"),
        (LITE + ", overrides: {o_proj: {skip: false}}", "overrides is for single linears"),
        (LITE + ", mixed: {budget_bits: 4.5, bits: [3, 4, 8]}", "mixed is for single linears"),
        (LITE.replace("32", "-1"), "group_size is -1; backend lmdeploy needs groups"),
        (LITE + ", symmetric: true", "symmetric is true; LMDeploy 0.18 finds zeros all the same"),
        (LITE + ", skip: [lm_head, down_proj]", r"skip leaves model\.layers\.0\.mlp\.down_proj float"),
        (LITE.replace("lmdeploy", "{lmdeploy: {version: 0.17.0}}"), r"version: takes 0\.18\.0, has '?0\.17\.0|0\.18\.0"),
        (LITE.replace("lmdeploy", "lmdeplo"), "did you mean lmdeploy"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_fix(quantization: str, said: str, workspace: Path) -> None:
    with pytest.raises((BuildError, BuildErrors), match=said):
        planned(workspace, quantization)


def test_w8a8_needs_a_format_with_room_for_its_scales(workspace: Path) -> None:
    with pytest.raises((BuildError, BuildErrors), match="format compressed_tensors has no room for the float32 scales"):
        planned(workspace, LITE8, format="compressed_tensors")
    assert planned(workspace, LITE8, format="smooth_quant").quantized.title.endswith("smoothquant + rtn by lmdeploy 0.18.0")


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("internlm2", {}, "does not quantize InternLM2ForCausalLM"),
        ("mixtral", {}, "does not quantize MixtralForCausalLM"),
        ("phi3", {}, r"scales rows of keys as if they were values where Phi3ForCausalLM .* \(2 of 4 heads\)"),
        ("phi3", {"num_attention_heads": 2, "num_key_value_heads": 2}, ""),
        ("qwen3", {}, ""),
    ],
)
def test_models_that_it_does_not_know_or_does_wrongly_are_refused(family: str, config: dict[str, Any], said: str, tmp_path: Path) -> None:
    workspace = runs.empty(tmp_path / "workspace")
    models.FAMILIES[family](workspace / "recipes" / "model", **config)
    for name in ("calibration", "verify"):
        (workspace / "recipes" / f"{name}.txt").write_text(models.prose(100, seed=len(name)))
    if said:
        with pytest.raises((BuildError, BuildErrors), match=said):
            planned(workspace, LITE)
    else:
        assert planned(workspace, LITE).quantized.knobs["backend"]["name"] == "lmdeploy"


def test_the_tool_is_in_the_key_and_our_methods_are_not(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = planned(workspace, LITE).quantized
    assert step.knobs["backend"] == {
        "name": "lmdeploy",
        "version": lmdeploy.VERSION,
        "knobs": {"version": "0.18.0", "search_scale": False, "batch_size": 1},
    }
    assert step.knobs["methods"] == ["awq", "rtn"] and not step.resumes
    other = planned(workspace, LITE.replace("lmdeploy", "{lmdeploy: {batch_size: 4}}")).quantized
    assert other.planned_key != step.planned_key
    monkeypatch.setattr(lmdeploy, "VERSION", lmdeploy.VERSION + 1)
    assert planned(workspace, LITE).quantized.planned_key != step.planned_key


def test_it_reads_tokens_and_no_statistics(workspace: Path) -> None:
    made = planned(workspace, LITE)
    assert {need.role for need in made.quantized.needs} == {"source", "tokens"}
    kinds = [step.kind for step in made.steps]
    assert "calibrate" not in kinds and kinds.index("disjoint") < kinds.index("quantize")


def test_naming_native_changes_no_key(workspace: Path) -> None:
    plain = planned(workspace, "bits: 4, group_size: 32, method: [awq, rtn]")
    named = planned(workspace, "bits: 4, group_size: 32, method: [awq, rtn], backend: native")
    assert [step.planned_key for step in plain.steps] == [step.planned_key for step in named.steps]
    assert "backend" not in plain.quantized.knobs and native.TOOL == ""


# What it makes


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder in AWQ's or SmoothQuant's layout, float64, as their papers' code reads them."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    found = {}
    for name, tensor in tensors.items():
        whole, _, part = name.rpartition(".")
        if part == "qweight":
            codes, zeros = (lanes(tensors[f"{whole}.{each}"]) for each in ("qweight", "qzeros"))  # [in, out], [in/g, out]
            group = codes.shape[0] // zeros.shape[0]
            scales = tensors[f"{whole}.scales"].double().repeat_interleave(group, 0)
            found[f"{whole}.weight"] = ((codes - zeros.repeat_interleave(group, 0)) * scales).t()
        elif part == "weight" and f"{whole}.scale" in tensors:
            found[name] = tensor.double() * tensors[f"{whole}.scale"].double()
        elif part not in ("qzeros", "scales", "scale"):
            found[name] = tensor.double()
    return found


def lanes(words: torch.Tensor) -> torch.Tensor:  # int32 [rows, n/8] -> float64 [rows, n]
    codes = torch.empty(words.shape[0], words.shape[1], 8, dtype=torch.float64)
    for lane, value in enumerate(AWQ_ORDER):
        codes[..., value] = ((words >> (4 * lane)) & 15).double()
    return codes.flatten(1)


def lite(model: Path, tokens: torch.Tensor, folder: Path, does: str = "auto_awq", **arguments: Any) -> dict[str, Any]:
    """What lite itself saves in folder/saved; a model of two layers of seven linears."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "tokens.npy", tokens.numpy())
    job = {
        "does": does,
        "version": lmdeploy.RELEASE,
        "model": str(model),
        "folder": str(folder / "saved"),
        "tokens": str(folder / "tokens.npy"),
        "device": "cpu",
        "threads": 1,
        "arguments": arguments,
    }
    return process.run(job, {"layers": 2, "linears": 14}, "quantization.backend", None, lambda *_: None)


def calibration(workspace: Path, made: Plan) -> torch.Tensor:
    """The windows that the build calibrated on."""
    store = Store(workspace / "artifacts")
    tokens = next(need.step for need in made.quantized.needs if need.role == "tokens")
    artifact = store.walk(made.steps)[tokens.planned_key].artifact
    assert artifact is not None
    return checkpoint.load(store.path(artifact, "tokens.safetensors"))["tokens"]


@pytest.mark.parametrize(
    ("recipe", "does", "arguments"),
    [
        ("both@lmdeploy", "auto_awq", {"w_bits": 4, "w_sym": False, "w_group_size": 128, "batch_size": 1}),
        ("both@lmdeploy8", "smooth_quant", {"w_bits": 8, "quant_dtype": "int8", "batch_size": 1}),
    ],
)
def test_the_artifact_holds_what_lite_saves(
    recipe: str, does: str, arguments: dict[str, Any], backends: tuple[Path, runs.Ran], tmp_path: Path
) -> None:
    """Run by itself on the same windows, lite saves the very numbers that the artifact dequantizes to."""
    workspace, ran = backends
    ran.fine()
    lite(workspace / "recipes" / "model", calibration(workspace, runs.planned(workspace, recipe)), tmp_path, does, **arguments)
    ours, theirs = dequantized(workspace / "artifacts" / recipe), dequantized(tmp_path / "saved")
    assert ours.keys() == theirs.keys() and len(ours) == 3 + 4 * 9
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


def test_the_manifest_tells_what_computed_it(backends: tuple[Path, runs.Ran]) -> None:
    workspace, _ = backends
    built = {one["meta"]["built"]["title"]: one["meta"]["built"] for one in runs.manifests(workspace).values()}
    ours, theirs = built["4-bit g128 asymmetric, awq + rtn"], built["4-bit g128 asymmetric, awq + rtn by lmdeploy 0.18.0"]
    assert theirs["versions"]["lmdeploy"] == "0.18.0" and theirs["versions"]["transformers"] and "lmdeploy" not in ours["versions"]
    assert theirs["peak_rss_bytes"] > ours["peak_rss_bytes"] + 100e6, "LMDeploy's own process is counted"
    assert all(one["peak_rss_bytes"] > 10e6 for one in built.values())


def test_all_that_comes_after_is_the_same(backends: tuple[Path, runs.Ran]) -> None:
    """The gates hold, codes among them: what is packed is what the blocks hold."""
    _, ran = backends
    ran.fine()
    assert ran.out.count("mismatched_codes 0 codes") == 4 and ran.out.count("mismatched_floats 0 values") == 4
    assert [row for row in ran.rows("built") if row[0] == "calibrate"] == [("calibrate", "activation statistics")], "for native alone"


@pytest.mark.parametrize("what", ["report", "publish"])
def test_pages_and_cards_do_without_statistics(what: str, backends: tuple[Path, runs.Ran], tmp_path: Path) -> None:
    workspace = runs.copy(backends[0], tmp_path / "copy")
    if what == "report":
        runs.doit(workspace, "report", "recipe=both@lmdeploy").fine()
        page = (workspace / "artifacts" / "both@lmdeploy.html").read_text()
        assert "in a process of its own, and keeps nothing of them" in page and "awq + rtn by lmdeploy 0.18.0" in page
    else:
        card = (workspace / "artifacts" / "both@lmdeploy" / "README.md").read_text()
        assert "(AWQ, then RTN, by lmdeploy 0.18.0)" in card and "version: 0.18.0" in card


def test_the_search_keeps_the_float_function_on_a_cpu(tmp_path: Path) -> None:
    """lite keeps weights by `.cpu()` there; without copies they end up scaled, and nothing undoes it (KL 0.0131 nats here)."""
    lmdeploys.needed()
    from buildsys.formats import awq
    from buildsys.io.checkpoint import Checkpoint
    from buildsys.quant.model import Model
    from buildsys.quant.score import score
    from buildsys.scheme import Schemes
    from buildsys.step import Resources

    model = models.tiny_llama(tmp_path / "model")
    lite(model, models.tokens(4, 64), tmp_path, w_bits=4, w_sym=False, w_group_size=32, search_scale=True, batch_size=1)
    source = models.opened(model)
    made = Model(source.architecture, Checkpoint(models.files(tmp_path / "saved")), unpack=awq.unpack, schemes=Schemes(Scheme(4, 32)))
    assert float(score(source, made, models.tokens(4, 64, seed=5), Resources(), lambda *_: None).tokens["kl"].mean()) < 0.0105


# What goes wrong


def environment(folder: Path, release: str | None) -> Path:
    """A Python environment with another release of LMDeploy, as far as its metadata tell, or with none."""
    import venv

    venv.create(folder, symlinks=True)
    if release is not None:
        (told,) = folder.glob("lib/python*/site-packages")
        (told / f"lmdeploy-{release}.dist-info").mkdir()
        (told / f"lmdeploy-{release}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lmdeploy\nVersion: {release}\n")
    return folder / "bin" / "python"


@pytest.mark.parametrize(("release", "said"), [(None, "has no LMDeploy"), ("0.17.0", "has LMDeploy 0.17.0")])
def test_another_release_is_refused_before_anything_is_built(release: str | None, said: str, workspace: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "other", release)
    runs.edit(workspace / "recipes" / "tiny.yaml", "method: [awq, gptq]", "method: [awq, rtn], backend: lmdeploy")
    ran = runs.doit(workspace, "build", "recipe=tiny", BUILDSYS_LMDEPLOY=str(python))
    assert ran.status == 1 and "Traceback" not in ran.out + ran.err and ran.rows("built") == []
    assert f"recipes/tiny.yaml:8  {python} {said}; this backend is lmdeploy 0.18.0" in ran.err
    assert f"fix: run `{python} -m pip install lmdeploy==0.18.0`, or name an interpreter" in ran.err


def test_the_runner_asks_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was another release by the time that the step ran."""
    monkeypatch.setenv("BUILDSYS_LMDEPLOY", str(environment(tmp_path / "other", "0.17.0")))
    with pytest.raises(BuildError, match=r"has LMDeploy 0\.17\.0; this backend is version 0\.18\.0"):
        lite(tmp_path, torch.zeros(1, 16, dtype=torch.int64), tmp_path)


def test_an_interpreter_that_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILDSYS_LMDEPLOY", str(tmp_path / "python"))
    for ask in (lambda: process.installed("here"), lambda: lite(tmp_path, torch.zeros(1, 16, dtype=torch.int64), tmp_path)):
        with pytest.raises(BuildError, match=r"BUILDSYS_LMDEPLOY names .*python, which cannot be run: No such file"):
            ask()


def test_a_failure_ends_in_its_last_words(tmp_path: Path) -> None:
    lmdeploys.needed()
    model = models.tiny_llama(tmp_path / "model")
    with pytest.raises(BuildError, match=r"LMDeploy ended with status 1: .*index out of range"):
        lite(model, torch.full((2, 32), 10**6), tmp_path, w_bits=4, w_sym=False, w_group_size=32)


def runners(workspace: Path) -> list[psutil.Process]:
    """Of builds in this workspace."""
    found = []
    for one in psutil.process_iter(["cmdline"]):
        if str(process.RUNNER) in (one.info["cmdline"] or []):
            try:
                found += [one] if Path(one.cwd()) == workspace else []
            except psutil.Error:
                continue  # it has just ended
    return found


def wait_for(what: Any, wait_s: float = 60.0) -> Any:
    until = time.monotonic() + wait_s
    while not (found := what()):
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("how", ["driver", "runner"])
def test_a_kill_leaves_no_process_and_nothing_half_done(how: str, backends: tuple[Path, runs.Ran], tmp_path: Path) -> None:
    workspace = runs.copy(backends[0], tmp_path / "copy")
    runs.edit(workspace / "recipes" / "both.yaml", "quantization: {backend: lmdeploy}", "quantization: {backend: lmdeploy, group_size: 64}")
    before = runs.manifests(workspace).keys()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    driver = subprocess.Popen(runs.command("build", "recipe=both@lmdeploy"), cwd=workspace, env=runs.environment(), **pipes)
    (runner,) = wait_for(lambda: runners(workspace))
    os.kill(driver.pid if how == "driver" else runner.pid, signal.SIGKILL)
    _, said = driver.communicate(timeout=60)
    wait_for(lambda: not runners(workspace))
    assert runs.manifests(workspace).keys() == before, "no half-built step is in the store"
    if how == "runner":
        assert driver.returncode == 1 and "Traceback" not in said
        assert "recipes/both.yaml:" in said and "LMDeploy's process was killed from outside" in said
