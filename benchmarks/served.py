"""verify.serve on this machine's GPU: the demo with every gate, and how an 8-layer model of 7B width is served beside its source.

    python benchmarks/served.py [--only demo,wide] [--folder DIR] [--out DIR]

demo: `doit build` of the shipped model with serve gates, for KV none, int8 and int4, with a chat template that knows tools: every answer,
the agreement of greedy tokens and every gate have to hold. wide: random weights in 4 bits, int8 KV, at two shares of memory for the cache;
its speed is told, not held. Both print the report's table; --out gets the pages. Needs a GPU that gpus.py knows, and LMDeploy; exit 1 where
a build fails. About 8 minutes on one H200.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from buildsys import gpus
from buildsys.errors import BuildError
from buildsys.serving.host import look
from buildsys.store import Store

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "tests" / "tools.jinja"
SHAPE = ["--layers", "8"]  # of speed.py's model; the rest of the shape are its defaults
AGREES = {"none": 0.98, "int8": 0.95, "int4": 0.8}
"""min_agreement by KV policy. The wider a cache's steps, the further float16's own noise carries a value that lies on an edge: of an int4
cache in four blocks our emulation has 0.92 of the engine's tokens, and our forward without it 0.79 (kv_engine.py)."""
COLUMNS = f"{'load':>7} {'prompts':>9} {'tokens/s at each batch':>30} {'first token':>12}"
HEAD = f"{'':28} {COLUMNS} {'loaded':>9} {'under load':>10} {'KV tokens':>10}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="demo,wide", help="demo, wide, or both with a comma between")
    parser.add_argument("--folder", type=Path, help="work here, and leave it; what is built there already is not built again")
    parser.add_argument("--out", type=Path, help="copy the reports and served.json here")
    said = parser.parse_args()
    try:
        host = look()
    except BuildError as error:
        print(f"{error}\nnothing was measured")
        return 1
    known = gpus.close(host.devices[0].name)
    if not known:
        print(f"{host.devices[0].name} is not in gpus.py: nothing was measured")
        return 1
    print(f"{host.devices[0].name}, driver {host.devices[0].driver}, lmdeploy {host.lmdeploy}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (said.folder or Path(temporary)).resolve()
        names = [name for part in said.only.split(",") for name in {"demo": demo, "wide": wide}[part](folder, known[0])]
        fine = [build(folder, name, said.out) for name in names]
    return 0 if all(fine) else 1


def demo(folder: Path, gpu: str) -> list[str]:
    """The shipped model, with a template for tools, under each KV policy."""
    place = folder / "recipes" / "served"
    if not place.exists():
        shutil.copytree(ROOT / "recipes" / "demo" / "model", place / "model")
        shutil.copytree(ROOT / "recipes" / "bases", folder / "recipes" / "bases", dirs_exist_ok=True)
        shutil.copy(TEMPLATE, place / "model" / "chat_template.jinja")
        (folder / "dodo.py").write_text("from buildsys.tasks import *\n")
        written = yaml.safe_load((ROOT / "recipes" / "demo" / "demo.yaml").read_text())
        written |= {"target": {"gpu": gpu, "tool_call_parser": "qwen3"}, "kv_cache": {"max_entry_count": 0.1}}
        serve = {"required": "always", "max_entry_counts": [0.8, 0.5, 0.4, 0.01], "max_vram_gib": 60.0}
        written["verify"] |= {"kv": {}, "serve": serve}
        written["matrix"] = {policy: variant(policy) for policy in AGREES}
        del written["publish"]
        (place / "demo.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    return [f"demo@{policy}" for policy in AGREES]


def variant(policy: str) -> dict[str, Any]:
    """The shares are tried once: they say nothing of a policy."""
    serve: dict[str, Any] = {} if policy == "none" else {"max_entry_counts": []}
    return {"kv_cache": {"policy": policy}, "verify": {"serve": serve | {"min_agreement": AGREES[policy]}}}


def wide(folder: Path, gpu: str) -> list[str]:
    """Eight layers of 7B width, drawn on the GPU in a process that ends before anything is measured."""
    if not (folder / "model").exists():
        make = f"import sys; sys.argv = ['speed', *{SHAPE!r}]; import speed, pathlib as p; "
        make += f"speed.make_model(p.Path({str(folder / 'model')!r}), speed.arguments()); speed.make_text(p.Path({str(folder / 'text')!r}))"
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-c", make], check=True, env=environment())
        text = {name: {"text_files": {"paths": [f"../text/{name}.txt"]}} for name in ("calibration", "verify")}
        recipe = {
            "schema": 1,
            "source": {"local": {"path": "../model"}},
            "calibration": {"dataset": text["calibration"], "samples": 8, "seqlen": 512},
            "quantization": {"bits": 4, "group_size": 128, "method": ["awq", "rtn"]},
            "format": "awq",
            "kv_cache": {"policy": "int8", "max_entry_count": 0.5},
            "target": {"gpu": gpu, "session_len": 8192},
            "verify": {"text": text["verify"], "samples": 4, "seqlen": 512, "serve": {"required": "always", "max_entry_counts": [0.2]}},
        }
        (folder / "recipes").mkdir(exist_ok=True)
        (folder / "recipes" / "wide.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        (folder / "dodo.py").write_text("from buildsys.tasks import *\n")
    return ["wide"]


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def build(folder: Path, name: str, out: Path | None) -> bool:
    """Builds it, prints its verdicts and the table of its servers; whether every gate held."""
    began = time.monotonic()
    for task in ("build", "report"):
        how = [sys.executable, "-m", "doit", task, f"recipe={name}"]
        log = folder / f"{name}.{task}.log"
        with log.open("w") as errors:
            ran = subprocess.Popen(how, cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE, stderr=errors)
            assert ran.stdout is not None
            for line in ran.stdout:  # as it comes: a build of several servers takes minutes
                if line.startswith(("built", "passed", "failed", "skipped", name)) or " serve " in line:
                    print(f"{time.monotonic() - began:5.0f} s  {line.rstrip()}", flush=True)
            ran.wait()
        print(f"== doit {task} recipe={name}: exit {ran.returncode}, {time.monotonic() - began:.0f} s", flush=True)
        if ran.returncode:
            print(log.read_text(errors="replace")[-6000:], flush=True)
            return False
    served = told(folder, name)
    print("\n".join(table(served)), flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        safe = name.replace("@", "-")
        shutil.copy(folder / "artifacts" / f"{name}.html", out / f"{safe}.html")
        (out / f"{safe}.served.json").write_text(json.dumps(served, indent=1) + "\n")
    return True


def told(folder: Path, name: str) -> dict[str, Any]:
    """served.json of the recipe's build."""
    from buildsys.plan import plan
    from buildsys.workspace import Workspace

    store = Store(folder / "artifacts")
    os.chdir(folder)
    found = store.walk(plan(Workspace(folder).load(name), store, 2, look()).steps)
    output = next(one.artifact for one in found.values() if one.artifact is not None and one.artifact.meta["built"]["kind"] == "serve")
    served: dict[str, Any] = json.loads(store.path(output, "served.json").read_text())
    return served


def table(served: dict[str, Any]) -> list[str]:
    """One line a server."""
    lines = [HEAD]
    for one in (*served["trials"], *([served["transformers"]] if "transformers" in served else [])):
        name = one.get("name", "transformers")
        if "why" in one:
            lines.append(f"{name:28} not measured: {one['why']}")
            continue
        speeds = ", ".join(f"{rate['batch']}: {median(rate['tokens_per_s']):,.0f}" for rate in one["rates"])
        first = f"{1000 * median(one['rates'][0]['first_token_s']):.1f} ms"
        memory = f"{one['loaded_bytes'] / 2**30:>5.2f} GiB {one['vram_bytes'] / 2**30:>6.2f} GiB"
        tokens = "–" if one["pool_tokens"] is None else f"{one['pool_tokens']:,}"
        lines.append(f"{name:28} {one['load_s']:>5.1f} s {one['seconds']:>7.2f} s {speeds:>30} {first:>12} {memory} {tokens:>10}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
