"""Calibration statistics against loops over tokens; widths that are no multiple of a Gram block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from buildsys.io import checkpoint
from buildsys.quant.block import Block
from buildsys.quant.observe import GRAM_BLOCK, SiteStats, calibrate, few, gram_blocks, load_stats
from buildsys.quant.parallel import tensor_cores
from buildsys.quant.rotary import tables
from buildsys.quant.search import gram_norm
from buildsys.quant.stream import Walk
from buildsys.quant.sums import PART
from buildsys.step import Resources
from tests import models


def quiet(what: str, done: int, of: int) -> None:
    assert 0 < done <= of


def stats(x: Tensor) -> SiteStats:
    return SiteStats(x.abs().mean(0), x.abs().amax(0), gram_blocks(x) / len(x))


def whole(x: Tensor) -> Tensor:  # -> [in, in], the mean of x x^T, with entries across blocks left out
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for token in x.double():
        total += torch.outer(token, token)
    block = torch.arange(x.shape[1]) // GRAM_BLOCK
    return total / len(x) * (block[:, None] == block[None, :])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 2**31))
def test_gram_blocks_are_the_diagonal_of_the_gram_matrix(width: int, tokens: int, seed: int) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    blocks = gram_blocks(x) / tokens
    assert blocks.shape == (-(-width // GRAM_BLOCK), GRAM_BLOCK, GRAM_BLOCK)
    put_together = torch.block_diag(*blocks)
    torch.testing.assert_close(put_together[:width, :width].double(), whole(x), rtol=0, atol=1e-5)
    assert not put_together[width:].any() and not put_together[:, width:].any()


@pytest.mark.parametrize("width", [32, 128, 200, 256])
def test_gram_norm_is_the_output_error(width: int) -> None:
    made = torch.Generator().manual_seed(width)
    x, error = torch.randn(50, width, generator=made), torch.randn(7, width, generator=made)
    expected = float(((error.double() @ whole(x)) * error.double()).sum())
    assert float(gram_norm(error, stats(x))) == pytest.approx(expected, rel=1e-5)
    if width <= GRAM_BLOCK:
        assert expected == pytest.approx(float((x @ error.t()).square().sum(1).mean()), rel=1e-5)


@pytest.mark.parametrize("width", [64, 200])
def test_divided_is_the_statistics_of_the_divided(width: int) -> None:
    made = torch.Generator().manual_seed(1)
    x, scale = torch.randn(40, width, generator=made), torch.rand(width, generator=made) + 0.3
    told, seen = stats(x).divided(scale), stats(x / scale)
    for part in ("absmean", "absmax", "gram"):
        torch.testing.assert_close(getattr(told, part), getattr(seen, part), rtol=1e-4, atol=1e-6)


def read_in_mlp(block: Block, x: Tensor) -> dict[str, Tensor]:
    """By site what is read of one window from mlp_in on."""
    experts = block.architecture.experts
    if experts is None:
        return {"mlp_in": x, "down_in": block.down_in(x)}
    found = {"mlp_in": x}
    for expert, (tokens, _) in enumerate(block.routed(x, experts)):
        found |= {f"mlp_in.{expert}": x[tokens], f"down_in.{expert}": block.down_in(x[tokens], expert)}
    return found


@pytest.mark.parametrize("family", models.FAMILIES)
def test_calibrate_keeps_what_one_window_after_another_shows(family: str, tmp_path: Path) -> None:
    model = models.opened(models.FAMILIES[family](tmp_path / "model", hidden_size=96, intermediate_size=200, head_dim=24))
    a, tokens = model.architecture, models.tokens(3, 20)
    calibrate(model, tokens, tmp_path, Resources(), quiet)
    hidden, rotary = model.embed(tokens), tables(a, 20)
    for layer in range(a.layers):
        block, keys, values = model.block(layer), [], []
        seen: dict[str, list[Tensor]] = {site: [] for site in (*a.sites, *a.scale_sites)}
        for at, h in enumerate(hidden):
            x = block.attn_in(h)
            _, k, v = block.qkv(x, rotary)
            o_in = block.o_in(x, rotary)
            mlp_in = block.mlp_in(block.after_attention(h, o_in))
            for site, value in {"attn_in": x, "o_in": o_in, **read_in_mlp(block, mlp_in)}.items():
                seen[site].append(value)
            keys.append(k)
            values.append(v)
            hidden[at] = block.forward(h, rotary)
        path = tmp_path / f"block-{layer:05d}.safetensors"
        loaded = load_stats(path)
        assert loaded.keys() == seen.keys()
        for site, found in loaded.items():
            expected = stats(torch.cat(seen[site]))
            assert found.sent == (sum(map(len, seen[site])) if "." in site else None)
            for part in ("absmean", "absmax", "gram"):
                torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-4, atol=1e-5)
        held = checkpoint.load(path)
        for name, cached in (("k", keys), ("v", values)):
            together = torch.cat(cached, 1)  # [kv_heads, tokens, head_dim]
            torch.testing.assert_close(held[f"{name}.min"], together.amin((1, 2)))
            torch.testing.assert_close(held[f"{name}.max"], together.amax((1, 2)))


def test_all_tokens_stand_in_for_an_expert_that_is_sent_few(tmp_path: Path) -> None:
    model = models.opened(models.starve(models.tiny_mixtral(tmp_path / "model", num_local_experts=5)))
    tokens = models.tokens(3, 20)
    calibrate(model, tokens, tmp_path, Resources(), quiet)
    block, rotary, found = model.block(0), tables(model.architecture, 20), load_stats(tmp_path / "block-00000.safetensors")
    x = torch.cat([block.mlp_in(block.after_attention(h, block.o_in(block.attn_in(h), rotary))) for h in model.embed(tokens)])
    for site, expected in (("mlp_in.4", stats(x)), ("down_in.4", stats(block.down_in(x, 4)))):
        assert found[site].sent == 0
        for part in ("absmean", "absmax", "gram"):
            torch.testing.assert_close(getattr(found[site], part), getattr(expected, part), rtol=1e-4, atol=1e-5)
    assert [few(sent, 128) for sent in (0, 7, 8)] == [True, True, False]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_threads_and_batch_change_no_byte(family: str, tmp_path: Path) -> None:
    model, tokens, written = models.opened(models.FAMILIES[family](tmp_path / "model")), models.tokens(2 * PART + 1, 32), []
    for threads, batch in ((1, 1), (3, 1), (3, 8)):
        folder = tmp_path / f"{threads}-{batch}"
        folder.mkdir()
        calibrate(model, tokens, folder, Resources(threads, batch), quiet)
        written.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert len(written[0]) == 2 and written[0] == written[1] == written[2]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_threads_change_no_byte_where_products_are_rounded(stored: torch.dtype, tmp_path: Path) -> None:
    model = models.opened(models.tiny_llama(tmp_path / "model", dtype=stored)).at_speed()
    tokens, written = models.tokens(2 * PART + 1, 32), []
    with tensor_cores("cpu"):
        for threads in (1, 3):
            (tmp_path / f"{threads}").mkdir()
            calibrate(model, tokens, tmp_path / f"{threads}", Resources(threads, 2), quiet)
            walk, block = Walk(model, tokens, Resources(threads, 2)), model.block(0)
            grams = b"".join(walk.gram(block, site).matrix.numpy().tobytes() for site in model.architecture.sites)
            written.append([grams, *(path.read_bytes() for path in sorted((tmp_path / f"{threads}").iterdir()))])
    assert len(written[0]) == 3 and written[0] == written[1]
