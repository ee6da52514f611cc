"""The action that reviews a pull request: its scripts in a real repository, with a Python that has no more than it installs."""

from __future__ import annotations

import json
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
from githubserver import BOT, GitHub, serving
from packaging.requirements import Requirement
from workflows import ACTIONS, ROOT, Runner, clean, environment

pytestmark = pytest.mark.slow

REQUIREMENTS = ACTIONS / "review" / "requirements.txt"
INSTALL = "Install buildsys as of this action's commit, without what only builds need"


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the action's first step installs, without the network that it takes."""
    return environment(tmp_path_factory.mktemp("light") / "venv", REQUIREMENTS)


@pytest.fixture
def github() -> Iterator[GitHub]:
    with serving() as found:
        yield found


class Repository:
    """A clone with a branch: the recipe `tiny` and a variant of it on main."""

    def __init__(self, folder: Path, light: Path, github: GitHub) -> None:
        self.root = runs.tiny(folder / "clone")
        self.recipe = self.root / "recipes" / "tiny.yaml"
        self.recipe.write_text(self.recipe.read_text() + "matrix:\n  kv8: {kv_cache: {policy: int8}}\n")
        (self.root / ".gitignore").write_text("/artifacts/\n")
        self.git("init", "--quiet", "--initial-branch=main")
        self.commit()
        self.base = self.git("rev-parse", "HEAD")
        self.git("switch", "--quiet", "--create", "change")
        self.runner = Runner(self.root, folder, clean() | github.environment(), {"github.event.pull_request.number": "7"})
        self.github = github
        (folder / "review").mkdir()
        (folder / "review" / "venv").symlink_to(light)

    def git(self, *words: str) -> str:
        line = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words]
        return subprocess.run(line, cwd=self.root, env=clean(), check=True, text=True, capture_output=True).stdout.strip()

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "change")

    def edit(self, old: str, new: str) -> None:
        said = self.recipe.read_text()
        assert old in said
        self.recipe.write_text(said.replace(old, new))
        self.commit()

    def review(self, status: int = 0, **inputs: str) -> dict[str, str]:
        ended, outputs = self.runner.run("review", {INSTALL: "true"}, **({"base": self.base} | inputs))
        assert ended == status and "Traceback" not in self.runner.log, self.runner.log
        return outputs


@pytest.fixture
def repository(tmp_path: Path, light: Path, github: GitHub) -> Repository:
    return Repository(tmp_path, light, github)


def test_what_it_installs_is_a_part_of_what_buildsys_needs(light: Path) -> None:
    declared = {
        Requirement(line).name: Requirement(line)
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    }
    ours = [Requirement(line) for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert [str(one) for one in ours] == [str(declared[one.name]) for one in ours]
    assert "torch" in declared
    said = subprocess.run([light / "bin" / "python", "-c", "import torch"], env=clean(), cwd=light, capture_output=True, text=True)
    assert "No module named 'torch'" in said.stderr, "a command that needs torch would fail in the tests below"


def test_a_change_is_told_in_summary_file_and_comment(repository: Repository) -> None:
    repository.edit("max_nats: 9.0", "max_nats: 9.5")
    outputs = repository.review(comment="true", lock="false")
    text = Path(outputs["file"]).read_text()
    assert "kl.max_nats" in text and "LOOSENED" in text.upper() and repository.runner.summary == text
    assert [one["body"].partition("\n")[2] for one in repository.github.comments] == [text.strip() + "\n"]
    assert json.loads(outputs["builds"]) == json.loads(outputs["publishes"]) == [{"file": "tiny", "recipes": "tiny,tiny@kv8"}]
    assert {one["name"] for one in json.loads(Path(outputs["json"]).read_text())["changes"]} == {"tiny", "tiny@kv8"}
    repository.edit("max_nats: 9.5", "max_nats: 8.0")
    repository.review(comment="true", lock="false")
    assert len(repository.github.comments) == 1 and "TIGHTENED" in repository.github.comments[0]["body"].upper()
    assert repository.github.comments[0]["user"]["login"] == BOT


def test_only_what_changed_is_built_or_what_is_asked_for(repository: Repository) -> None:
    repository.edit("{policy: int8}", "{policy: int4}")
    assert json.loads(repository.review(lock="false")["builds"]) == [{"file": "tiny", "recipes": "tiny@kv8"}]
    repository.recipe.with_name("other.yaml").write_text(runs.TINY.partition("publish:")[0].replace("seed: 0", "seed: 5"))
    repository.commit()
    outputs = repository.review(lock="false", recipes="*")
    assert json.loads(outputs["builds"]) == [{"file": "other", "recipes": "other"}, {"file": "tiny", "recipes": "tiny,tiny@kv8"}]
    assert json.loads(outputs["publishes"]) == [{"file": "tiny", "recipes": "tiny,tiny@kv8"}]
    repository.git("rm", "--quiet", "recipes/tiny.yaml")
    repository.commit()
    assert json.loads(repository.review(lock="false")["builds"]) == [{"file": "other", "recipes": "other"}]


def test_a_mistake_fails_and_stands_in_the_review(repository: Repository) -> None:
    repository.edit("bits: 4", "bits: 5")
    outputs = repository.review(status=1, comment="true", lock="false")
    text = Path(outputs["file"]).read_text()
    assert "### doit check failed" in text and "recipes/tiny.yaml:" in text and "bits" in text
    assert "::error::failed: check" in repository.runner.log and outputs["builds"] == ""
    assert len(repository.github.comments) == 1


def test_what_a_recipe_says_is_no_markdown_of_the_comment(repository: Repository) -> None:
    repository.edit("bits: 4", '"x</details>\\n~~~\\n@team ![](http://a.example/b.png)": 4')
    text = Path(repository.review(status=1, lock="false")["file"]).read_text()
    failed = text.partition("### doit check failed\n\n")[2].partition("\n\n")[0]
    assert failed and all(line.startswith("    ") for line in failed.splitlines())


def test_a_base_that_is_not_there(repository: Repository) -> None:
    outputs = repository.review(status=1, base="nowhere", lock="false")
    text = Path(outputs["file"]).read_text()
    assert "### doit diff failed" in text and "nowhere" in text and "fix:" in text
    assert "::error::failed: diff" in repository.runner.log


def test_a_workspace_below_the_repository(repository: Repository, tmp_path: Path) -> None:
    below = repository.root / "models"
    below.mkdir()
    for name in ("recipes", "dodo.py", "pyproject.toml"):
        shutil.move(repository.root / name, below / name)
    repository.commit()
    base = repository.git("rev-parse", "HEAD")
    repository.recipe = below / "recipes" / "tiny.yaml"
    repository.edit("max_nats: 9.0", "max_nats: 9.5")
    text = Path(repository.review(base=base, working_directory="models", lock="false", comment="true")["file"]).read_text()
    assert "kl.max_nats" in text
    assert repository.github.comments[0]["body"].startswith("<!-- buildsys: review of models -->")


def test_a_stale_lock_fails_and_stands_in_the_review(repository: Repository) -> None:
    doit = repository.runner.temp / "review" / "venv" / "bin" / "doit"
    subprocess.run([doit, "lock", "recipe=tiny*"], cwd=repository.root, env=clean(), check=True, capture_output=True)
    repository.commit()
    assert Path(repository.review()["file"]).read_text().count("failed") == 0
    repository.edit("seed: 0", "seed: 1")
    outputs = repository.review(status=1)
    text = Path(outputs["file"]).read_text()
    assert "### doit lock --check failed" in text and "recipes/tiny.lock" in text and "doit lock recipe=" in text
    assert "::error::failed: lock" in repository.runner.log
    assert json.loads(outputs["builds"]) == [{"file": "tiny", "recipes": "tiny,tiny@kv8"}]
