"""What is missing to run an engine is one thing at a time, with the command that mends it. nvidia-smi is a program of the test's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from buildsys.errors import BuildError
from buildsys.serving import host
from buildsys.serving.host import Device

ROWS = """0, GPU-aaaa-1, NVIDIA H200, 570.124.06, 143771
1, GPU-bbbb-2, NVIDIA A10, 570.124.06, 23028
"""
USED = ROWS.replace("143771", "1000").replace("23028", "24")
H200, A10 = (Device("NVIDIA H200", "570.124.06", 143771 << 20), Device("NVIDIA A10", "570.124.06", 23028 << 20))


def program(path: Path, body: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two GPUs."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv(host.INTERPRETER, raising=False)
    return program(tmp_path / "bin" / "nvidia-smi", f'case "$1" in *used*) printf "{USED}";; *) printf "{ROWS}";; esac')


def interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> Path:
    path = program(tmp_path / "bin" / "python-of-lmdeploy", says)
    monkeypatch.setenv(host.INTERPRETER, str(path))
    return path


def test_gpus_and_version(smi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = interpreter(tmp_path, monkeypatch, "echo 0.18.0+cu130")
    assert host.look() == host.Host(str(python), "0.18.0+cu130", (H200, A10))
    assert host.memory_used() == 1024 << 20


@pytest.mark.parametrize(
    ("shown", "found"),
    [("0", (H200,)), ("1", (A10,)), ("1,0", (A10, H200)), ("GPU-bbbb", (A10,)), ("1,7,0", (A10,)), ("0, 1", (H200, A10)), ("1,1", (A10,))],
)
def test_devices_are_those_that_cuda_shows(smi: Path, monkeypatch: pytest.MonkeyPatch, shown: str, found: tuple[Device, ...]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert host.devices() == found


def test_a_gpu_in_slices_is_another_one(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(smi, 'echo "0, GPU-a, NVIDIA H200, 570, 143771, Enabled"; echo "1, GPU-b, NVIDIA H200, 570, 143771, Disabled"')
    assert [device.name for device in host.devices()] == ["NVIDIA H200 in MIG slices", "NVIDIA H200"]


@pytest.mark.parametrize("shown", ("", "-1", "7", "MIG-1", "GPU-"))
def test_hidden_devices(smi: Path, monkeypatch: pytest.MonkeyPatch, shown: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    with pytest.raises(BuildError, match=f"no CUDA device; the machine has 2 and CUDA_VISIBLE_DEVICES={shown} shows none") as caught:
        host.look()
    assert "unset CUDA_VISIBLE_DEVICES" in caught.value.fix


@pytest.mark.parametrize(
    ("says", "what"),
    [
        ("echo 'NVIDIA-SMI has failed'; exit 9", "no CUDA device: nvidia-smi says: NVIDIA-SMI has failed"),
        ("exit 9", "no CUDA device: nvidia-smi says: exit status 9"),
        ("echo 'No devices were found'", "no CUDA device"),
        ("echo 0, GPU-1, T4, 1, unknown", "says what is not known here: 0, GPU-1, T4, 1, unknown"),
    ],
)
def test_a_driver_that_fails(smi: Path, says: str, what: str) -> None:
    program(smi, says)
    with pytest.raises(BuildError) as caught:
        host.look()
    assert caught.value.what == what


def test_a_driver_that_hangs(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(smi, "exec sleep 60")
    monkeypatch.setattr(host, "WAIT_S", 0.2)
    with pytest.raises(BuildError, match=r"gave no answer within 0\.2 s"):
        host.look()


def test_no_driver_is_one_line_and_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError) as caught:
        host.look()
    assert "no CUDA device" in caught.value.what and "pip install 'buildsys[lmdeploy]'" in caught.value.fix
    assert "\n" not in caught.value.what + caught.value.fix


@pytest.mark.parametrize(
    ("says", "what"),
    [
        ("exit 1", "has no lmdeploy"),
        ("echo 0.17.2", f"has lmdeploy 0.17.2; an artifact's settings are for {host.WANTED}"),
        ("echo 0.19.0rc1", f"has lmdeploy 0.19.0rc1; an artifact's settings are for {host.WANTED}"),
    ],
)
def test_an_interpreter_without_the_right_lmdeploy(
    smi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, what: str
) -> None:
    python = interpreter(tmp_path, monkeypatch, says)
    with pytest.raises(BuildError) as caught:
        host.look()
    assert (caught.value.where, caught.value.what) == (f"{host.INTERPRETER}={python}", what)
    assert caught.value.fix == f"{python} -m pip install '{host.WANTED}'"


def test_no_interpreter(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(host.INTERPRETER, "/no/python")
    with pytest.raises(BuildError, match="cannot be run: No such file or directory"):
        host.look()


def test_this_python_without_lmdeploy(smi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(program(tmp_path / "bin" / "python", "exit 1")))
    with pytest.raises(BuildError) as caught:
        host.look()
    assert (caught.value.where, caught.value.fix) == ("this Python", "pip install 'buildsys[lmdeploy]'")


@pytest.mark.skipif(not os.environ.get(host.INTERPRETER), reason=f"{host.INTERPRETER} names no python with lmdeploy")
def test_the_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin" / "nvidia-smi", f'printf "{ROWS}"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert host.look().lmdeploy.startswith("0.18")
