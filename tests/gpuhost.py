"""A machine that looks as if it had a GPU: an nvidia-smi, and a Python whose LMDeploy computes on the CPU (tests/cpu_lmdeploy.py).

All else is real: processes, ports, HTTP, LMDeploy's server. What no test can see here is TurboMind itself, its speed and its memory.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lmdeployed

NAME, DRIVER, TOTAL_MIB = "NVIDIA H200", "580.95.05", 143771
FREE_MIB = 1000  # that engines share out
CPU_LMDEPLOY = Path(__file__).resolve().parent / "cpu_lmdeploy.py"

SMI = """#!{python}
import os, pathlib, sys
asked = next(one for one in sys.argv if one.startswith("--query-gpu=")).partition("=")[2].split(",")
used = sum(int(path.read_text()) for path in pathlib.Path({memory!r}).iterdir() if os.path.exists("/proc/" + path.name))
known = {{"index": "0", "uuid": "GPU-0", "name": {name!r}, "driver_version": {driver!r}, "memory.total": "{total}"}}
known["memory.used"] = str(500 + used)
print(", ".join(known.get(one, "[N/A]") for one in asked))
"""
PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m lmdeploy" ]; then shift 2; exec "{python}" -P "{lmdeploy}" "$@"; fi
exec "{python}" "$@"
"""


def environment(folder: Path, name: str = NAME) -> dict[str, str]:
    """What to run a command with, so that it finds itself on a machine with one GPU. Skips the test where there is no LMDeploy."""
    bin, memory = folder / "bin", folder / "memory"
    bin.mkdir(parents=True)
    memory.mkdir()
    smi = SMI.format(python=sys.executable, memory=str(memory), name=name, driver=DRIVER, total=TOTAL_MIB)
    for path, text in ((bin / "nvidia-smi", smi), (bin / "python", PYTHON.format(python=lmdeployed.python(), lmdeploy=CPU_LMDEPLOY))):
        path.write_text(text)
        path.chmod(0o755)
    return {
        "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
        "BUILDSYS_LMDEPLOY": str(bin / "python"),
        "GPUHOST": str(memory),
        "GPUHOST_FREE_MIB": str(FREE_MIB),
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "1",
    }
