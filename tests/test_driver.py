"""What a run starts before it has anything to run: a child that imports, a GPU that wakes; and what it leaves alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import toy

from buildsys.console import Console
from buildsys.driver import Session, Settings
from buildsys.store import Store

HERE = Path(__file__).parent
LIBRARY = """
#include <stdio.h>
#include <stdlib.h>
static int say(const char *what, int given) {
    FILE *file = fopen(getenv("CUDA_SAID"), "a");
    fprintf(file, "%s %d\\n", what, given);
    fclose(file);
    return getenv(what) ? 100 : 0;  /* CUDA_ERROR_NO_DEVICE */
}
int cuInit(unsigned flags) { return say("cuInit", flags); }
int cuDeviceGet(int *device, int ordinal) { *device = 7; return say("cuDeviceGet", ordinal); }
int cuDevicePrimaryCtxRetain(void **context, int device) { return say("cuDevicePrimaryCtxRetain", device); }
"""
WOKEN = ["cuInit 0", "cuDeviceGet 0", "cuDevicePrimaryCtxRetain 7"]
COMPUTES = {"heavy": True, "computes": True}


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a driver library that writes down what it is asked, and a torch that was built for it."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc here")
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "cuda.c").write_text(LIBRARY)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "cuda.c"], check=True)
    (folder / "torch" / "lib").mkdir(parents=True)
    (folder / "torch" / "__init__.py").touch()
    (folder / "torch" / "lib" / "libtorch_cuda.so").touch()
    (folder / "for cpus" / "torch").mkdir(parents=True)
    (folder / "for cpus" / "torch" / "__init__.py").touch()
    return folder


Open = Callable[..., Session]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Sessions over recipes of toy steps, given as {recipe: steps}."""
    monkeypatch.setattr("buildsys.plan.plan", toy.plan)
    monkeypatch.setattr("buildsys.deployment.needs_engine", lambda recipe: False)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("CUDA_SAID", str(tmp_path / "said"))
    made: list[Session] = []

    def session(device: str = "auto", **recipes: dict[str, Any]) -> Session:
        (tmp_path / "recipes").mkdir(exist_ok=True)
        for name, steps in recipes.items():
            (tmp_path / "recipes" / f"{name}.yaml").write_text(json.dumps({"steps": steps, "artifact": list(steps)[-1]}))
        workspace = toy.Workspace(tmp_path)
        said = Settings.read({"threads": "1", "device": device})
        made.append(Session(workspace, Store(tmp_path / "artifacts"), said, Console(), "toy"))
        return made[-1]

    yield session
    for one in made:
        one.end()


def children() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [child for child in found if child.status() != psutil.STATUS_ZOMBIE]


def test_a_child_begins_where_a_heavy_step_is_missing_and_has_the_step(opened: Open) -> None:
    session = opened(one={"make": {"heavy": True}}, light={"make": {}})
    session.open(["light"])
    session.look()
    assert not children()
    session.open(["one"])
    assert not children()
    session.look()
    (child,) = children()
    for step in session.steps("one"):
        session.build(step)
    assert children() == [child]
    session.end()
    assert not children()


def test_planning_alone_starts_nothing(opened: Open) -> None:
    session = opened(one={"make": {"heavy": True}})
    session.plan(["one"])
    assert not children()


def said(tmp_path: Path, at_least: int = 0) -> list[str]:
    """What the driver library was asked, once it was asked as often, or after a while in which it was not."""
    until = time.monotonic() + (10 if at_least else 0.7)
    while time.monotonic() < until:
        lines = (tmp_path / "said").read_text().splitlines() if (tmp_path / "said").exists() else []
        if at_least and len(lines) >= at_least:
            break
        time.sleep(0.02)
    return lines


@pytest.mark.parametrize(
    ("device", "steps", "wakes"),
    [
        ("auto", {"make": COMPUTES}, True),
        ("cuda", {"read": {"heavy": True}, "make": {**COMPUTES, "needs": {"x": "read"}}}, True),
        ("cpu", {"make": COMPUTES}, False),
        ("auto", {"make": {"heavy": True}}, False),
        ("auto", {"make": {**COMPUTES, "engine": True}}, False),
        ("auto", {"serve": {**COMPUTES, "engine": True}, "make": {**COMPUTES, "needs": {"x": "serve"}}}, False),
    ],
    ids=["computes", "computes later", "on the processor", "computes nothing", "an engine has the gpu", "an engine first"],
)
def test_a_gpu_wakes_for_a_step_that_computes_on_it(
    opened: Open, gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, steps: dict[str, Any], wakes: bool
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(gpu))
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{gpu}")
    session = opened(device, one=steps)
    session.open(["one"])
    session.look()
    assert len(children()) == 1
    assert said(tmp_path, 3 * wakes) == (WOKEN if wakes else [])


def test_a_gpu_that_somebody_has_is_left_alone(opened: Open, gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(gpu))
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{gpu}")
    session = opened(one={"make": COMPUTES})
    with session.store.lock("gpu"):
        session.open(["one"])
        session.look()
        assert said(tmp_path) == []


@pytest.mark.parametrize("missing", ["driver", "device", "torch for it"])
def test_where_there_is_no_gpu_a_step_runs_as_ever(
    opened: Open, gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    if missing != "driver":
        monkeypatch.setenv("LD_LIBRARY_PATH", str(gpu))
    if missing == "device":
        monkeypatch.setenv("cuInit", "fails")
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{gpu / 'for cpus' if missing == 'torch for it' else gpu}")
    session = opened("auto", one={"make": {"heavy": True}, "last": {**COMPUTES, "needs": {"x": "make"}}})
    session.open(["one"])
    session.look()
    session.build(session.steps("one")[0])
    assert said(tmp_path, missing == "device") == (["cuInit 0"] if missing == "device" else [])
