"""What a lock alone can tell of why bits differ: the tools that its build was made with, and where it ran."""

from __future__ import annotations

from buildsys.causes import told

NOW = {"versions": {"torch": "2.13.0", "numpy": "2.4.6"}, "machine": {"cpu": "Xeon", "os": "Linux"}, "device": "cpu"}


def test_tools_and_processors_that_differ_are_named() -> None:
    assert told({"torch": "2.12.1", "numpy": "2.4.6", "triton": "3.7"}, "EPYC", NOW) == ("torch 2.12.1 -> 2.13.0", "CPU EPYC -> Xeon")
    assert told({"torch": "2.13.0"}, "Xeon", NOW) == ()


def test_a_gpu_is_what_it_ran_on() -> None:
    now = {**NOW, "device": "cuda", "gpu": {"name": "NVIDIA H200"}}
    assert told({}, "NVIDIA H200", now) == () and told({}, "NVIDIA L4", now) == ("GPU NVIDIA L4 -> NVIDIA H200",)


def test_what_is_not_told_is_no_difference() -> None:
    assert told({}, "", NOW) == () == told({"torch": "2.12.1"}, "", {})
