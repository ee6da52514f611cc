"""What the documentation shows is so: its recipes load and plan, its tables name every knob, choice and engine that there is.

The examples of docs/quantization.md each change the recipe that stands first there, as its text says. Models are tiny; nothing is built.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, get_args

import models
import pytest
import yaml
from pydantic_core import PydanticUndefined

from buildsys import deployment, gpus, plan
from buildsys.errors import BuildErrors
from buildsys.recipe import KvCache, Mixed, Quantization, Target
from buildsys.serving.settings import ToolCallParser, settings
from buildsys.slots import Choice, modules
from buildsys.store import Store
from buildsys.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TEXT = (ROOT / "docs" / "quantization.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| `([^`]+)` \| (.*) \|$", re.MULTILINE)
ENGINES = {"TurboMind": "turbomind", "LMDeploy's PyTorch engine": "pytorch", "no engine of LMDeploy": "none"}
SIZES: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048}
MODELS: dict[str, dict[str, Any]] = {"llama": {}, "internlm2": {}, "qwen3_moe": {"moe_intermediate_size": 128}}

FRAME, *EXAMPLES = BLOCK.findall(TEXT)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, text and the shipped bases."""
    recipes = tmp_path_factory.mktemp("docs") / "recipes"
    shutil.copytree(ROOT / "recipes" / "bases", recipes / "bases")
    for name, config in MODELS.items():
        models.FAMILIES[name](recipes / name, **SIZES, **config)
    (recipes / "llama").rename(recipes / "model")
    for name in ("ours", "held-out"):
        (recipes / f"{name}.txt").write_text(models.prose(10, seed=len(name)))
    return recipes.parent


def planned(workspace: Path, example: str) -> plan.Plan:
    """The plan of the first recipe with an example's lines in the place of its own."""
    (workspace / "recipes" / "shown.yaml").write_text(yaml.safe_dump(yaml.safe_load(FRAME) | yaml.safe_load(example), sort_keys=False))
    return plan.plan(Workspace(workspace).load("shown"), Store(workspace / "artifacts"))


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 10


@pytest.mark.parametrize("example", [FRAME, *EXAMPLES], ids=range(len(EXAMPLES) + 1))
def test_an_example_plans_for_the_engine_that_it_names(example: str, workspace: Path) -> None:
    named = example.partition("\n")[0].removeprefix("# ").partition(";")[0]
    made = planned(workspace, example)
    assert deployment.engine(made.recipe, made.survey)[0] == ENGINES[named]


def test_an_example_may_fail(workspace: Path) -> None:
    with pytest.raises(BuildErrors, match="matches no linear"):
        planned(workspace, "quantization: {skip: [lm_head, downproj]}")


def test_every_knob_stands_there_with_its_default() -> None:
    knobs: dict[str, Any] = {f"quantization.{name}": field for name, field in Quantization.model_fields.items()}
    knobs |= {f"mixed.{name}": field for name, field in Mixed.model_fields.items()}
    for slot in ("methods", "backends", "formats"):
        for name, module in modules(slot).items():
            own = {f"{name}.{field.alias or key}": field for key, field in module.Knobs.model_fields.items()}
            knobs |= own if slot != "formats" else dict.fromkeys(own)
    shown = {name: rest.partition(" | ")[0].strip("`") for name, rest in ROW.findall(TEXT)}
    for name, field in knobs.items():
        if field is not None:
            default = field.get_default(call_default_factory=True)
            absent = default is None or default is PydanticUndefined
            assert name in shown and shown[name] == ("none" if absent else written(default)), name
    assert {name.partition(".")[2] for name, field in knobs.items() if field is None} == {"as"}, "formats have one knob, shown for awq"
    assert {name for name in shown if "." in name} == {name for name, field in knobs.items() if field is not None} | {"awq.as"}


def written(value: Any) -> str:
    """A default as a recipe would say it."""
    plain = list(value) if isinstance(value, tuple) else value.name if isinstance(value, Choice) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()


def test_the_table_of_formats_is_that_of_the_engines() -> None:
    shown = {name: rest.split(" | ") for name, rest in ROW.findall(TEXT) if name in modules("formats")}
    assert set(shown) == set(modules("formats"))
    in_short = dict(ROW.findall(README))
    for name, (_, turbomind, pytorch, _) in shown.items():
        reads = {engine: engine in gpus.SUPPORT[name] for engine in gpus.ENGINES}
        assert reads == {"turbomind": turbomind != "–", "pytorch": pytorch != "–"}, name
        assert reads == {"turbomind": "TurboMind" in in_short[name], "pytorch": "PyTorch engine" in in_short[name]}, name


def test_the_readme_names_every_choice() -> None:
    for slot in ("methods", "formats"):
        assert [name for name in modules(slot) if f"`{name}`" not in README] == []
    spelled = README.lower().replace("-", "").replace(" ", "")
    assert [name for name in modules("archs") if name.replace("_", "") not in spelled] == []


def test_the_readmes_recipe_loads(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recipes" / "bases", tmp_path / "recipes" / "bases")
    (block,) = BLOCK.findall(README)
    (tmp_path / "recipes" / "my-model.yaml").write_text(block)
    workspace = Workspace(tmp_path)
    assert workspace.check() == [] and list(workspace.names()) == ["my-model", "my-model@g64"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


# docs/serving.md


def test_what_a_target_says_stands_there_with_what_it_becomes(workspace: Path) -> None:
    served = (ROOT / "docs" / "serving.md").read_text()
    example, verified = BLOCK.findall(served)
    assert yaml.safe_load(verified)["verify"]["serve"].keys() <= modules("checks")["serve"].Knobs.model_fields.keys()
    models.tiny_llama(workspace / "recipes" / "short", **SIZES)
    made = planned(workspace, f"{example}\nsource: {{local: {{path: short}}}}")
    knobs, a = made.artifact.knobs, made.survey.architecture
    assert knobs["engine"] == "turbomind" and a.max_positions == 2048
    decided = settings("turbomind", "awq", knobs["kv_cache"], knobs["target"], a.max_positions, a.rope)
    shown = {name: rest.split(" | ") for name, rest in ROW.findall(served) if "." in name}
    fields = {
        f"{section}.{name}": field
        for section, model in (("kv_cache", KvCache), ("target", Target))
        for name, field in model.model_fields.items()
    }
    assert set(shown) == set(fields)
    for name, field in fields.items():
        absent = field.is_required() or field.default is None
        assert shown[name][0].strip("`") == ("none" if absent else written(field.default)), name
    assert {row[1].strip("`") for row in shown.values()} - {"–"} == set(decided.engine) - {"dtype", "model_format"}
    assert set(get_args(ToolCallParser)) <= set(re.findall(r"`([^`]+)`", served.partition("## Tool calls")[2]))
