"""What every format keeps: unpack is the inverse of pack, the layout says what pack writes, and config tells every linear's scheme back."""

from __future__ import annotations

import json
import re
from types import ModuleType
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys.errors import BuildError
from buildsys.formats import FUSED, Layout, named, patterns
from buildsys.io.checkpoint import DTYPES
from buildsys.quant.linear import QuantizedLinear
from buildsys.scheme import Activations, Bits, GroupSize, Number, Scheme, Schemes
from buildsys.slots import modules

FORMATS = sorted(modules("formats").items())
INTS = [Scheme(bits, size, even) for bits in get_args(Bits) for size in get_args(GroupSize) for even in (False, True)]
EIGHTS = [Scheme(8, -1, True, number, reads) for number in get_args(Number) for reads in get_args(Activations)]
SCHEMES = list(dict.fromkeys(INTS + EIGHTS))

each_format = pytest.mark.parametrize("format", [module for _, module in FORMATS], ids=[name for name, _ in FORMATS])


def held(format: ModuleType) -> list[Scheme]:
    return [scheme for scheme in SCHEMES if format.accepts(scheme) is None]


@st.composite
def linears(draw: st.DrawFn, schemes: list[Scheme], formats: list[ModuleType]) -> QuantizedLinear:
    """Any codes that a scheme has, NaN among the fp8 ones: what they mean is no matter of layout."""
    scheme = draw(st.sampled_from(schemes))
    in_features = draw(st.integers(1, 4)) * (32 if scheme.group_size == -1 else scheme.group_size)
    fitting = [out for out in range(1, 97) if all(format.fits(scheme, in_features, out) is None for format in formats)]
    out_features = draw(st.sampled_from(fitting))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    groups = (out_features, scheme.groups(in_features))
    zero = torch.randint(0, scheme.top + 1, groups, dtype=torch.uint8, generator=random)
    return QuantizedLinear(
        torch.randint(0, scheme.top + 1, (out_features, in_features), dtype=torch.uint8, generator=random),
        torch.rand(groups, generator=random).half(),
        torch.full_like(zero, scheme.middle) if scheme.symmetric else zero,
        scheme,
    )


def same(found: QuantizedLinear, linear: QuantizedLinear) -> bool:
    return found.scheme == linear.scheme and all(
        torch.equal(getattr(found, part), getattr(linear, part)) and getattr(found, part).is_contiguous()
        for part in ("codes", "scale", "zero")
    )


@each_format
@settings(deadline=None)
@given(data=st.data())
def test_unpack_is_the_inverse_of_pack(format: ModuleType, data: st.DataObject) -> None:
    linear = data.draw(linears(held(format), [format]))
    assert same(format.unpack(format.pack(linear), linear.scheme), linear)


@settings(deadline=None)
@given(data=st.data())
def test_every_pair_of_formats_unpacks_to_the_same_codes(data: st.DataObject) -> None:
    shared = [scheme for scheme in SCHEMES if sum(scheme in held(format) for _, format in FORMATS) > 1]
    scheme = data.draw(st.sampled_from(shared))
    able = [format for _, format in FORMATS if scheme in held(format)]
    linear = data.draw(linears([scheme], able))
    assert all(same(format.unpack(format.pack(linear), scheme), linear) for format in able)


def test_each_way_of_quantizing_has_two_formats() -> None:
    """Four bits, W8A8 in int8 and in fp8: what the test above compares."""
    for scheme in (Scheme(4, 128), Scheme(4, 128, True), Scheme(8, -1, True, "int", "int8"), Scheme(8, -1, True, "fp8", "fp8")):
        assert len([name for name, format in FORMATS if scheme in held(format)]) >= 2


@each_format
@settings(deadline=None)
@given(data=st.data())
def test_layout_says_what_pack_writes(format: ModuleType, data: st.DataObject) -> None:
    linear = data.draw(linears(held(format), [format]))
    packed, (out_features, in_features) = format.pack(linear), linear.codes.shape
    layout = format.layout("model.q", linear.scheme, in_features, out_features)
    assert layout.keys() == {f"model.q.{suffix}" for suffix in packed}
    for suffix, tensor in packed.items():
        dtype, shape = layout[f"model.q.{suffix}"]
        assert tensor.dtype == DTYPES[dtype] and tuple(tensor.shape) == shape and tensor.is_contiguous()


@each_format
def test_config_tells_the_scheme_back(format: ModuleType) -> None:
    for scheme in held(format):
        config = json.loads(json.dumps(format.config(Schemes(scheme), ["lm_head"])))
        told = format.scheme_of(config)
        assert told == scheme if format.__name__ != "buildsys.formats.awq" else (told.bits, told.group_size) == (4, scheme.group_size)
        assert config["quant_method"] == format.QUANT_METHOD and "lm_head" in json.dumps(config)


NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@st.composite
def models(draw: st.DrawFn, format: ModuleType) -> Schemes:
    """Schemes of a model of 12 layers as the format can hold them."""
    linears = [f"model.layers.{layer}.mlp-x.{name}" for layer in range(12) for name in NAMES]
    default = draw(st.sampled_from(held(format)))
    others = [scheme for scheme in held(format) if format.mixes((default, scheme)) is None]
    own = draw(st.dictionaries(st.sampled_from(linears), st.sampled_from(others), max_size=30))
    return Schemes(default, draw(st.frozensets(st.sampled_from(linears), max_size=10)), own)


@each_format
@settings(deadline=None)
@given(data=st.data())
def test_config_tells_every_linear_back(format: ModuleType, data: st.DataObject) -> None:
    schemes = data.draw(models(format))
    config = json.loads(json.dumps(format.config(schemes, ["lm_head", *sorted(schemes.left_float)])))
    told = format.schemes_of(config)
    assert told.left_float == schemes.left_float | {"lm_head"}
    if format.__name__ != "buildsys.formats.awq":  # which cannot tell a symmetric scheme
        assert told.to_json() == Schemes(schemes.default, schemes.left_float | {"lm_head"}, schemes.own).to_json()


@each_format
def test_a_foreign_config_is_refused(format: ModuleType) -> None:
    good = format.config(Schemes(held(format)[0]), ["lm_head"])
    for bad in ({}, {"quant_method": "other"}, {**good, "quant_method": "other"}):
        with pytest.raises(BuildError, match="quant_method"):
            format.schemes_of(bad)


@each_format
def test_a_format_holds_something_and_says_why_not(format: ModuleType) -> None:
    answers = [format.accepts(scheme) for scheme in SCHEMES]
    assert None in answers and all(answer is None or "quantization" in answer for answer in answers)
    assert issubclass(format.Knobs, Layout) and isinstance(format.VERSION, int)
    assert format.mixes(held(format)[:1]) is None and format.keeps_float([]) is None


@each_format
def test_a_group_that_does_not_divide_does_not_fit(format: ModuleType) -> None:
    for scheme in held(format):
        if scheme.group_size != -1:
            assert str(scheme.group_size + 8) in format.fits(scheme, scheme.group_size + 8, 64)


@each_format
def test_a_recipe_can_ask_for_another_layout(format: ModuleType) -> None:
    asked = format.Knobs.model_validate({"as": "llama"})
    assert asked.as_ == "llama" and asked.model_dump(by_alias=True) == {"as": "llama"} and format.Knobs().as_ is None
    with pytest.raises(ValueError, match="llama"):
        format.Knobs.model_validate({"as": "mistral"})


# Names of modules as expressions


def test_linears_that_engines_fuse_share_an_expression() -> None:
    attn = [f"model.layers.1.self_attn.{part}" for part in FUSED["qkv_proj"]]
    assert patterns(attn) == [r"^model\.layers\.1\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj)$"]
    assert patterns(attn[:2]) == [r"^model\.layers\.1\.self_attn\.(k_proj)$", r"^model\.layers\.1\.self_attn\.(q_proj)$"]
    assert patterns(["lm_head"]) == ["^(lm_head)$"]


@given(st.sets(st.sampled_from([f"model.layers.{layer}.a-b.{name}" for layer in range(12) for name in NAMES])))
def test_expressions_match_whole_names_and_tell_them_back(names: set[str]) -> None:
    found = patterns(names)
    every = {f"model.layers.{layer}.a-b.{name}" for layer in range(12) for name in NAMES}
    assert {name for name in every if any(re.match(pattern, name) for pattern in found)} == names
    assert sorted(name for pattern in found for name in named(pattern)) == sorted(names)


@pytest.mark.parametrize("foreign", [r".*\.mlp\..*", "(a+)+$", "^model(.*)$", "^(q_proj)", "lm_head"])
def test_an_expression_of_another_writer_is_never_run(foreign: str) -> None:
    with pytest.raises(BuildError, match=re.escape(repr(foreign))):
        named(foreign)
