"""What is made ready while torch is imported. The GPU's part is in test_driver.py, with a driver library of our own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WAKES = "from buildsys.waking import wake_triton; wake_triton(); import sys; print('torch' in sys.modules)"


@pytest.mark.parametrize("place", ["runtime/cache.py", "compiler/compiler.py", None])
def test_triton_is_asked_for_its_key_wherever_it_keeps_it(place: str | None, tmp_path: Path) -> None:
    """Of a package laid out as Triton's: CPU builds of torch bring none."""
    package, asked = tmp_path / "triton", tmp_path / "asked"
    for folder in (package, package / "runtime", package / "compiler"):
        folder.mkdir()
        (folder / "__init__.py").touch()
    for file in ("runtime/cache.py", "compiler/compiler.py"):
        key = f"def triton_key():\n    open({str(asked)!r}, 'a').write('x')\n"
        (package / file).write_text(key if file == place else "")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    said = subprocess.run([sys.executable, "-c", WAKES], env=environment, capture_output=True, text=True, check=True).stdout
    assert said == "False\n" and (asked.read_text() if asked.exists() else "") == ("x" if place else "")


def test_without_triton_nothing_happens(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('no Triton here')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    assert subprocess.run([sys.executable, "-c", WAKES], env=environment, capture_output=True, text=True, check=True).stdout == "False\n"
