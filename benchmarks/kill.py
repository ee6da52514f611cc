"""`kill -9` of the driver at random moments: no child survives 2 s, and the next build ends with the digest of an undisturbed one.

    python benchmarks/kill.py [--times 20 --seed 0 --recipe demo]

Runs in temporary copies of this workspace. Moments are uniform over the duration of an undisturbed build; every second run is killed
twice, so that a build is also killed while it resumes.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="demo")
    said = parser.parse_args()
    chance = random.Random(said.seed)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        clean = workspace(Path(folder) / "clean")
        began = time.monotonic()
        subprocess.run(command(said.recipe), cwd=clean, check=True, stdout=subprocess.DEVNULL)
        took = time.monotonic() - began
        wanted = digest(clean, said.recipe)
        print(f"undisturbed: {took:.1f} s, digest {wanted[:16]}")
        for at in range(said.times):
            root = workspace(Path(folder) / f"killed-{at}")
            moments = [chance.uniform(0, took) for _ in range(1 + at % 2)]
            survivors = sum(len(kill_after(moment, root, said.recipe)) for moment in moments)
            subprocess.run(command(said.recipe), cwd=root, check=True, stdout=subprocess.DEVNULL)
            found = digest(root, said.recipe)
            bad += survivors > 0 or found != wanted
            shown = ", ".join(f"{moment:.2f} s" for moment in moments)
            same = "equal" if found == wanted else "DIFFERS"
            print(f"{at + 1:3}  killed at {shown:16} survivors after 2 s: {survivors}  digest {found[:16]} {same}", flush=True)
            shutil.rmtree(root)
    print(f"{said.times} kills, {bad} bad")
    return bad > 0


def workspace(root: Path) -> Path:
    shutil.copytree(ROOT / "recipes", root / "recipes")
    shutil.copy(ROOT / "dodo.py", root)
    return root


def command(recipe: str) -> list[str]:
    return [sys.executable, "-m", "doit", "build", f"recipe={recipe}"]


def digest(root: Path, recipe: str) -> str:
    return Path(os.readlink(root / "artifacts" / recipe)).name.partition("-")[0]  # then comes the release, which tells times


def kill_after(moment_s: float, root: Path, recipe: str) -> list[psutil.Process]:
    """Kills the driver alone, after `moment_s`; returns what lives of its children 2 s later."""
    driver = subprocess.Popen(command(recipe), cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(moment_s)
    try:
        children = psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(2)
    return [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


if __name__ == "__main__":
    sys.exit(main())
