"""The quantize step of a 7B shape on one GPU and on several of one host: seconds, as ratios in one run.

    python benchmarks/gpus.py [--layers 32 --samples 128 --seqlen 2048] [--gpus 2]

Weights are random (time does not depend on them). Every number comes out of `doit build` in a temporary workspace: AWQ + GPTQ, W4A16 g128,
with CUDA_VISIBLE_DEVICES showing one GPU and then several, each in a process of its own; a build of two layers before them compiles the
kernels. Exit 1 where the step on two GPUs takes more than 1/1.7 of the time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from speed import LINE, make_model, make_text, shaped

LIMIT = 1.7


def main() -> None:
    parser = shaped(__doc__)
    parser.add_argument("--gpus", type=int, default=2)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=said.folder) as folder:
        root = Path(folder)
        make_text(root / "recipes")
        (root / "dodo.py").write_text("from buildsys.tasks import *\n")
        for name, layers in (("small", 2), ("whole", said.layers)):
            make_model(root / name, said, layers)
            (root / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(recipe(name, said), sort_keys=False))
        for gpus in (said.gpus, 1):
            build(root, "small", gpus)
        alone = build(root, "whole", 1)
        together = build(root, "whole", said.gpus)
        ratios = {kind: alone[kind] / together[kind] for kind in ("calibrate", "quantize")}
        print(f"{said.gpus} GPUs: " + ", ".join(f"{kind} {ratio:.2f} x as fast as one" for kind, ratio in ratios.items()))
        if said.gpus == 2 and ratios["quantize"] < LIMIT:
            raise SystemExit(f"the limit is {LIMIT}")


def recipe(name: str, said: argparse.Namespace) -> dict[str, object]:
    return {
        "schema": 1,
        "source": {"local": {"path": f"../{name}"}},
        "calibration": {"dataset": {"text_files": {"paths": ["calibration.txt"]}}, "samples": said.samples, "seqlen": said.seqlen},
        "quantization": {"bits": 4, "group_size": 128, "method": ["awq", "gptq"]},
        "format": "awq",
        "verify": {"text": {"text_files": {"paths": ["verify.txt"]}}, "samples": 2, "seqlen": 512},
    }


def build(root: Path, name: str, gpus: int) -> dict[str, float]:
    """A clean build, and the seconds of its steps. It is ended when the model is packed: how long verify takes is no matter here."""
    shutil.rmtree(root / "artifacts", ignore_errors=True)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
    line = [sys.executable, "-m", "doit", "build", f"recipe={name}", "device=auto"]
    took: dict[str, float] = {}
    said: list[str] = []
    with subprocess.Popen(line, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as ran:
        assert ran.stdout is not None
        for text in ran.stdout:
            said.append(text)
            took |= {kind: 60 * int(minutes or 0) + float(seconds) for _, kind, minutes, seconds in LINE.findall(text)}
            if "pack" in took:
                ran.send_signal(signal.SIGINT)
                break
        else:
            raise SystemExit("".join(said))
        ran.stdout.read()
    shown = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in took.items())
    print(f"{name:5} {gpus} GPU{'s' if gpus > 1 else ''}: {shown}", flush=True)
    return took


if __name__ == "__main__":
    main()
