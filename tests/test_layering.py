"""Imports point down, torch waits until it is needed, and every file of a slot folder offers what its slot promises."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel

from buildsys.slots import SLOTS, Frozen, modules

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "buildsys"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "console", "measurement", "scheme", "gpus", "slots", "step"),
    ("architecture", "digests", "disk", "document", "deploy", "located", "locktext", "lockfile", "longrope", "relayout", "waking"),
    ("bytecode", "hashing", "store", "overlay", "locked", "footprint", "effort", "remedies"),
    ("io", "complaints"),
    ("hubs", "serving"),
    ("quant",),
    ("lite",),
    SLOTS,
    ("recipe", "survey"),
    ("linears", "deployment", "misfits"),
    ("workspace", "finder", "graph", "history", "plan"),
    ("recipe_schema", "outlook", "verdict", "trials", "steps", "worker", "workers", "early"),
    ("release",),
    ("lock", "toolchain", "locking"),
    ("causes", "unequal", "reference"),
    ("report",),
    ("review",),
    ("driver", "publishing"),
    ("versions", "fleet", "impact", "relock", "actions", "pages", "live", "reproduce", "invocation"),
    ("reporter",),
    ("tasks", "cli"),
    ("commands", "__main__"),
)
"""A part imports from the rows above its own, and inside a row from parts to its left. A new file gets a place here, as high as it can."""

HEAVY = ("torch", "transformers", "lmdeploy", "huggingface_hub", "openai", "gradio")
RANK = {part: (row, column) for row, parts in enumerate(LAYERS) for column, part in enumerate(parts)}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name(path: Path) -> str:
    """Dotted, without the package: "io.headers"; "" for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imports(tree: ast.AST, at_import: bool = True) -> Iterator[tuple[str, bool]]:
    """Every imported module's dotted name, and whether importing the file imports it (no function, no TYPE_CHECKING around it)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "imports are absolute"
            # `from buildsys.io import headers` imports a module, `from buildsys.step import Step` what is in one.
            below = PACKAGE.parent.joinpath(*node.module.split("."))
            for alias in node.names:
                whole = (below / alias.name).with_suffix(".py").exists() or (below / alias.name).is_dir()
                yield (f"{node.module}.{alias.name}" if whole else node.module), at_import
        else:
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if isinstance(node, ast.If) and typing_only:
                yield from imports(ast.Module(node.body, []), False)
                yield from imports(ast.Module(node.orelse, []), at_import)
            else:
                inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from imports(node, at_import and not inside)


def ours(path: Path) -> Iterator[str]:
    """Parts of buildsys that a file imports anywhere, types and functions too: an arrow up is one wherever it is written."""
    for imported, _ in imports(ast.parse(path.read_text())):
        if imported.startswith("buildsys."):
            yield imported.removeprefix("buildsys.")


def test_every_part_has_a_place() -> None:
    parts = {name(path).partition(".")[0] for path in files()} - {""}
    assert parts == set(RANK)


@pytest.mark.parametrize("path", files(), ids=lambda path: name(path) or "buildsys")
def test_imports_point_down(path: Path) -> None:
    mine = name(path).partition(".")[0]
    if not mine:
        assert list(ours(path)) == []
        return
    for imported in ours(path):
        part = imported.partition(".")[0]
        slot_base = part == mine and mine in SLOTS and imported == mine  # publishers/x.py takes Receipt from publishers
        assert part in RANK, f"{imported} is no part of buildsys"
        assert (part == mine and mine not in SLOTS) or slot_base or RANK[part] < RANK[mine], (
            f"{name(path)} imports {imported}, which is above it"
        )


@pytest.mark.parametrize("slot", SLOTS)
def test_slots_never_import_each_other(slot: str) -> None:
    for path in (PACKAGE / slot).glob("*.py"):
        others = [imported for imported in ours(path) if imported.partition(".")[0] in SLOTS and imported != slot]
        assert not others, f"{name(path)} imports {others}"


@pytest.mark.parametrize("path", files(), ids=lambda path: name(path) or "buildsys")
def test_heavy_packages_are_imported_late(path: Path) -> None:
    computes = name(path).startswith(("io.", "quant.")) and name(path) != "io.headers"
    for imported, at_import in imports(ast.parse(path.read_text())):
        top = imported.partition(".")[0]
        measured_beside = name(path) == "serving.plain_transformers"  # runs in LMDeploy's Python, and is what others compute with
        assert top != "transformers" or measured_beside, "the product computes with its own code; transformers is the tests' oracle"
        assert top not in HEAVY or not at_import or computes, f"{name(path)} imports {imported} whenever it is imported"
        assert top != "doit" or name(path) in ("tasks", "reporter", "commands"), "doit is known to these three alone"


def test_planning_never_loads_torch() -> None:
    slots = [f"buildsys.{slot}.{choice}" for slot in SLOTS for choice in modules(slot)]
    light = [
        "cli",
        "commands",
        "tasks",
        "workspace",
        "plan",
        "recipe_schema",
        "steps",
        "verdict",
        "outlook",
        "driver",
        "worker",
        "io.headers",
    ]
    code = "import importlib, json, sys\nfor name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
    code += f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    every = json.dumps([*slots, *(f"buildsys.{part}" for part in light)])
    ran = subprocess.run([sys.executable, "-c", code, every], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == []


def test_importing_recipes_never_loads_what_only_builds_need() -> None:
    late = ("torch", "numpy", "safetensors", "rich", "buildsys.store")
    code = f"import buildsys.workspace, sys\nprint([name for name in {late} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_files_say_what_they_are_for() -> None:
    for path in files():
        said = ast.get_docstring(ast.parse(path.read_text()))
        assert said or path.stat().st_size == 0, f"{name(path)} has no first line that says what it is for"


# What a slot's module offers

PROMISED: dict[str, tuple[str, ...]] = {
    "sources": ("locate", "floats"),
    "datasets": ("READS", "PLACES", "floats"),
    "methods": ("KIND", "accepts"),
    "backends": ("TOOL", "READS", "RESUMES", "misfits", "unfit", "ready", "quantize"),
    "formats": (
        *("QUANT_METHOD", "FLOATS", "accepts", "fits", "mixes", "keeps_float", "layout"),
        *("pack", "unpack", "config", "scheme_of", "schemes_of"),
    ),
    "archs": ("HANDLES", "TURBOMIND", "EXPECTS", "describe"),
    "checks": ("READS", "LIMITS", "FIXED", "OPTIONAL", "ALWAYS", "ASIDE", "measure"),
    "publishers": ("destination", "plan", "publish", "verify", "rollback"),
}
CHOICES = [pytest.param(slot, module, id=f"{slot}.{choice}") for slot in SLOTS for choice, module in modules(slot).items()]


@pytest.mark.parametrize(("slot", "module"), CHOICES)
def test_slot_modules_offer_what_the_slot_promises(slot: str, module: ModuleType) -> None:
    assert issubclass(module.Knobs, Frozen) and issubclass(module.Knobs, BaseModel)
    assert module.Knobs.model_config["frozen"] and module.Knobs.model_config["extra"] == "forbid"
    assert type(module.VERSION) is int and module.VERSION >= 1
    missing = [promised for promised in PROMISED[slot] if not hasattr(module, promised)]
    assert not missing, f"{module.__name__} lacks {missing}"
    entries = [promised for promised in PROMISED[slot] if promised.islower()]
    assert all(callable(getattr(module, entry)) for entry in entries)
    if slot == "datasets":
        assert module.READS in ("model", "text", "chat")
        assert callable(module.generate if module.READS == "model" else module.texts) and (
            module.READS == "model" or callable(module.locate)
        )
    if slot == "methods":
        assert module.KIND in ("rescale", "round")
        assert callable(module.rescale) if module.KIND == "rescale" else callable(module.round_weights) and type(module.SEES_TOKENS) is bool
    if slot == "backends":
        assert set(module.READS) <= {"stats", "tokens"} and type(module.RESUMES) is bool and type(module.TOOL) is str
    if slot == "checks":
        assert set(module.READS) <= {"packed", "blocks", "scores", "kv_scores", "served", "source", "plan"} and type(module.ALWAYS) is bool
        assert set(module.LIMITS) <= set(module.Knobs.model_fields)
        assert all(getattr(module.Knobs(), knob) is None for knob in module.LIMITS), "without a limit in the recipe there is no gate"


def test_docstrings_of_slots_name_what_they_promise() -> None:
    for slot, promised in PROMISED.items():
        said = ast.get_docstring(ast.parse((PACKAGE / slot / "__init__.py").read_text())) or ""
        unsaid = [entry for entry in ("Knobs", "VERSION", *promised) if entry not in said]
        assert not unsaid, f"buildsys/{slot}/__init__.py does not say that a module has {unsaid}"
