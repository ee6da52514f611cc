"""A mistake in a recipe, in the author's words: the line, the key, both values, and what to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from buildsys.complaints import dotted
from buildsys.errors import BuildError
from buildsys.workspace import Workspace

GOOD = """\
schema: 1
source: {local: {path: m}}
calibration: {dataset: {text_files: {paths: [a.txt]}}, samples: 12}
quantization: {bits: 4, method: [awq, gptq]}
format: awq
verify: {text: {text_files: {paths: [b.txt]}}, kl: {max_nats: 0.1}}
"""


def mistakes(tmp_path: Path, text: str) -> list[BuildError]:
    (tmp_path / "recipes").mkdir(exist_ok=True)
    (tmp_path / "recipes/q.yaml").write_text(text)
    return Workspace(tmp_path).check()


def test_the_good_recipe_has_none(tmp_path: Path) -> None:
    assert mistakes(tmp_path, GOOD) == []


@pytest.mark.parametrize(
    ("old", "new", "line", "what", "fix"),
    [
        ("samples: 12", "sample: 12", 3, "calibration.sample is an unknown key", "did you mean samples?"),
        ("samples: 12", "n: 12", 3, "calibration.n is an unknown key", "calibration knows dataset, samples, seqlen, seed"),
        ("samples: 12", "samples: 0", 3, "calibration.samples is 0, not a whole number from 1 to 65,536", "set calibration.samples to"),
        ("samples: 12", "samples: true", 3, "calibration.samples is true, not a whole number", "set"),
        ("samples: 12", "samples: 1e2", 3, "calibration.samples is 100.0, not a whole number", "set"),
        ("samples: 12", "samples: '12'", 3, "calibration.samples is '12', not a whole number", "without quotes"),
        ("bits: 4", "bits: 5", 4, "quantization.bits is 5, not 2, 3, 4 or 8", "2, 3, 4 or 8"),
        ("bits: 4", "group_size: 48, bits: 4", 4, "quantization.group_size is 48, not 32, 64, 128 or -1", "set"),
        ("bits: 4, ", "", 4, "quantization.bits is missing", "add `bits:` (2, 3, 4 or 8; bits a weight)"),
        ("bits: 4", "symmetric: yes, bits: 4", 4, "quantization.symmetric is 'yes', not true or false", "true or false"),
        ("[awq, gptq]", "gptq", 4, "quantization.method is 'gptq', not a list", "write a list: method: [gptq]"),
        ("[awq, gptq]", "[]", 4, "quantization.method is empty", "at least 1"),
        ("[awq, gptq]", "[awqq, gptq]", 4, "quantization.method[0]: awqq is no choice", "did you mean awq?"),
        ("[awq, gptq]", "[awq, {gptq: {dampin: 1}}]", 4, "quantization.method[1].gptq.dampin is an unknown key", "did you mean damping?"),
        ("[awq, gptq]", "[awq, {gptq: {damping: 7}}]", 4, "gptq.damping is 7, not a number above 0 and up to 1", "set"),
        ("format: awq", "format: zzz", 5, "format: zzz is no choice", "choices: awq"),
        ("format: awq", "format: {awq: {order: 1}}", 5, "format.awq.order is an unknown key", "remove it; format.awq knows as"),
        ("format: awq", "format: {}", 5, "has none", "write one of"),
        ("format: awq", "format: 4", 5, "format is 4, not one of awq", "set format to one of"),
        ("format: awq", "", 1, "format is missing", "add `format:` (one of awq"),
        ("format: awq", "format:", 5, "format is empty (null)", "write a value"),
        ("kl: {max_nats: 0.1}", "kl: ", 6, "verify.kl is empty (null)", "`kl: {}`"),
        ("kl: {max_nats: 0.1}", "kll: {}", 6, "verify.kll is an unknown key", "did you mean kl?"),
        ("bits: 4", "bits: 4, overrides: [q]", 4, "quantization.overrides is a list of 1, not a mapping", "set"),
        ("bits: 4", "bits: 4, overrides: {q: 8}", 4, "quantization.overrides.q is 8, not a mapping of keys", "set"),
        ("bits: 4", "bits: 4, overrides: {q: {bit: 8}}", 4, "quantization.overrides.q.bit is an unknown key", "did you mean bits?"),
        (
            "bits: 4",
            "bits: 4, overrides: {q: {b: 8}}",
            4,
            "overrides.q.b is an unknown key",
            "knows bits, group_size, symmetric, method, skip",
        ),
        ("bits: 4", "bits: 4, overrides: {q: {bits: 5}}", 4, "quantization.overrides.q.bits is 5, not 2, 3, 4 or 8", "set"),
        ("bits: 4", "bits: 4, overrides: {q: {method: {gptq: {dampin: 1}}}}", 4, "gptq.dampin is an unknown key", "did you mean damping?"),
        ("bits: 4", "bits: 4, mixed: {bits: [4], budget_bits: 4.5}", 4, "mixed.bits has 1 of at least 2", "write at least 2 of them"),
        ("max_nats: 0.1", "max_nats: -1", 6, "verify.kl.max_nats is -1, not a number from 0", "set"),
        ("max_nats: 0.1", "max_nats: low", 6, "verify.kl.max_nats is 'low', not a number from 0", "set"),
        ("max_nats: 0.1", "max_nats: .inf", 6, "verify.kl.max_nats is inf", "set"),
        ("{local: {path: m}}", "local", 2, "source.local.path is missing", "the model's folder"),
        ("path: m", "path: 12", 2, "source.local.path is 12, not text", 'put it in quotes: "12"'),
        ("path: m", "path: m, outside: 7", 2, "source.local.outside is 7, not true or false", "set"),
        ("[a.txt]", "[1]", 3, "paths[0] is 1, not text", 'put it in quotes: "1"'),
        ("{local: {path: m}}", "{local: {path: m}, text_files: {}}", 2, "takes one choice", "write one of"),
        ("schema: 1", "schema: 2", 1, "schema is 2, not 1", "set schema to 1"),
        ("schema: 1", "schema: 1\nextend: x.yaml", 2, "extend is an unknown key", "did you mean extends?"),
        ("schema: 1", "schema: 1\nmatrx: {}", 2, "matrx is an unknown key", "did you mean matrix?"),
        ("format: awq", "format: awq\nkv_cache: int8", 6, "kv_cache is 'int8', not a mapping with policy", "set"),
        ("format: awq", "format: awq\nkv_cache: {policy: int9}", 6, "kv_cache.policy is 'int9', not none, int8 or int4", "set"),
        ("format: awq", "format: awq\nkv_cache: {max_entry_count: 1.5}", 6, "is 1.5, not a number above 0 and below 1", "set"),
        ("format: awq", "format: awq\ntarget: {count: 2}", 6, "target.gpu is missing", "a100-40gb"),
    ],
)
def test_each_mistake(tmp_path: Path, old: str, new: str, line: int, what: str, fix: str) -> None:
    assert old in GOOD
    found = [
        error for error in mistakes(tmp_path, GOOD.replace(old, new)) if error.where == f"recipes/q.yaml:{line}" and what in error.what
    ]
    assert len(found) == 1, mistakes(tmp_path, GOOD.replace(old, new))
    assert fix in found[0].fix
    for jargon in ("pydantic", "Input should", "validat", "NoneType", "model_type", "Extra inputs"):
        assert jargon not in str(found[0])


def test_one_mistake_is_one_error_and_several_are_told_at_once(tmp_path: Path) -> None:
    found = mistakes(tmp_path, GOOD.replace("samples: 12", "samples: 0").replace("bits: 4", "bits: 5").replace("path: m", "pth: m"))
    assert [(error.where, error.what.partition(" ")[0]) for error in found] == [
        ("recipes/q.yaml:2", "source.local.path"),
        ("recipes/q.yaml:2", "source.local.pth"),
        ("recipes/q.yaml:3", "calibration.samples"),
        ("recipes/q.yaml:4", "quantization.bits"),
    ]


def test_an_inherited_mistake_is_told_once_and_at_the_line_that_made_it(tmp_path: Path) -> None:
    (tmp_path / "recipes/bases").mkdir(parents=True)
    (tmp_path / "recipes/bases/b.yaml").write_text("\ncalibration:\n  samples: 0\n")
    (tmp_path / "recipes/other.yaml").write_text("extends: bases/b.yaml\n" + GOOD.replace(", samples: 12", ""))
    found = mistakes(tmp_path, "extends: bases/b.yaml\n" + GOOD.replace(", samples: 12", ""))
    assert [error.where for error in found] == ["recipes/bases/b.yaml:3"]


def test_dotted() -> None:
    assert dotted(("quantization", "method", 0, "awq")) == "quantization.method[0].awq"
