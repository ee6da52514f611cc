"""Seconds and memory of quantizing a model of a given shape on a GPU: safetensors on disk to a packed artifact on disk, hashed.

    python benchmarks/speed.py [--layers 32 --samples 128 --seqlen 2048] [--lite-layers 3 --lite-search-samples 16]

Weights are random (time does not depend on them). Every number comes out of `doit build` in a temporary workspace: steps' seconds include
hashing and committing what they made; fetch, tokens and verify are beside. Memory is sampled every 50 ms: RssAnon of doit and all its
children, and what torch reserved on the GPU. LMDeploy's `lite auto_awq` gets the same shape and the same tokens, where it is installed.
Since it takes hours, it runs on one layer and on --lite-layers, and with its search on one layer with half of --lite-search-samples and
with all: what the difference took, in proportion, is what is compared. Its start and its fixed costs are not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from buildsys.io.checkpoint import Writer
from buildsys.plan import plan
from buildsys.store import Store
from buildsys.survey import describe
from buildsys.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("calibrate", "quantize", "outside", "pack", "assemble")
FIRST = ("awq-rtn", "awq-gptq", "awq-gptaq")
LINE = re.compile(r"(built|cached) +(\w+) .*? (?:(\d+) min )?([\d.]+) s +[\d.]+ \w?B", re.ASCII)


def main() -> None:
    said = arguments()
    with tempfile.TemporaryDirectory(dir=said.folder) as folder:
        root = Path(folder)
        make_model(root / "model", said)
        make_text(root / "recipes")
        (root / "dodo.py").write_text("from buildsys.tasks import *\n")
        (root / "recipes" / "speed.yaml").write_text(yaml.safe_dump(recipe(said), sort_keys=False))
        total: dict[str, float] = {}
        calibrated = 0.0
        for variant in said.variants:
            total[variant], seconds = build(root, f"speed@{variant}")
            calibrated = calibrated or seconds
            if variant in FIRST:  # a first build calibrates, whichever comes first here
                total[variant] += 0.0 if seconds else calibrated
                print(f"{variant}: a first build makes its artifact in {total[variant]:.1f} s")
        for variant, first in (("awq-rtn-g64", "awq-rtn"), ("awq-gptq-g64", "awq-gptq")):
            if variant in total and first in total:
                print(f"{variant}: {total[variant] / total[first]:.2f} of the first build's time")
        if said.lite_layers:
            compare(root, said, total)


def shaped(what: str | None) -> argparse.ArgumentParser:
    """Asks for a model's shape and how much text it is calibrated on; a 7B's where nothing is said."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 32), ("hidden", 4096), ("inner", 14336), ("heads", 32), ("kv-heads", 8), ("vocab", 92544)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", default=None, help="where to work: a disk with room for the model three times")
    return parser


def arguments() -> argparse.Namespace:
    parser = shaped(__doc__)
    parser.add_argument("--lite-layers", type=int, default=0, help="compare with lmdeploy lite on 1 layer and on so many (2 or more)")
    parser.add_argument("--lite-search-samples", type=int, default=16)
    parser.add_argument("--variants", nargs="*", default=["awq-rtn", "awq-rtn-g64", "awq-gptq", "awq-gptq-g64", "kv-int8"])
    return parser.parse_args()


def config(said: argparse.Namespace, layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": said.hidden,
        "intermediate_size": said.inner,
        "num_hidden_layers": layers,
        "num_attention_heads": said.heads,
        "num_key_value_heads": said.kv_heads,
        "vocab_size": said.vocab,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def make_model(folder: Path, said: argparse.Namespace, layers: int | None = None) -> None:
    """Random weights of the shape, bfloat16, with the demo's tokenizer: its ids are in every vocabulary."""
    folder.mkdir()
    told = config(said, layers or said.layers)
    (folder / "config.json").write_text(json.dumps(told))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "recipes" / "demo" / "model" / name, folder)
    architecture, _ = describe(told, "config.json")
    shapes, generator = architecture.tensors(), torch.Generator(said.device).manual_seed(0)
    writer = Writer(folder, {name: ("BF16", shape) for name, shape in shapes.items()}, {}, 4 << 30)
    for name, shape in shapes.items():
        norm = name.endswith("norm.weight")
        tensor = torch.ones(shape) if norm else torch.randn(shape, generator=generator, device=said.device) * 0.02
        writer.add(name, tensor.bfloat16().cpu())
    writer.close()


def make_text(folder: Path) -> None:
    """Words without sense: enough for 128 windows of 2,048 tokens, and others for verify."""
    folder.mkdir()
    for name, seed, words in (("calibration", 1, 400_000), ("verify", 2, 20_000)):
        drawn = random.Random(seed)
        letters = "etaoinshrdlu"
        (folder / f"{name}.txt").write_text(" ".join("".join(drawn.choices(letters, k=drawn.randint(2, 7))) for _ in range(words)))


def recipe(said: argparse.Namespace) -> dict[str, object]:
    def quantized(method: list[str], group: int = 128) -> dict[str, object]:
        return {"quantization": {"method": method, "group_size": group}}

    return {
        "schema": 1,
        "source": {"local": {"path": "../model"}},
        "calibration": {"dataset": {"text_files": {"paths": ["calibration.txt"]}}, "samples": said.samples, "seqlen": said.seqlen},
        "quantization": {"bits": 4, "group_size": 128, "method": ["awq", "rtn"]},
        "format": "awq",
        "verify": {"text": {"text_files": {"paths": ["verify.txt"]}}, "samples": 2, "seqlen": 512},
        "matrix": {
            "awq-rtn": quantized(["awq", "rtn"]),
            "awq-rtn-g64": quantized(["awq", "rtn"], 64),
            "awq-gptq": quantized(["awq", "gptq"]),
            "awq-gptq-g64": quantized(["awq", "gptq"], 64),
            "awq-gptaq": quantized(["awq", "gptaq"]),
            "kv-int8": {**quantized(["awq", "gptq"]), "kv_cache": {"policy": "int8"}},
        },
    }


def build(root: Path, name: str) -> tuple[float, float]:
    """Builds one recipe and prints what each step took: seconds of the steps that make the artifact, and of calibrate among them."""
    device = "device=cuda" if torch.cuda.is_available() else "device=cpu"
    ran = subprocess.Popen(
        [sys.executable, "-m", "doit", "build", f"recipe={name}", device],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peak = Peak(ran.pid)
    out = ran.communicate()[0]
    peak.stop()
    if ran.returncode:
        raise SystemExit(out)
    took = dict.fromkeys((*KINDS, "score", "tokens", "fetch"), 0.0)
    for state, kind, minutes, seconds in LINE.findall(out):
        if state == "built" and kind in took:
            took[kind] += 60 * int(minutes or 0) + float(seconds)
    made = sum(took[kind] for kind in KINDS)
    gpu = peak_gpu_bytes(root, name) / 1e9
    parts = ", ".join(f"{kind} {took[kind]:.1f}" for kind in took)
    print(f"{name:20} {made:6.1f} s   ({parts})   GPU {gpu:.2f} GB reserved, host {peak.gib:.2f} GiB RssAnon", flush=True)
    return made, took["calibrate"]


def peak_gpu_bytes(root: Path, name: str) -> int:
    """The most that any step of the recipe that makes the artifact had reserved."""
    from buildsys.plan import plan

    store = Store(root / "artifacts")
    planned = plan(Workspace(root).load(name), store)
    found = store.walk(planned.steps)
    built = [one.artifact.meta["built"] for step in planned.steps if step.kind in KINDS and (one := found[step.planned_key]).artifact]
    return max((said.get("peak_gpu_bytes", 0) for said in built), default=0)


class Peak:
    """The most anonymous memory that a process and its children had at a time."""

    def __init__(self, process: int) -> None:
        self.gib, self._process, self._going = 0.0, process, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self._going:
            self.gib = max(self.gib, sum(map(anonymous_kib, family(self._process))) / 2**20)
            time.sleep(0.05)

    def stop(self) -> None:
        self._going = False
        self._thread.join()


def family(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        more = [int(child) for task in Path(f"/proc/{process}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [process, *(one for child in {*map(int, children), *more} for one in family(child))]


def anonymous_kib(process: int) -> int:
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


LITE = """\
import sys, time, torch
import lmdeploy.lite.apis.calibrate as calibrate
from lmdeploy.lite.apis.auto_awq import auto_awq
tokens = torch.load(sys.argv[3])
calibrate.get_calib_loaders = lambda *_, **__: [row[None] for row in tokens]
began = time.time()
auto_awq(sys.argv[1], work_dir=sys.argv[2], calib_samples=len(tokens), calib_seqlen=tokens.shape[1], w_group_size=128,
         search_scale=sys.argv[4] == "search", batch_size=1, device=sys.argv[5])
print("TOOK", time.time() - began, torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0)
"""


def compare(root: Path, said: argparse.Namespace, ours: dict[str, float]) -> None:
    """lmdeploy lite on the first layers of the same shape and on the same windows, by what one more layer or sample takes it."""
    for layers in (1, said.lite_layers):
        make_model(root / f"lite-{layers}", said, layers)
    (root / "lite.py").write_text(LITE)
    tokens = windows(root)
    half, all_of_it = (1, said.lite_search_samples // 2), (1, said.lite_search_samples)
    for how, small, large in (("plain", (1, said.samples), (said.lite_layers, said.samples)), ("search", half, all_of_it)):
        (less, _), (more, memory) = (lite(root, said.device, tokens, how, *run) for run in (small, large))
        times = said.layers * said.samples / (large[0] * large[1] - small[0] * small[1])
        whole = (more - less) * times
        ratios = ", ".join(f"{whole / ours[name]:.1f} x {name}" for name in ("awq-rtn", "awq-gptq") if name in ours)
        ran = " and ".join(f"{took:.1f} s ({run[0]} x {run[1]})" for took, run in ((less, small), (more, large)))
        print(f"lite {how}: {ran} of layers x samples, so {whole:.0f} s: {ratios}; GPU {memory / 1e9:.1f} GB", flush=True)


def windows(root: Path) -> torch.Tensor:
    """The tokens that the builds calibrated on. [samples, seqlen]."""
    store = Store(root / "artifacts")
    planned = plan(Workspace(root).load("speed@awq-rtn"), store)
    found = store.walk(planned.steps)
    step = next(step for step in planned.steps if step.kind == "tokens" and step.title.startswith("calibration"))
    artifact = found[step.planned_key].artifact
    assert artifact is not None
    return load_file(store.path(artifact, "tokens.safetensors"))["tokens"].long()


def lite(root: Path, device: str, tokens: torch.Tensor, how: str, layers: int, samples: int) -> tuple[float, int]:
    """Seconds of one run of `auto_awq`, and bytes that torch reserved on the GPU."""
    torch.save(tokens[:samples].clone(), root / "tokens.pt")
    arguments = [sys.executable, "lite.py", f"lite-{layers}", f"out-{how}-{layers}-{samples}", "tokens.pt", how, device]
    ran = subprocess.run(arguments, cwd=root, text=True, capture_output=True)
    took = re.search(r"TOOK ([\d.]+) (\d+)", ran.stdout)
    if ran.returncode or took is None:
        raise SystemExit(f"lite {how} on {layers} layers and {samples} samples failed: {(ran.stderr or ran.stdout).strip()[-300:]}")
    return float(took[1]), int(took[2])


if __name__ == "__main__":
    main()
