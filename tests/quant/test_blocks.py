"""Block files: what was saved comes back, scheme and all, and equal blocks are equal bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys.io.checkpoint import load
from buildsys.quant.blocks import load_block, save_block
from buildsys.quant.linear import QuantizedLinear
from buildsys.scheme import Scheme

SCHEMES = st.builds(Scheme, st.sampled_from([2, 3, 4, 8]), st.sampled_from([32, 64, 128, -1]), st.booleans())


def quantized(scheme: Scheme, out_features: int, in_features: int, seed: int) -> QuantizedLinear:
    random = torch.Generator().manual_seed(seed)
    groups = (out_features, scheme.groups(in_features))
    return QuantizedLinear(
        torch.randint(0, scheme.top + 1, (out_features, in_features), dtype=torch.uint8, generator=random),
        torch.rand(groups, generator=random).half(),
        torch.randint(0, scheme.top + 1, groups, dtype=torch.uint8, generator=random),
        scheme,
    )


@settings(deadline=None)
@given(scheme=SCHEMES, out_features=st.integers(1, 9), width=st.integers(1, 5), seed=st.integers(0, 9))
def test_load_is_the_inverse_of_save(
    scheme: Scheme, out_features: int, width: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "block.safetensors"
    in_features = 17 * width if scheme.group_size == -1 else scheme.group_size * width
    linears = {name: quantized(scheme, out_features, in_features, seed + at) for at, name in enumerate(("attn.q", "mlp.up"))}
    floats = {"norm.weight": torch.randn(5).half(), "attn.q.bias": torch.randn(out_features).half()}
    save_block(path, linears, floats)
    found, others = load_block(path)
    assert found.keys() == linears.keys() and others.keys() == floats.keys()
    for name, linear in linears.items():
        assert found[name].scheme == scheme
        for part in ("codes", "scale", "zero"):
            assert torch.equal(getattr(found[name], part), getattr(linear, part))
    assert all(torch.equal(others[name], floats[name]) for name in floats)
    first = path.read_bytes()
    save_block(path, dict(reversed(linears.items())), dict(reversed(floats.items())))
    assert path.read_bytes() == first


def test_the_tensors_have_the_promised_names_and_shapes(tmp_path: Path) -> None:
    save_block(tmp_path / "b", {"q": quantized(Scheme(3, 32), 6, 64, 0)}, {})
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in load(tmp_path / "b").items()}
    assert shapes == {"q.codes": (torch.uint8, (6, 24)), "q.scale": (torch.float16, (6, 2)), "q.zero": (torch.uint8, (6, 2))}


def test_a_float_may_not_take_a_part_s_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"q.scale"):
        save_block(tmp_path / "b", {"q": quantized(Scheme(4, 32), 8, 32, 0)}, {"q.scale": torch.ones(1)})
