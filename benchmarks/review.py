"""What `doit diff` costs over a fleet of recipes against a base that changed one shared file, in a repository made for the purpose.

Run: python benchmarks/review.py [--recipes 1000] [--repeat 3] [--keep]
Prints the median and the least seconds, and their ratio to the limit: of a file that a third of the recipes share, and of one that all do.
Claim, with 1,000 recipes: at most 4 s. Exit 1 where it does not hold.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fleet import BASE, REPOSITORY, report, timed, workspace

LIMIT_S = 4.0
BASES = ("w4a16", "w4a16-b", "w4a16-c")
COMMON = "kv_cache: {max_entry_count: 0.4}\n"


def repository(root: Path, recipes: int) -> None:
    """The fleet over three bases, which extend one more; all of it committed."""
    workspace(root, recipes)
    folder = root / "recipes"
    for name in BASES:
        (folder / "bases" / f"{name}.yaml").write_text(f"extends: common.yaml\n{BASE}")
    (folder / "bases" / "common.yaml").write_text(COMMON)
    for number, path in enumerate(sorted((folder / "fleet").iterdir())):
        text = path.read_text().replace("w4a16.yaml", f"{BASES[number % len(BASES)]}.yaml").replace(", max_entry_count: 0.4", "")
        path.write_text(text)
    (root / ".gitignore").write_text("artifacts/\n__pycache__/\n")
    who = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    for arguments in (["init", "-q", "-b", "main"], ["add", "-A"], [*who, "commit", "-q", "-m", "a fleet"]):
        subprocess.run(["git", *arguments], cwd=root, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipes", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="leave the repository, and say where it is")
    arguments = parser.parse_args()
    diff = [sys.executable, "-m", "doit", "diff", "base=main", "format=markdown", "device=cpu"]
    root = Path(tempfile.mkdtemp(prefix="buildsys-review-"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    try:
        repository(root, arguments.recipes)
        print(f"{arguments.recipes} recipes, {arguments.repeat} runs each, {os.cpu_count()} CPUs, Python {sys.version.partition(' ')[0]}")
        holds = [report("doit diff, nothing changed", timed(diff, root, arguments.repeat), LIMIT_S)]
        base = root / "recipes" / "bases" / f"{BASES[0]}.yaml"
        base.write_text(base.read_text().replace("group_size: 128", "group_size: 64"))
        holds.append(report("doit diff, a third of the recipes changed", timed(diff, root, arguments.repeat), LIMIT_S))
        base.write_text(base.read_text().replace("group_size: 64", "group_size: 128"))
        common = root / "recipes" / "bases" / "common.yaml"
        common.write_text(COMMON.replace("0.4", "0.5"))
        holds.append(report("doit diff, all of them changed", timed(diff, root, arguments.repeat), LIMIT_S))
        return 0 if all(holds) else 1
    finally:
        if arguments.keep:
            print(f"kept: {root}")
        else:
            shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(main())
