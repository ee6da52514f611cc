"""A fleet of recipes: what checking, listing and planning all of them cost, and a build with nothing to do, in a workspace made for it.

Run: python benchmarks/fleet.py [--recipes 1000] [--repeat 5] [--keep]
Prints the median and the least seconds of each, and their ratio to the limit. Claims, with 1,000 recipes: check at most 1.5 s, list at
most 1 s, plan in one process with its imports at most 3 s, `doit plan recipe='*'` at most 5 s as a table and as JSON, `doit impact` at most
5 s, a no-op build of one recipe at most 0.5 s over importing doit. Exit 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BASE = """\
# yaml-language-server: $schema=../recipe.schema.json
quantization: {bits: 4, group_size: 128, method: [awq, gptq]}
format: awq
"""
RECIPE = """\
# yaml-language-server: $schema=../recipe.schema.json
schema: 1
extends: ../bases/w4a16.yaml
source: {{local: {{path: ../demo/model}}}}
calibration: {{dataset: self_generated, samples: {samples}, seqlen: 128, seed: 0}}
kv_cache: {{policy: {policy}, max_entry_count: 0.4}}
target: {{gpu: a100-40gb, session_len: 1024}}
verify:
  text: self_generated
  samples: 8
  seqlen: 128
  seed: 1
  kl: {{}}
  perplexity: {{}}
  agreement: {{}}
  memory: {{}}
publish: {{directory: {{path: ../../published/{name}}}}}
"""
POLICIES = ("none", "int8", "int4")
PLANS = """\
from pathlib import Path
from buildsys.finder import Finder
from buildsys.plan import plan
from buildsys.store import Store
from buildsys.workspace import Workspace
recipes, finder = Workspace(Path.cwd()), Finder(Store())
assert len([plan(recipes.load(name), finder.store, finder=finder) for name in recipes.names()]) == int(__import__("sys").argv[1])
"""


def workspace(root: Path, recipes: int) -> str:
    """Writes `recipes` recipes that share the demo's model and differ in calibration and KV policy; the name of the first."""
    shutil.copy(REPOSITORY / "dodo.py", root)
    shutil.copytree(REPOSITORY / "recipes/demo/model", root / "recipes/demo/model")
    (root / "recipes/bases").mkdir()
    (root / "recipes/bases/w4a16.yaml").write_text(BASE)
    (root / "recipes/fleet").mkdir()
    for number in range(recipes):
        name = f"fleet-{number:04d}"
        text = RECIPE.format(name=name, samples=8 + number // len(POLICIES), policy=POLICIES[number % len(POLICIES)])
        (root / f"recipes/fleet/{name}.yaml").write_text(text)
    return "fleet-0000"


def timed(command: Sequence[str], root: Path, repeat: int) -> list[float]:
    """Seconds of each run of `command` in the workspace; a run that fails ends the benchmark with its output."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # where buildsys is used, its modules are compiled once
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        if done.returncode:
            sys.exit(f"{' '.join(command)} ended with {done.returncode} in {root}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return seconds


def report(title: str, seconds: Sequence[float], limit_s: float, over: float = 0.0) -> bool:
    """One line, and whether the claim holds for the median. `over`: seconds that are not counted."""
    median, least = statistics.median(seconds) - over, min(seconds) - over
    holds = median <= limit_s
    figures = f"median {median:6.3f} s  least {least:6.3f} s  limit {limit_s:.1f} s  ratio {median / limit_s:.2f}"
    print(f"{title:44} {figures}  {'ok' if holds else 'MISSED'}")
    return holds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipes", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="leave the workspace, and say where it is")
    arguments = parser.parse_args()
    doit = [sys.executable, "-m", "doit"]
    root = Path(tempfile.mkdtemp(prefix="buildsys-fleet-"))
    try:
        recipe = workspace(root, arguments.recipes)
        print(f"{arguments.recipes} recipes, {arguments.repeat} runs each, {os.cpu_count()} CPUs, Python {sys.version.partition(' ')[0]}")
        bare = timed([sys.executable, "-c", "import doit.doit_cmd"], root, arguments.repeat)
        importing = statistics.median(bare)
        print(f"{'python -c import doit':44} median {importing:6.3f} s")
        holds = [
            report("doit check", timed([*doit, "check"], root, arguments.repeat), 1.5),
            report("doit list", timed([*doit, "list"], root, arguments.repeat), 1.0),
        ]
        every = "recipe=*"
        shapes = {"": [], ", as JSON": ["format=json"]}
        plans = timed([sys.executable, "-c", PLANS, str(arguments.recipes)], root, arguments.repeat)
        holds.append(report("plan all, in Python", plans, 3.0))
        for said, more in shapes.items():
            holds.append(report(f"doit plan recipe='*'{said}", timed([*doit, "plan", every, *more], root, arguments.repeat), 5.0))
        first = timed([*doit, "build", f"recipe={recipe}"], root, 1)
        print(f"{'doit build, the first time':44}        {first[0]:6.3f} s")
        again = timed([*doit, "build", f"recipe={recipe}"], root, arguments.repeat)
        holds.append(report("doit build again, over importing doit", again, 0.5, over=importing))
        holds.append(report("doit plan recipe='*', one built", timed([*doit, "plan", every], root, arguments.repeat), 5.0))
        holds.append(report("doit impact upgrade=torch==99", timed([*doit, "impact", "upgrade=torch==99"], root, arguments.repeat), 5.0))
        return 0 if all(holds) else 1
    finally:
        if arguments.keep:
            print(f"kept: {root}")
        else:
            shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(main())
