"""The hooks as pre-commit runs them before a commit, and the example files: what they name is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import yaml
from workflows import ROOT, clean

pytestmark = pytest.mark.slow

PRE_COMMIT = [sys.executable, "-m", "pre_commit"]
HOOKS = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
EXAMPLES = ROOT / "docs" / "examples"


class Clone:
    def __init__(self, folder: Path) -> None:
        self.root = runs.tiny(folder / "clone")
        self.environment = clean() | {"PYTHONPATH": str(ROOT), "PRE_COMMIT_HOME": str(folder / "cache")}
        (self.root / ".gitignore").write_text("/artifacts/\n")
        # `system`: the tests' own Python, where pre-commit would install buildsys into an environment of its own.
        here = [hook | {"language": "system", "entry": hook["entry"].replace("python", sys.executable, 1)} for hook in HOOKS]
        (self.root / ".pre-commit-config.yaml").write_text(yaml.safe_dump({"repos": [{"repo": "local", "hooks": here}]}))
        self.run("git", "init", "--quiet")
        self.run(*PRE_COMMIT, "install")

    def run(self, *line: str, status: int | None = 0) -> str:
        ran = subprocess.run(line, cwd=self.root, env=self.environment, text=True, capture_output=True, timeout=120)
        assert status is None or ran.returncode == status, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    def commit(self, status: int = 0) -> str:
        self.run("git", "add", "--all")
        return self.run("git", "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "--message", "change", status=status)


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_the_manifest_is_one() -> None:
    said = subprocess.run([*PRE_COMMIT, "validate-manifest", ROOT / ".pre-commit-hooks.yaml"], env=clean(), capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
    assert {hook["id"] for hook in HOOKS} == {"buildsys-check", "buildsys-lock"}
    assert all(hook["language"] == "python" and hook["files"] == "^recipes/" and not hook["pass_filenames"] for hook in HOOKS)


def test_a_mistake_stops_the_commit_and_says_where(clone: Clone) -> None:
    said = clone.commit()
    assert "recipes are valid" in said and "Passed" in said
    recipe = clone.root / "recipes" / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("bits: 4", "bits: 5"))
    said = clone.commit(status=1)
    assert "Failed" in said and "recipes/tiny.yaml:" in said and "fix:" in said
    assert clone.run("git", "log", "--oneline").count("\n") == 1


def test_a_stale_lock_stops_the_commit(clone: Clone) -> None:
    clone.run(sys.executable, "-m", "buildsys", "lock", "tiny")
    assert "locks are current" in clone.commit()
    recipe = clone.root / "recipes" / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 0", "seed: 1"))
    said = clone.commit(status=1)
    assert "Failed" in said and "doit lock recipe=tiny" in said
    clone.run(sys.executable, "-m", "buildsys", "lock", "tiny")
    clone.commit()


def test_a_commit_of_something_else_is_not_held_up(clone: Clone) -> None:
    clone.commit()
    (clone.root / "notes.txt").write_text("a")
    assert clone.commit().count("Skipped") == len(HOOKS)


def test_the_examples_config_names_our_hooks(tmp_path: Path) -> None:
    text = (EXAMPLES / "pre-commit-config.yaml").read_text()
    (repository,) = yaml.safe_load(text)["repos"]
    assert [hook["id"] for hook in repository["hooks"]] == [hook["id"] for hook in HOOKS]
    alone = "repos:\n" + "\n".join(line.removeprefix("#") for line in text.splitlines() if line.startswith("#  "))
    (local,) = yaml.safe_load(alone)["repos"]
    for ours, shown in zip(HOOKS, local["hooks"], strict=True):
        assert {key: ours[key] for key in ("id", "name", "entry", "files", "pass_filenames")} == {
            key: shown[key] for key in shown if key != "language"
        }
    for number, said in enumerate((text, alone)):
        (tmp_path / f"{number}.yaml").write_text(said)
        ran = subprocess.run([*PRE_COMMIT, "validate-config", tmp_path / f"{number}.yaml"], env=clean(), capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_line_of_codeowners_matches_a_file(tmp_path: Path) -> None:
    """CODEOWNERS has gitignore's patterns: git itself says what a line matches."""
    lines = [line.split() for line in (EXAMPLES / "CODEOWNERS").read_text().splitlines() if line and not line.startswith("#")]
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True, env=clean())
    files = [str(path.relative_to(ROOT)) for folder in ("recipes", ".github") for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += ["dodo.py", "pyproject.toml", "recipes/demo/demo.lock", "recipes/toolchain.lock"]
    for pattern, *owners in lines:
        assert owners and all(re.fullmatch(r"@my-org/[a-z]+", owner) for owner in owners)
        (tmp_path / ".gitignore").write_text(f"{pattern}\n")
        said = subprocess.run(["git", "check-ignore", "--no-index", *files], cwd=tmp_path, env=clean(), text=True, capture_output=True)
        assert said.stdout, pattern
