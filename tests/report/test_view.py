"""Where two answers part, and what calibration's files say of outliers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from buildsys.architecture import SITES
from buildsys.errors import BuildError
from buildsys.quant.observe import load_stats
from buildsys.report.view import Generation, generations, outliers
from buildsys.store import Store


@pytest.mark.parametrize(
    ("source", "quantized", "at"),
    [
        ("same", "same", None),
        ("", "", None),
        ("in the sea", "in the deep", 7),
        ("he walked on", "he walks on", 3),
        ("one two three", "one two", 7),
        ("", "a", 0),
        ("它是最大的动物", "它是最小的动物", 3),
        ("cafe\u0301 x", "cafe\u0300 x", 0),
    ],
)
def test_answers_part_at_a_word(source: str, quantized: str, at: int | None) -> None:
    assert Generation("?", source, quantized).first_difference == at


@given(st.text("ab \u0301动", max_size=12), st.text("ab \u0301动", max_size=12))
def test_what_is_not_marked_is_equal(source: str, quantized: str) -> None:
    at = Generation("?", source, quantized).first_difference
    if at is None:
        assert source == quantized
    else:
        assert source[:at] == quantized[:at] and source[at:] != quantized[at:]


def test_answers_are_read_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "generations.json"
    path.write_text(json.dumps([{"prompt": "p", "source": "動", "quantized": ""}]), encoding="utf-8")
    assert generations(path) == (Generation("p", "動", ""),)
    for wrong in ("[1]", '[{"prompt": "p"}]', "{", "3"):
        path.write_text(wrong)
        with pytest.raises(BuildError, match="is no list of prompt, source and quantized"):
            generations(path)


def test_outliers_are_those_of_the_whole_statistics(tiny: Path) -> None:
    store = Store(tiny / "artifacts")
    step = next(step for step in runs.planned(tiny, "tiny").steps if step.kind == "calibrate")
    artifact = store.walk(step.walk())[step.planned_key].artifact
    assert artifact is not None
    files = {name: store.path(artifact, name) for name in artifact.files}
    found = outliers(files)
    assert [(each.layer, each.site) for each in found] == [(layer, site) for layer in range(2) for site in SITES]
    for each in found:
        stats = load_stats(files[f"block-{each.layer:05d}.safetensors"])[each.site]
        typical = float(stats.absmean.double().mean())
        assert each.largest == pytest.approx(float(stats.absmax.max()) / typical, rel=1e-6)
        assert each.channel == pytest.approx(float(stats.absmean.max()) / typical, rel=1e-6)
        assert each.largest >= each.channel >= 1


def test_a_site_that_is_always_zero_is_no_number(tmp_path: Path) -> None:
    import numpy as np

    path = tmp_path / "block-00003.safetensors"
    save_file({f"{site}.{part}": np.zeros(4, np.float32) for site in SITES for part in ("absmean", "absmax")}, path)
    found = outliers({path.name: path, "notes.txt": tmp_path / "absent"})
    assert {each.layer for each in found} == {3} and all(each.largest != each.largest for each in found)


def test_a_damaged_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    import numpy as np

    path = tmp_path / "blob"
    save_file({"attn_in.absmean": np.ones((2, 2), np.float32)}, path)
    with pytest.raises(BuildError, match=r"block-00000\.safetensors  holds no float32 vector attn_in\.absmean"):
        outliers({"block-00000.safetensors": path})
    path.write_bytes(b"no tensors")
    with pytest.raises(BuildError, match=r"block-00000\.safetensors"):
        outliers({"block-00000.safetensors": path})
