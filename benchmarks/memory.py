"""Anonymous memory of a build must not grow with the number of layers: one decoder block at a time, and no model in memory.

    python benchmarks/memory.py MODEL TEXT VERIFY_TEXT [--samples 32 --seqlen 256]

Builds MODEL's first layers, and the same twice over (every tensor of a block repeated), through `doit build`; samples RssAnon of the child
that computes, every 5 ms, and prints the peak by step kind beside the bytes of one float32 block.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import yaml
from safetensors.torch import load_file, save_file

EVERY_S = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=lambda text: Path(text).resolve())
    for name in ("text", "verify"):
        parser.add_argument(name, type=lambda text: Path(text).resolve())
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    said = parser.parse_args()
    layers = json.loads((said.model / "config.json").read_text())["num_hidden_layers"]
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 2):
            root = Path(folder) / str(times)
            (root / "recipes").mkdir(parents=True)
            (root / "dodo.py").write_text("from buildsys.tasks import *\n")
            block_bytes = repeated(said.model, root / "recipes" / "model", times)
            (root / "recipes" / "r.yaml").write_text(yaml.safe_dump(recipe(said)))
            peaks[times] = watch(root)
    block_mib = block_bytes / 2**20
    for kind in peaks[1]:
        small, large = peaks[1][kind] / 2**20, peaks[2][kind] / 2**20
        grown = large - small
        of_block = f"{grown / block_mib:+.2f} of a block ({block_mib:.1f} MiB)"
        print(f"{kind:10} {layers} layers {small:8.1f} MiB, {2 * layers} layers {large:8.1f} MiB: {grown:+6.1f} MiB, {of_block}")


def repeated(model: Path, folder: Path, times: int) -> int:
    """A copy of a Llama with its layers repeated; returns the bytes of one block in float32."""
    shutil.copytree(model, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors*")):
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        path.unlink()
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"]
    made = {}
    for name, tensor in tensors.items():
        found = re.match(r"(model\.layers\.)(\d+)(\..*)", name)
        for copy in range(times if found else 1):
            made[f"{found[1]}{int(found[2]) + copy * layers}{found[3]}" if found else name] = tensor.clone()
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers * times}))
    return sum(4 * tensor.numel() for name, tensor in tensors.items() if name.startswith("model.layers.0."))


def recipe(said: argparse.Namespace) -> dict[str, object]:
    text, verify = ({"text_files": {"paths": [str(path)], "outside": True}} for path in (said.text, said.verify))
    return {
        "schema": 1,
        "source": {"local": {"path": "model"}},
        "calibration": {"dataset": text, "samples": said.samples, "seqlen": said.seqlen},
        "quantization": {"bits": 4, "method": ["awq", "gptq"]},
        "format": "awq",
        "verify": {"text": verify, "samples": said.samples, "seqlen": said.seqlen},
    }


def watch(root: Path) -> dict[str, int]:
    """Peak RssAnon in bytes of the computing child, by the kind of step that its newest log belongs to."""
    driver = subprocess.Popen([sys.executable, "-m", "doit", "build", "recipe=r", "threads=2"], cwd=root, stdout=subprocess.DEVNULL)
    peaks: dict[str, int] = {}
    while driver.poll() is None:
        kind = running(root / "artifacts" / ".store" / "logs")
        try:
            for child in psutil.Process(driver.pid).children(recursive=True):
                peaks[kind] = max(peaks.get(kind, 0), anonymous(child.pid))
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            pass
        time.sleep(EVERY_S)
    assert driver.returncode == 0, "the build failed"
    return {kind: peaks[kind] for kind in ("calibrate", "quantize", "pack", "score")}


def anonymous(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


def running(logs: Path) -> str:
    """The kind of the step whose log was begun last."""
    found = sorted(logs.glob("*-*.log"), key=lambda path: path.stat().st_mtime_ns) if logs.is_dir() else []
    return found[-1].name.partition("-")[0] if found else ""


if __name__ == "__main__":
    main()
