"""The table of servers: each in its place under its name, what was not measured with its reason, and no number twice on the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from buildsys.measurement import Measurement
from buildsys.release.facts import Facts
from buildsys.report.engines import engines, in_the_table
from buildsys.report.page import page
from buildsys.report.sections import Row
from buildsys.report.view import View

Shown = tuple[Facts, View]


def trial(name: str, **more: Any) -> dict[str, Any]:
    rates = [
        {
            "batch": batch,
            "prompt_tokens": 128,
            "new_tokens": 64,
            "tokens_per_s": [3.0 * batch, batch, 2.0 * batch],
            "first_token_s": [0.02, 0.01, 0.04],
        }
        for batch in (1, 32)
    ]
    made = {"name": name, "engine": "turbomind", "seconds": 1.5, "rates": rates, "vram_bytes": 3 << 30, "loaded_bytes": 2 << 30}
    return {**made, "pool_tokens": 64_000, **more}


def served(*trials: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    host = {"lmdeploy": "0.18.0", "gpus": [["NVIDIA H200", "580.95.05"]]}
    return {"host": host, "source": {"engine": "turbomind"}, "trials": list(trials), **more}


def test_each_server_has_its_line_and_its_name(cached: Shown) -> None:
    names = ("artifact", "plain", "source", "source_kv", "share_0.2")
    found = engines(cached[0], served(*map(trial, names), transformers=trial("transformers", pool_tokens=None)))
    assert found is not None
    assert [line.name for line in found.lines] == ["source", "W4A16", "KV int8", "W4A16 + KV int8", "W4A16 + KV int8", "transformers"]
    assert [line.own for line in found.lines] == [False, False, False, True, False, False]
    assert found.lines[4].told == "max_entry_count 0.2"
    assert {cell.title: (cell.text, cell.spread) for cell in found.lines[3].cells} == {
        "All prompts": ("1.5 s", ""),
        "Tokens/s at 1": ("2", "1 to 3"),
        "Tokens/s at 32": ("64", "32 to 96"),
        "First token": ("20 ms", "at batch 1"),
        "GPU memory": ("3.00 GiB", "2.00 once loaded"),
        "KV cache": ("64,000", "tokens"),
    }
    assert found.titles == tuple(cell.title for cell in found.lines[0].cells)
    assert "NVIDIA H200, driver 580.95.05, LMDeploy 0.18.0" in found.machine


def test_what_was_not_measured_says_why(cached: Shown) -> None:
    told = served(trial("artifact"), transformers={"why": "transformers ended with exit status 1"})
    told["source"] = {"why": "the source model does not fit t4 x 1"}
    found = engines(cached[0], told)
    assert found is not None and [line.name for line in found.lines] == ["source", "W4A16 + KV int8", "transformers"]
    html = page(cached[0], dataclasses.replace(cached[1], served=told))
    assert "not measured: the source model does not fit t4 x 1" in html and "not measured: transformers ended with exit status 1" in html


def test_without_a_server_the_page_says_so(cached: Shown) -> None:
    facts, view = cached
    assert engines(facts, view.served) is None
    assert "verify: {serve: {}}" in page(facts, view)
    skipped = dataclasses.replace(facts, plan=dataclasses.replace(facts.plan, skipped={"serve": "this machine: no CUDA device"}))
    assert "Not measured here: this machine: no CUDA device" in page(skipped, view)


def test_what_stands_in_the_table_stands_there_alone() -> None:
    rows = {name: Row("serve", Measurement.exact(name, 1.0, "x"), ()) for name in ("tokens_per_s_8", "speedup_8", "speedup", "agreement")}
    assert {name for name, row in rows.items() if in_the_table(row)} == {"tokens_per_s_8", "speedup_8"}
