"""AWQ + GPTQ on a CPU against LMDeploy's `lite auto_awq` without its search: seconds, and KL of both artifacts. W4A16, groups of 128.

    python benchmarks/lite_cpu.py MODEL CALIBRATION_TEXT VERIFY_TEXT --lite-python LITE/bin/python [--rounds 3 --cores 2]

Both get the same model, the same calibration windows and the same cores, in turn, on the model and on a copy of it with outlier channels
(quality.py says which). Ours is a fresh `doit build` each time: seconds of calibrate, quantize, pack and assemble, which hash and commit
what they made. Lite's seconds are those of its `auto_awq` call, its imports left out. The fastest round of each counts. Both artifacts are
unpacked and scored by the same code, on text that neither saw. Ends with exit status 1 where a limit is missed.

LMDeploy runs in an environment of its own, which --lite-python names. It needs no GPU and no CUDA package for this:

    python3.11 -m venv LITE
    LITE/bin/pip install 'torch>=2.6,<2.14' 'transformers>=5,<6' accelerate safetensors datasets mmengine-lite pillow requests \\
        pybase64 pyzmq shortuuid openai partial-json-parser sentencepiece einops fire tiktoken peft prometheus_client uvicorn \\
        fastapi aiohttp
    LITE/bin/pip install --no-deps lmdeploy==0.18.0

It computes in float16, which it asks for itself when a bfloat16 model is quantized on a CPU; --lite-dtype bfloat16 lifts that refusal.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from quality import with_outliers
from speed import KINDS, LINE
from torch import Tensor

from buildsys.formats import awq
from buildsys.io.checkpoint import Checkpoint, load
from buildsys.plan import plan
from buildsys.quant.linear import QuantizedLinear
from buildsys.quant.model import Model
from buildsys.quant.score import score
from buildsys.scheme import Scheme, Schemes
from buildsys.step import Resources
from buildsys.store import Store
from buildsys.survey import describe, read_config
from buildsys.workspace import Workspace

SCHEME = Scheme(4, 128)
TIME_LIMIT, KL_LIMIT = 0.70, 0.40  # of lite's
RECIPE = "ours"

LITE = """\
import sys, time, torch
import lmdeploy.lite.apis.calibrate as calibrate
from lmdeploy.lite.apis.auto_awq import auto_awq
torch.cuda.is_bf16_supported = lambda *_, **__: True  # it asks CUDA, also where device is cpu
model, folder, tokens, dtype = sys.argv[1:]
tokens = torch.load(tokens)
calibrate.get_calib_loaders = lambda *_, **__: [row[None] for row in tokens]
began = time.perf_counter()
auto_awq(model, work_dir=folder, calib_samples=len(tokens), calib_seqlen=tokens.shape[1], w_group_size=128, search_scale=False,
         batch_size=1, device="cpu", dtype=dtype)
print("TOOK", time.perf_counter() - began)
"""


@dataclass(frozen=True)
class Texts:
    """Token windows [windows, tokens] of calibration and of verify."""

    calibration: Tensor
    verify: Tensor


def main() -> int:
    said = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: said.cores])  # and of what is started from here
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        outliers = Path(folder) / "model-with-outliers"
        with_outliers(said.model, outliers)
        for name, model in (("plain", said.model), ("outliers", outliers)):
            missed += compare(name, model, Path(folder) / name, said)
    return int(missed > 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=_resolved, help="folder of a small Llama: config, tokenizer, safetensors")
    parser.add_argument("calibration", type=_resolved, help="text file that both calibrate on")
    parser.add_argument("verify", type=_resolved, help="text file that both are scored on")
    parser.add_argument("--lite-python", required=True, help="the interpreter of an environment with lmdeploy 0.18 (see above)")
    parser.add_argument("--lite-dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens a window")
    parser.add_argument("--verify-samples", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed")
    parser.add_argument("--cores", type=int, default=2, help="how many cores both may use")
    return parser.parse_args()


def _resolved(text: str) -> Path:
    return Path(text).resolve()


def compare(name: str, model: Path, folder: Path, said: argparse.Namespace) -> int:
    """Times and scores both on one model; how many limits were missed."""
    ours, lites = [], []
    for at in range(said.rounds):
        root = folder / str(at)
        seconds = build(root, model, said)
        texts = windows(root)
        ours.append(seconds)
        lites.append(lite(root, model, texts.calibration, said))
        print(f"{name:9} round {at + 1}: ours {seconds:.1f} s, lite {lites[-1]:.1f} s", flush=True)
    found = kl(model, root / "artifacts" / RECIPE, texts.verify, said.cores), kl(model, root / "lite", texts.verify, said.cores)
    missed = 0
    for what, one, other, limit in (("seconds", min(ours), min(lites), TIME_LIMIT), ("nats of KL", *found, KL_LIMIT)):
        missed += one > limit * other
        verdict = "MISSED" if one > limit * other else "kept"
        print(f"{name:9} {what}: ours {one:.4g}, lite {other:.4g}: {one / other:.3f} of lite's (limit {limit:.2f}, {verdict})", flush=True)
    return missed


def build(root: Path, model: Path, said: argparse.Namespace) -> float:
    """A build in a workspace and a store of its own; seconds of the steps that make the artifact."""
    (root / "recipes").mkdir(parents=True)
    (root / "dodo.py").write_text("from buildsys.tasks import *\n")
    (root / "recipes" / f"{RECIPE}.yaml").write_text(yaml.safe_dump(recipe(model, said), sort_keys=False))
    command = [sys.executable, "-m", "doit", "build", f"recipe={RECIPE}", "device=cpu", f"threads={said.cores}"]
    ran = subprocess.run(command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if ran.returncode:
        raise SystemExit(ran.stdout)
    took = {kind: 60 * int(minutes or 0) + float(s) for state, kind, minutes, s in LINE.findall(ran.stdout) if state == "built"}
    return sum(took.get(kind, 0.0) for kind in KINDS)


def recipe(model: Path, said: argparse.Namespace) -> dict[str, object]:
    def text(path: Path) -> dict[str, object]:
        return {"text_files": {"paths": [str(path)], "outside": True}}

    return {
        "schema": 1,
        "source": {"local": {"path": str(model), "outside": True}},
        "calibration": {"dataset": text(said.calibration), "samples": said.samples, "seqlen": said.seqlen},
        "quantization": {"bits": SCHEME.bits, "group_size": SCHEME.group_size, "method": ["awq", "gptq"]},
        "format": "awq",
        "verify": {"text": text(said.verify), "samples": said.verify_samples, "seqlen": said.seqlen},
    }


def windows(root: Path) -> Texts:
    """What a build calibrated on, and what it was scored on."""
    store = Store(root / "artifacts")
    planned = plan(Workspace(root).load(RECIPE), store)
    found, tokens = store.walk(planned.steps), {}
    for step in planned.steps:
        artifact = found[step.planned_key].artifact
        if step.kind == "tokens" and artifact is not None:
            tokens[step.title.split()[0]] = load(store.path(artifact, "tokens.safetensors"))["tokens"].long()
    return Texts(tokens["calibration"], tokens["verify"])


def lite(root: Path, model: Path, tokens: Tensor, said: argparse.Namespace) -> float:
    """Leaves lite's artifact in root/lite; seconds."""
    torch.save(tokens.clone(), root / "tokens.pt")
    command = [said.lite_python, "-c", LITE, str(model), "lite", "tokens.pt", said.lite_dtype]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": str(said.cores)}
    ran = subprocess.run(command, cwd=root, text=True, capture_output=True, env={**alone, "HF_HUB_OFFLINE": "1"})
    took = re.search(r"TOOK ([\d.]+)", ran.stdout)
    if took is None:
        raise SystemExit(f"lite failed:\n{(ran.stderr or ran.stdout)[-2000:]}")
    return float(took[1])


def kl(model: Path, artifact: Path, tokens: Tensor, threads: int) -> float:
    """Nats a token between the model and a folder in AWQ's layout."""
    files = {path.name: path for path in model.iterdir()}
    architecture, _ = describe(read_config(files["config.json"], "config.json"), "config.json")
    packed = Checkpoint({path.name: path for path in artifact.iterdir() if path.suffix in (".safetensors", ".json")})

    def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:  # lite stores scales as what it computed in
        return awq.unpack({part: tensor.half() if tensor.is_floating_point() else tensor for part, tensor in tensors.items()}, scheme)

    quantized = Model(architecture, packed, unpack=unpack, schemes=Schemes(SCHEME))
    torch.set_num_threads(1)  # windows are what is spread over threads
    scores = score(Model(architecture, Checkpoint(files)), quantized, tokens, Resources(threads, threads), lambda *_: None).tokens
    return float(scores["kl"].double().mean())


if __name__ == "__main__":
    sys.exit(main())
