"""What `doit diff` costs over a fleet of recipes against a base that changed one shared file, in a repository made for the purpose.

Run: python benchmarks/review.py [--recipes 1000] [--repeat 3] [--keep]
Prints the median and the least seconds, and their ratio to the limit: of a file that a third of the recipes share, and of one that all do,
without locks and with a lock beside every recipe, first as `doit lock` writes it and then with a build in it, which is made up; and of a
check of the locks. Claim, with 1,000 recipes: each at most 4 s. Exit 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fleet import BASE, report, timed, workspace

from buildsys.locked import Built, Lock, Locked, Measured

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
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=root, check=True)
    commit(root)


def commit(root: Path) -> None:
    who = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    for arguments in (["add", "-A"], [*who, "commit", "-q", "-m", "a fleet"]):
        subprocess.run(["git", *arguments], cwd=root, check=True)


def built(locked: Locked, salt: str) -> Locked:
    """The lock of a recipe with a build, as large as the demo's; no such build ever ran."""

    def digests(kind: str) -> dict[str, str]:
        return {label: hashlib.sha256(f"{kind} {salt} {label}".encode()).hexdigest() for label in locked.steps}

    checks = [label.removeprefix("measure ") for label in locked.steps if label.startswith("measure ")]
    low = int(salt[-4:]) / 1e5
    ends = {"value": low + 0.01, "low": low, "high": low + 0.02}
    measured = (Measured(check=check, name=name, unit="nats", **ends) for check in checks for name in "ab")
    made = Built(
        artifact=hashlib.sha256(salt.encode()).hexdigest(),
        steps=digests("step"),
        measurements=tuple(sorted(measured, key=lambda one: (one.check, one.name))),
        verdicts=dict.fromkeys(sorted(checks), "passed"),
        on="NVIDIA A100-SXM4-40GB",
        seconds=dict.fromkeys(sorted(locked.steps), 1.5),
        size_bytes=1_000_000,
    )
    tokens = {section: digests("tokens")[f"tokens {section}"] for section in ("calibration", "verify")}
    return locked.model_copy(update={"built": made, "tokens": tokens})


def build(root: Path) -> None:
    """Every lock as it is after a build."""
    for path in (root / "recipes" / "fleet").glob("*.lock"):
        lock = Lock.read(path)
        path.write_text(Lock(recipes={name: built(locked, name) for name, locked in lock.recipes.items()}).text())


def compared(root: Path, title: str, repeat: int) -> bool:
    """A diff as the tree is, and with each of two shared files changed."""
    diff = [sys.executable, "-m", "doit", "diff", "base=main", "format=markdown", "device=cpu"]
    bases = root / "recipes" / "bases"
    changes = {
        "nothing changed": (bases / "common.yaml", "0.4", "0.4"),
        "a third changed": (bases / f"{BASES[0]}.yaml", "group_size: 128", "group_size: 64"),
        "all changed": (bases / "common.yaml", "0.4", "0.5"),
    }
    holds = []
    for name, (path, old, new) in changes.items():
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        holds.append(report(f"doit diff, {title}, {name}", timed(diff, root, repeat), LIMIT_S))
        path.write_text(text)
    return all(holds)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipes", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="leave the repository, and say where it is")
    arguments = parser.parse_args()
    doit = [sys.executable, "-m", "doit"]
    root = Path(tempfile.mkdtemp(prefix="buildsys-review-"))
    try:
        repository(root, arguments.recipes)
        print(f"{arguments.recipes} recipes, {arguments.repeat} runs each, {os.cpu_count()} CPUs, Python {sys.version.partition(' ')[0]}")
        holds = [compared(root, "no locks", arguments.repeat)]
        print(f"{'doit lock recipe=*':44} {'':6} {timed([*doit, 'lock', 'recipe=*'], root, 1)[0]:7.3f} s")
        commit(root)
        holds.append(report("doit lock --check", timed([*doit, "lock", "--check"], root, arguments.repeat), LIMIT_S))
        holds.append(compared(root, "locks", arguments.repeat))
        build(root)
        commit(root)
        holds.append(compared(root, "locks with builds", arguments.repeat))
        return 0 if all(holds) else 1
    finally:
        if arguments.keep:
            print(f"kept: {root}")
        else:
            shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(main())
