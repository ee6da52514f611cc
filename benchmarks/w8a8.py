"""Eight bits for weights and activations beside four for weights alone: KL, perplexity, agreement and bytes, in one table.

    python benchmarks/w8a8.py MODEL CALIBRATION_TEXT VERIFY_TEXT [--samples 64 --seqlen 512 --verify-samples 40] [--write]

Every number comes out of `doit build` on recipes in a temporary workspace, on the model and on a copy of it with outlier channels
(quality.py says which). W8A8 is per-channel weights and per-token activations, scored as LMDeploy's PyTorch engine computes them. Bytes
are those of the safetensors files. `--write` puts the table into benchmarks/RESULTS.md, in the place of the last run's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from quality import with_outliers

from buildsys.measurement import Measurement
from buildsys.plan import Plan, plan
from buildsys.store import Artifact, Store
from buildsys.verdict import load_measurements
from buildsys.workspace import Workspace

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"
BEGIN, END = "<!-- w8a8: begin -->", "<!-- w8a8: end -->"
W4 = {"bits": 4, "group_size": 128}
INT8 = {"bits": 8, "group_size": -1, "symmetric": True, "activations": "int8"}
FP8 = INT8 | {"number": "fp8", "activations": "fp8"}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {  # name: the format, and quantization
    "w4a16-awq-gptq": ("awq", W4 | {"method": ["awq", "gptq"]}),
    "w4a16-awq-gptaq": ("awq", W4 | {"method": ["awq", "gptaq"]}),
    "int8-rtn": ("smooth_quant", INT8 | {"method": ["rtn"]}),
    "int8-smoothquant-half-rtn": ("smooth_quant", INT8 | {"method": [{"smoothquant": {"alpha": 0.5}}, "rtn"]}),
    "int8-smoothquant-rtn": ("smooth_quant", INT8 | {"method": ["smoothquant", "rtn"]}),
    "int8-smoothquant-gptq": ("smooth_quant", INT8 | {"method": ["smoothquant", "gptq"]}),
    "fp8-rtn": ("smooth_quant", FP8 | {"method": ["rtn"]}),
    "fp8-smoothquant-rtn": ("smooth_quant", FP8 | {"method": ["smoothquant", "rtn"]}),
}
TITLES = {
    "w4a16-awq-gptq": "W4A16 g128, AWQ + GPTQ",
    "w4a16-awq-gptaq": "W4A16 g128, AWQ + GPTAQ",
    "int8-rtn": "W8A8 int8, RTN",
    "int8-smoothquant-half-rtn": "W8A8 int8, SmoothQuant (alpha 0.5) + RTN",
    "int8-smoothquant-rtn": "W8A8 int8, SmoothQuant + RTN",
    "int8-smoothquant-gptq": "W8A8 int8, SmoothQuant + GPTQ",
    "fp8-rtn": "W8A8 fp8, RTN",
    "fp8-smoothquant-rtn": "W8A8 fp8, SmoothQuant + RTN",
}
MODELS = {"plain": "the model", "outliers": "its copy with outlier channels"}
HEAD = """\
| model | weights and activations | KL, nats (95% interval) | perplexity | agreement | bytes | of the source |
| --- | --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    said = arguments()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "recipes").mkdir()
        (root / "dodo.py").write_text("from buildsys.tasks import *\n")
        with_outliers(said.model, root / "outliers")
        for name, model in (("plain", said.model), ("outliers", root / "outliers")):
            (root / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(recipe(said, model), sort_keys=False))
        names = [f"{name}@{variant}" for name in MODELS for variant in VARIANTS]
        subprocess.run([sys.executable, "-m", "doit", "build", f"recipe={','.join(names)}"], cwd=root, check=True, stdout=sys.stderr)
        table = "\n".join([HEAD, *(row for name in MODELS for row in rows(root, name))])
    print(table)
    if said.write:
        RESULTS.write_text(with_table(RESULTS.read_text(encoding="utf-8"), f"{command(said)}\n{table}"), encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "verify"):
        parser.add_argument(name, type=lambda text: Path(text).resolve())
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--verify-samples", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    return parser.parse_args()


def command(said: argparse.Namespace) -> str:
    """How the table was made, without this machine's folders."""
    calibrated = f"{said.samples} x {said.seqlen} tokens of {said.calibration.name}"
    scored = f"scored on {said.verify_samples} x {said.seqlen} of {said.verify.name}"
    return f"`python benchmarks/w8a8.py MODEL CALIBRATION_TEXT VERIFY_TEXT --write`: {said.model.name}, {calibrated}, {scored}.\n"


def recipe(said: argparse.Namespace, model: Path) -> dict[str, object]:
    def text(path: Path) -> dict[str, object]:
        return {"text_files": {"paths": [str(path)], "outside": True}}

    return {
        "schema": 1,
        "source": {"local": {"path": str(model), "outside": True}},
        "calibration": {"dataset": text(said.calibration), "samples": said.samples, "seqlen": said.seqlen},
        "verify": {"text": text(said.verify), "samples": said.verify_samples, "seqlen": said.seqlen},
        "matrix": {name: {"format": format, "quantization": quantization} for name, (format, quantization) in VARIANTS.items()},
    }


def rows(root: Path, model: str) -> Iterator[str]:
    """The source's row, and one for each variant."""
    store, workspace = Store(root / "artifacts"), Workspace(root)
    source_bytes = 0
    for variant in VARIANTS:
        planned = plan(workspace.load(f"{model}@{variant}"), store)
        found = measured(planned, store)
        if not source_bytes:
            source_bytes = sum(path.stat().st_size for name, path in planned.source.files.items() if name.endswith(".safetensors"))
            yield f"| {MODELS[model]} | source | 0 | {found['source_perplexity'].value:.3f} | 1 | {source_bytes:,} | 1 |"
        artifact = store.walk(planned.steps)[planned.artifact.planned_key].artifact
        assert artifact is not None
        kl, held = found["kl"], tensor_bytes(artifact, store)
        yield (
            f"| {MODELS[model]} | {TITLES[variant]} | {kl.value:.5f} ({kl.low:.5f} to {kl.high:.5f}) | "
            f"{found['quantized_perplexity'].value:.3f} | {found['share'].value:.4f} | {held:,} | {held / source_bytes:.3f} |"
        )


def measured(planned: Plan, store: Store) -> dict[str, Measurement]:
    """What verify measured of one recipe, by the names of the values."""
    walked, steps = store.walk(planned.steps), dict(planned.measures)
    outputs = [walked[steps[check].planned_key].artifact for check in ("kl", "perplexity", "agreement")]
    return {one.name: one for output in outputs if output is not None for one in load_measurements(output, store)}


def tensor_bytes(artifact: Artifact, store: Store) -> int:
    return sum(store.path(artifact, name).stat().st_size for name in artifact.files if name.endswith(".safetensors"))


def with_table(text: str, table: str) -> str:
    """`text` with `table` between the markers; they go to its end where it has none."""
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n## W8A8 beside W4A16\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{RESULTS.name}: {BEGIN} has no {END} after it; add it where the table ends")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


if __name__ == "__main__":
    main()
