"""KL(source || artifact) of bits chosen layer by layer, beside one choice of bits for all layers at the same size.

    python benchmarks/mixed.py MODEL CALIBRATION_TEXT VERIFY_TEXT [--samples 64 --seqlen 512 --verify-samples 40]

A uniform model grows in small steps only through smaller groups, so 3 and 4 bits in groups of 128, 64 and 32 channels stand against `mixed`
in groups of 128 with just as many bits a weight, scales and zeros counted. AWQ + GPTQ, format gptq. Every number comes out of `doit build`
on recipes in a temporary workspace. Ends with 1 where a mixed model is larger than its uniform one or, under 4 bits, no better. (Above 4
bits the next width is 8, and smaller groups may well be the better use of a bit.)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from quality import recipe

from buildsys.plan import plan
from buildsys.store import Store
from buildsys.verdict import load_measurements
from buildsys.workspace import Workspace

UNIFORM = ((3, 128), (3, 64), (3, 32), (4, 128), (4, 64), (4, 32))
CHOICE = [3, 4, 8]


def main() -> int:
    said = arguments()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "recipes").mkdir()
        (root / "dodo.py").write_text("from buildsys.tasks import *\n")
        (root / "recipes/m.yaml").write_text(yaml.safe_dump({**recipe(said, said.model), "format": "gptq", "matrix": variants()}))
        names = ",".join(f"m@{name}" for name in variants())
        subprocess.run([sys.executable, "-m", "doit", "build", f"recipe={names}"], cwd=root, check=True, stdout=sys.stderr)
        return report(root)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "verify"):
        parser.add_argument(name, type=lambda text: Path(text).resolve())
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--verify-samples", type=int, default=40)
    return parser.parse_args(namespace=argparse.Namespace(bits=4, group_size=128))


def bits_a_weight(bits: int, group_size: int) -> float:
    """A code, and its share of a float16 scale and a zero."""
    return bits + (16 + bits) / group_size


def variants() -> dict[str, object]:
    """Each uniform choice, and `mixed` under the same bits a weight where there is anything to choose."""
    found: dict[str, object] = {}
    for bits, group_size in UNIFORM:
        quantization = {"bits": bits, "group_size": group_size, "method": ["awq", "gptq"]}
        found[f"uniform-{bits}-{group_size}"] = {"quantization": quantization}
        budget = bits_a_weight(bits, group_size)
        if budget > bits_a_weight(min(CHOICE), 128):
            mixed = {"budget_bits": budget, "bits": CHOICE}
            found[f"mixed-{bits}-{group_size}"] = {"quantization": quantization | {"group_size": 128, "bits": 4, "mixed": mixed}}
    return found


def report(root: Path) -> int:
    store, workspace, lost = Store(root / "artifacts"), Workspace(root), 0
    uniform = {}
    for name in variants():
        planned = plan(workspace.load(f"m@{name}"), store)
        found = store.walk(planned.steps)
        measured = found[dict(planned.measures)["kl"].planned_key].artifact
        assert measured is not None, "built above"
        kl = load_measurements(measured, store)[0]
        kind, bits, group_size = name.split("-")
        average = budget = bits_a_weight(int(bits), int(group_size))
        told = ""
        if kind == "uniform":
            uniform[bits, group_size] = kl.value
        else:
            (allocated,) = (found[step.planned_key].artifact for step in planned.steps if step.kind == "allocate")
            assert allocated is not None
            average = float(allocated.meta["average_bits"])
            ratio = kl.value / uniform[bits, group_size]
            lost += average > budget + 1e-4 or (budget < 4 and ratio >= 1)
            told = f"  {ratio:.3f} of {bits} bits g{group_size}"
        print(f"{name:16} {average:.4f} bits  KL {kl.value:.4f} nats ({kl.low:.4f} to {kl.high:.4f}){told}", flush=True)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
