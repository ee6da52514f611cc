"""What this machine has to run LMDeploy's engines with: GPUs, their driver, an interpreter that has lmdeploy.

GPUs are what nvidia-smi says and CUDA_VISIBLE_DEVICES shows (CUDA C Programming Guide, environment variables). Nothing here needs torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass

from buildsys.errors import BuildError

INTERPRETER = "BUILDSYS_LMDEPLOY"
"""Environment: a python that has lmdeploy, where it is not installed beside buildsys."""

WANTED = "lmdeploy>=0.18,<0.19"
LINE = (0, 18)  # of versions: the engines' settings are written for these
WAIT_S = 60  # for a driver that wakes a GPU, or an interpreter on a slow disk
QUERY = ("index", "uuid", "name", "driver_version", "memory.total")
MIG = "mig.mode.current"
_VERSION = "import importlib.metadata as metadata; print(metadata.version('lmdeploy'))"


@dataclass(frozen=True)
class Device:
    """One GPU that an engine started here would see."""

    name: str
    driver: str
    memory_bytes: int


@dataclass(frozen=True)
class Host:
    """Everything that an engine needs of a machine."""

    python: str
    lmdeploy: str  # its version
    devices: tuple[Device, ...]


def look() -> Host:
    """What is here. Raises BuildError that names the one thing that is missing, and what installs it."""
    found = devices()
    python = os.environ.get(INTERPRETER) or sys.executable
    return Host(python, _version(python), found)


def devices() -> tuple[Device, ...]:
    """The GPUs, in the order in which CUDA counts them. Raises BuildError where there is none."""
    rows = [Row.read(line) for line in _smi(f"--query-gpu={','.join((*QUERY, MIG))}").splitlines() if line.strip()]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = _visible(rows, shown) if shown is not None else rows
    if not chosen:
        hidden = f"; the machine has {len(rows)} and CUDA_VISIBLE_DEVICES={shown} shows none of them" if rows else ""
        fix = "unset CUDA_VISIBLE_DEVICES, or name one of `nvidia-smi -L` in it" if rows else _NEEDS_GPU
        raise BuildError("this machine", f"no CUDA device{hidden}", fix)
    return tuple(row.device for row in chosen)


def memory_used() -> int:
    """Bytes that are in use on the visible GPUs together, by whatever process."""
    return sum(memory_each())


def memory_each() -> tuple[int, ...]:
    """Bytes that are in use on each visible GPU, by whatever process."""
    rows = [Row.read(line) for line in _smi(f"--query-gpu={','.join(QUERY[:-1])},memory.used").splitlines() if line.strip()]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(row.device.memory_bytes for row in (_visible(rows, shown) if shown is not None else rows))


@dataclass(frozen=True)
class Row:
    """A GPU as nvidia-smi lists it."""

    index: str
    uuid: str
    device: Device

    @classmethod
    def read(cls, line: str) -> Row:
        *parts, sliced = line.split(", ") if line.count(", ") == len(QUERY) else (*line.split(", "), "")
        if len(parts) != len(QUERY) or not parts[4].isdecimal():
            raise BuildError(
                "nvidia-smi", f"says what is not known here: {line}", "look at `nvidia-smi` on this machine; update its driver"
            )
        index, uuid, name, driver, mebibytes = parts
        if sliced.strip() == "Enabled":  # a process gets a slice, of which nvidia-smi tells nothing here: it is not that GPU
            name = f"{name} in MIG slices"
        return cls(index, uuid, Device(name, driver, int(mebibytes) << 20))


_NEEDS_GPU = f"run this on a machine with an NVIDIA GPU and its driver, where `pip install 'buildsys[lmdeploy]'` installs {WANTED}"


def _smi(query: str) -> str:
    """What nvidia-smi answers, one line for each GPU."""
    try:
        said = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=WAIT_S, check=False
        )
    except (FileNotFoundError, PermissionError):
        raise BuildError("this machine", "no CUDA device: it has no nvidia-smi, the program of NVIDIA's driver", _NEEDS_GPU) from None
    except subprocess.TimeoutExpired:
        fix = "look at `nvidia-smi` and the kernel's log; a GPU in this state often needs a restart of the machine"
        raise BuildError("nvidia-smi", f"gave no answer within {WAIT_S} s", fix) from None
    if said.returncode != 0:
        text = " ".join((said.stdout + said.stderr).split()) or f"exit status {said.returncode}"
        raise BuildError("this machine", f"no CUDA device: nvidia-smi says: {text}", _NEEDS_GPU)
    return "" if said.stdout.startswith("No devices") else said.stdout


def _visible(rows: list[Row], shown: str) -> list[Row]:
    """Those that the variable names by index or by the beginning of a UUID; like CUDA, none after a name that is no GPU's, or that was
    there before."""
    found: list[Row] = []
    for name in (part.strip() for part in shown.split(",")):
        uuid = len(name) > 4 and name.startswith("GPU-")
        row = next((row for row in rows if row.index == name or (uuid and row.uuid.startswith(name))), None)
        if row is None or row in found:
            break
        found.append(row)
    return found


def _version(python: str) -> str:
    """Of the interpreter's lmdeploy; refused where these settings are not for it."""
    ours = python == sys.executable
    fix = "pip install 'buildsys[lmdeploy]'" if ours else f"{python} -m pip install '{WANTED}'"
    try:
        said = subprocess.run([python, "-c", _VERSION], capture_output=True, text=True, timeout=WAIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        text = "does not answer" if isinstance(error, subprocess.TimeoutExpired) else f"cannot be run: {error.strerror}"
        raise BuildError(f"{INTERPRETER}={python}", text, "name a python that has lmdeploy, or unset it") from None
    where = "this Python" if ours else f"{INTERPRETER}={python}"
    version = said.stdout.strip()
    if said.returncode != 0 or not version:
        raise BuildError(where, "has no lmdeploy", fix)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers != LINE:
        raise BuildError(where, f"has lmdeploy {version}; an artifact's settings are for {WANTED}", fix)
    return version
