"""What every format keeps: unpack is the inverse of pack, the layout says what pack writes, and config tells the scheme back."""

from __future__ import annotations

import json
from types import ModuleType
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys.io.checkpoint import DTYPES
from buildsys.quant.linear import QuantizedLinear
from buildsys.scheme import Bits, GroupSize, Scheme
from buildsys.slots import Frozen, modules

FORMATS = sorted(modules("formats").items())
SCHEMES = [Scheme(bits, size, even) for bits in get_args(Bits) for size in get_args(GroupSize) for even in (False, True)]

each_format = pytest.mark.parametrize("format", [module for _, module in FORMATS], ids=[name for name, _ in FORMATS])


@st.composite
def linears(draw: st.DrawFn, format: ModuleType) -> QuantizedLinear:
    scheme = draw(st.sampled_from([scheme for scheme in SCHEMES if format.accepts(scheme) is None]))
    in_features = draw(st.integers(1, 4)) * (32 if scheme.group_size == -1 else scheme.group_size)
    out_features = draw(st.sampled_from([out for out in range(1, 97) if format.fits(scheme, in_features, out) is None]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    groups = (out_features, scheme.groups(in_features))
    zero = torch.randint(0, scheme.top + 1, groups, dtype=torch.uint8, generator=random)
    return QuantizedLinear(
        torch.randint(0, scheme.top + 1, (out_features, in_features), dtype=torch.uint8, generator=random),
        torch.rand(groups, generator=random).half(),
        torch.full_like(zero, scheme.middle) if scheme.symmetric else zero,
        scheme,
    )


@each_format
@settings(deadline=None)
@given(data=st.data())
def test_unpack_is_the_inverse_of_pack(format: ModuleType, data: st.DataObject) -> None:
    linear = data.draw(linears(format))
    found = format.unpack(format.pack(linear), linear.scheme)
    assert found.scheme == linear.scheme
    for part in ("codes", "scale", "zero"):
        assert torch.equal(getattr(found, part), getattr(linear, part)) and getattr(found, part).is_contiguous()


@each_format
@settings(deadline=None)
@given(data=st.data())
def test_layout_says_what_pack_writes(format: ModuleType, data: st.DataObject) -> None:
    linear = data.draw(linears(format))
    packed, (out_features, in_features) = format.pack(linear), linear.codes.shape
    layout = format.layout("model.q", linear.scheme, in_features, out_features)
    assert layout.keys() == {f"model.q.{suffix}" for suffix in packed}
    for suffix, tensor in packed.items():
        dtype, shape = layout[f"model.q.{suffix}"]
        assert tensor.dtype == DTYPES[dtype] and tuple(tensor.shape) == shape and tensor.is_contiguous()


@each_format
def test_config_tells_the_scheme_back(format: ModuleType) -> None:
    for scheme in SCHEMES:
        if format.accepts(scheme) is None:
            config = json.loads(json.dumps(format.config(scheme, ["lm_head"])))
            told = format.scheme_of(config)
            assert (told.bits, told.group_size) == (scheme.bits, scheme.group_size)
            assert config["quant_method"] and "lm_head" in json.dumps(config)


@each_format
def test_a_format_holds_something_and_says_why_not(format: ModuleType) -> None:
    answers = [format.accepts(scheme) for scheme in SCHEMES]
    assert None in answers and all(answer is None or answer.strip() for answer in answers)
    assert issubclass(format.Knobs, Frozen) and isinstance(format.VERSION, int)


@each_format
def test_a_group_that_does_not_divide_does_not_fit(format: ModuleType) -> None:
    for scheme in SCHEMES:
        if format.accepts(scheme) is None and scheme.group_size != -1:
            assert str(scheme.group_size + 8) in format.fits(scheme, scheme.group_size + 8, 64)
