"""buildsys's AWQ + RTN against LMDeploy's `lite` as a backend: two builds of one scheme on one text, and `doit compare` of both.

    BUILDSYS_LMDEPLOY=LITE/bin/python python benchmarks/backends.py MODEL CALIBRATION_TEXT VERIFY_TEXT [--device cuda --best --w8a8]

Quality, size, seconds and peak memory of each land in a table, and in artifacts/compare-*.html of the folder that --folder names. --best
adds AWQ + GPTQ, which LMDeploy has nothing like; --w8a8 does SmoothQuant in int8 instead.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import yaml

W4 = {"bits": 4, "group_size": 128, "method": ["awq", "rtn"]}
W8 = {"bits": 8, "group_size": -1, "symmetric": True, "activations": "int8", "method": ["smoothquant", "rtn"]}


def main() -> int:
    said = arguments()
    said.folder.joinpath("recipes").mkdir(parents=True)
    (said.folder / "dodo.py").write_text("from buildsys.tasks import *\n")
    (said.folder / "recipes" / "both.yaml").write_text(yaml.safe_dump(recipe(said), sort_keys=False))
    names = ",".join(f"both@{name}" for name in variants(said))
    for words in (["build", f"recipe={names}", f"device={said.device}"], ["compare", f"recipes={names}"]):
        status = subprocess.run([sys.executable, "-m", "doit", *words], cwd=said.folder).returncode
        if status:
            return status
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder: config, tokenizer, safetensors")
    parser.add_argument("calibration", type=Path, help="text file that both calibrate on")
    parser.add_argument("verify", type=Path, help="text file that both are scored on")
    parser.add_argument("--folder", type=Path, default=Path("backends"), help="a new folder to build in")
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration")
    parser.add_argument("--verify-samples", type=int, default=40)
    parser.add_argument("--seqlen", type=int, default=512, help="tokens a window")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--best", action="store_true", help="AWQ + GPTQ too")
    parser.add_argument("--w8a8", action="store_true", help="SmoothQuant, int8")
    return parser.parse_args()


def variants(said: argparse.Namespace) -> dict[str, object]:
    found: dict[str, object] = {"native": {}, "lmdeploy": {"quantization": {"backend": "lmdeploy"}}}
    rescaler = W8["method"][0] if said.w8a8 else "awq"  # type: ignore[index]
    return found | ({"best": {"quantization": {"method": [rescaler, "gptq"]}}} if said.best else {})


def recipe(said: argparse.Namespace) -> dict[str, object]:
    def text(path: Path) -> dict[str, object]:
        return {"text_files": {"paths": [str(path.resolve())], "outside": True}}

    return {
        "schema": 1,
        "source": {"local": {"path": str(said.model.resolve()), "outside": True}},
        "calibration": {"dataset": text(said.calibration), "samples": said.samples, "seqlen": said.seqlen},
        "quantization": W8 if said.w8a8 else W4,
        "format": "smooth_quant" if said.w8a8 else "awq",
        "verify": {"text": text(said.verify), "samples": said.verify_samples, "seqlen": said.seqlen},
        "matrix": variants(said),
    }


if __name__ == "__main__":
    sys.exit(main())
