"""KV: KL with the recipe's own policy on and what it adds, window by window; and the same of each policy beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch

from buildsys.checks import agreement, kl, kv, perplexity
from buildsys.measurement import Measurement, scores_file


def inputs_of(folder: Path, made: Any, **policies: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Scores with each policy; "none" are the plain ones."""
    files = {scores_file(name): made.write(folder, scores, name).path(scores_file(name)) for name, scores in policies.items()}
    return {"scores": made.write(folder, policies["none"]), "kv_scores": made.Files({name: files[name] for name in list(files)[1:]})}


def measured(inputs: dict[str, Any], made: Any, own: str) -> list[Measurement]:
    return kv.measure(kv.Knobs(), inputs, made.Context({"kv_cache": {"policy": own}}))


def test_the_increase_is_paired(tmp_path: Path, made: Any) -> None:
    plain = made.random(harm=0.05)
    with_policy = plain | {"kl": plain["kl"] + 0.001}
    own, increase, *_ = measured(inputs_of(tmp_path, made, none=plain, int8=with_policy), made, "int8")
    assert own.value == pytest.approx(float(with_policy["kl"].mean()), rel=1e-5) and own.detail == "KV cache int8"
    assert increase.value == pytest.approx(0.001, rel=1e-3) and increase.high - increase.low < 1e-6 < own.high - own.low
    assert {limit.measurement for limit in kv.LIMITS.values()} == {own.name, increase.name}


def test_without_a_policy_the_plain_scores_serve(tmp_path: Path, made: Any) -> None:
    inputs = {"scores": made.write(tmp_path, made.random(harm=0.05))}
    own, increase, *_ = measured(inputs, made, "none")
    assert own.value > 0 and (increase.low, increase.value, increase.high) == (0.0, 0.0, 0.0)


def test_a_policy_without_its_scores_is_no_pass(tmp_path: Path, made: Any) -> None:
    with pytest.raises(KeyError):
        measured(inputs_of(tmp_path, made, none=made.random(), int8=made.random()), made, "int4")


@pytest.mark.parametrize("own", ["none", "int8", "int4"])
def test_each_policy_is_measured_as_the_checks_without_one_would(tmp_path: Path, made: Any, own: str) -> None:
    harms = {"none": 0.02, "int8": 0.03, "int4": 0.2}
    scores = {name: made.random(harm=harm) for name, harm in harms.items()}
    found = {one.name: one for one in measured(inputs_of(tmp_path, made, **scores), made, own)}
    assert set(found) == {"kl", "increase", *(f"{what}_{name}" for what in ("perplexity", "kl", "increase", "agreement") for name in harms)}

    def alone(check: Any, name: str, policy: str) -> tuple[float, float, float]:
        alike = {"scores": made.write(tmp_path / policy, scores[policy])}
        one = next(one for one in check.measure(check.Knobs(), alike, made.Context()) if one.name == name)
        return one.low, one.value, one.high

    for policy in harms:
        expected = {"perplexity": (perplexity, "quantized_perplexity"), "kl": (kl, "kl"), "agreement": (agreement, "share")}
        for what, (check, name) in expected.items():
            one = found[f"{what}_{policy}"]
            assert (one.low, one.value, one.high) == pytest.approx(alone(check, name, policy), rel=1e-6), (what, policy)
        added = (scores[policy]["kl"] - scores["none"]["kl"]).double().mean()
        assert found[f"increase_{policy}"].value == pytest.approx(float(added), abs=1e-7)
    for gated, beside in (("kl", f"kl_{own}"), ("increase", f"increase_{own}")):
        assert (found[gated].low, found[gated].value, found[gated].high) == (found[beside].low, found[beside].value, found[beside].high)
    assert 0 < found["increase_int8"].value < found["increase_int4"].value and found["increase_none"].high == 0


def test_policies_in_another_order_are_the_same_wish() -> None:
    assert kv.Knobs(policies=("int4", "int8", "int4")) == kv.Knobs() and kv.Knobs(policies=()).policies == ()
    with pytest.raises(pydantic.ValidationError):
        kv.Knobs.model_validate({"policies": ["none"]})
