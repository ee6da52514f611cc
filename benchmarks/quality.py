"""KL(source || artifact) of every method, as a ratio to round to nearest, on a model and on a copy of it with outlier channels.

    python benchmarks/quality.py MODEL CALIBRATION_TEXT VERIFY_TEXT [--samples 64 --seqlen 512 --verify-samples 40]

Every number comes out of `doit build` on recipes in a temporary workspace: what users run, nothing beside it. The copy has 6 channels of
each block norm multiplied by 16 and the columns that read them divided by 16 (seed 7): the same function, and hard to round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from buildsys.plan import plan
from buildsys.store import Store
from buildsys.verdict import load_measurements
from buildsys.workspace import Workspace

METHODS = {"rtn": ["rtn"], "awq-rtn": ["awq", "rtn"], "gptq": ["gptq"], "awq-gptq": ["awq", "gptq"], "awq-gptaq": ["awq", "gptaq"]}
OUTLIERS, FACTOR, SEED = 6, 16.0, 7


def main() -> None:
    said = arguments()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "recipes").mkdir()
        (root / "dodo.py").write_text("from buildsys.tasks import *\n")
        outliers = root / "outliers"
        with_outliers(said.model, outliers)
        for name, model in (("plain", said.model), ("outliers", outliers)):
            (root / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(recipe(said, model), sort_keys=False))
        names = [f"{name}@{method}" for name in ("plain", "outliers") for method in METHODS]
        subprocess.run([sys.executable, "-m", "doit", "build", f"recipe={','.join(names)}"], cwd=root, check=True, stdout=sys.stderr)
        for model in ("plain", "outliers"):
            report(root, model)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "verify"):
        parser.add_argument(name, type=lambda text: Path(text).resolve())
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--verify-samples", type=int, default=40)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    return parser.parse_args()


def recipe(said: argparse.Namespace, model: Path) -> dict[str, object]:
    def text(path: Path) -> dict[str, object]:
        return {"text_files": {"paths": [str(path)], "outside": True}}

    return {
        "schema": 1,
        "source": {"local": {"path": str(model), "outside": True}},
        "calibration": {"dataset": text(said.calibration), "samples": said.samples, "seqlen": said.seqlen},
        "quantization": {"bits": said.bits, "group_size": said.group_size, "method": ["rtn"]},
        "format": "awq",
        "verify": {"text": text(said.verify), "samples": said.verify_samples, "seqlen": said.seqlen},
        "matrix": {name: {"quantization": {"method": methods}} for name, methods in METHODS.items()},
    }


def with_outliers(source: Path, folder: Path) -> None:
    """A copy that computes the same function through outlier channels (a Llama; powers of two, so exact)."""
    shutil.copytree(source, folder)
    folder.chmod(0o755)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors*")):
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        path.unlink()
    generator = torch.Generator().manual_seed(SEED)
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    for layer in range(layers):
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            prefix = f"model.layers.{layer}."
            weight = tensors[f"{prefix}{norm}.weight"]
            chosen = torch.randperm(len(weight), generator=generator)[:OUTLIERS]
            weight[chosen] *= FACTOR
            for reader in readers:
                tensors[f"{prefix}{reader}.weight"][:, chosen] /= FACTOR
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def report(root: Path, model: str) -> None:
    store, workspace = Store(root / "artifacts"), Workspace(root)
    base = 0.0
    for method in METHODS:
        planned = plan(workspace.load(f"{model}@{method}"), store)
        found = store.walk(planned.steps)
        artifact = found[dict(planned.measures)["kl"].planned_key].artifact
        kl = load_measurements(artifact, store)[0]
        base = base or kl.value
        print(f"{model:9} {method:9} KL {kl.value:.4f} nats ({kl.low:.4f} to {kl.high:.4f})  {kl.value / base:.3f} of RTN", flush=True)


if __name__ == "__main__":
    main()
