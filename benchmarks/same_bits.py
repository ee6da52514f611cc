"""Clean builds under other threads and batches give equal artifacts on one machine.

    python benchmarks/same_bits.py [--recipe demo]

Each line is a build in a workspace and a store of its own; the last line says whether all digests are equal.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kill import command, digest, workspace

SETTINGS = (
    ("threads=1 batch=1", {}),
    ("threads=2 batch=1", {}),
    ("threads=1 batch=8", {}),
    ("threads=2 batch=8", {}),
    ("threads=5 batch=3", {}),
    ("", {"OMP_NUM_THREADS": "1"}),
    ("", {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    said = parser.parse_args()
    found = set()
    with tempfile.TemporaryDirectory() as folder:
        for at, (words, environment) in enumerate(SETTINGS):
            root = workspace(Path(folder) / str(at))
            line = [*command(said.recipe), *words.split()]
            subprocess.run(line, cwd=root, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **environment})
            found.add(digest(root, said.recipe))
            shown = " ".join([*(f"{name}={value}" for name, value in environment.items()), *words.split()])
            print(f"{shown:40} {digest(root, said.recipe)}", flush=True)
    print("all equal" if len(found) == 1 else f"{len(found)} DIFFERENT digests")
    return len(found) > 1


if __name__ == "__main__":
    sys.exit(main())
