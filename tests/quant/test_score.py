"""Scores of two models against transformers' logits, with KL written out by hand in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from buildsys.formats import smooth_quant
from buildsys.io.checkpoint import Checkpoint
from buildsys.quant.block import Block
from buildsys.quant.grid import min_max
from buildsys.quant.kv import keep
from buildsys.quant.model import HEAD_CHUNK_TOKENS, Head, Model
from buildsys.quant.rotary import tables
from buildsys.quant.score import SCORES, compare_window, score, score_caches
from buildsys.scheme import Scheme, Schemes
from buildsys.step import Resources
from tests import models

WINDOWS, LENGTH = 3, 40


def quiet(what: str, done: int, of: int) -> None:
    assert 0 < done <= of


def theirs(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, tokens: Tensor) -> Tensor:  # -> float64 [windows, tokens, vocab]
    return torch.stack([model(window[None].long()).logits[0] for window in tokens]).double().log_softmax(-1)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_scores_are_those_of_transformers_models(family: str, tmp_path: Path) -> None:
    build, tokens = models.FAMILIES[family], models.tokens(WINDOWS, LENGTH)
    ours, other = build(tmp_path / "a", seed=1), build(tmp_path / "b", seed=2)
    found = score(models.opened(ours), models.opened(other), tokens, Resources(), quiet).tokens
    p, q = log_probabilities(theirs(ours), tokens), log_probabilities(theirs(other), tokens)
    assert tuple(found) == SCORES
    for window in range(WINDOWS):
        for at in range(LENGTH - 1):
            following = int(tokens[window, at + 1])
            one, other = p[window, at], q[window, at]
            expected = {
                "source_nll": -float(one[following]),
                "quantized_nll": -float(other[following]),
                "kl": sum(float(a.exp() * (a - b)) for a, b in zip(one, other, strict=True)),
                "agree": float(one.argmax() == other.argmax()),
            }
            assert {name: float(found[name][window, at]) for name in SCORES} == pytest.approx(expected, abs=1e-4)
    assert all(tensor.dtype == torch.float32 and tensor.shape == (WINDOWS, LENGTH - 1) for tensor in found.values())
    assert found["kl"].mean() > 0.1 and 0 <= found["agree"].mean() < 1, "the models do not differ: the test says nothing"


def test_a_model_agrees_with_itself(tmp_path: Path) -> None:
    folder = models.tiny_internlm2(tmp_path)
    whole = score(models.opened(folder), models.opened(folder), models.tokens(2, 16), Resources(), quiet)
    found = whole.tokens
    assert whole.drift == (0.0,) * models.opened(folder).architecture.layers
    assert (found["agree"] == 1).all() and (found["kl"] == 0).all() and torch.equal(found["source_nll"], found["quantized_nll"])


def eight_bits(source: Model, folder: Path, scheme: Scheme) -> Model:
    """The model as a W8A8 artifact holds it, rounded to nearest."""
    a, tensors = source.architecture, {}
    linears = {a.prefix(layer) + linear.name for layer in range(a.layers) for linear in a.linears}
    for name in a.tensors():
        weight, module = source.checkpoint.load(name, torch.float32, "cpu"), name.removesuffix(".weight")
        if module in linears and name.endswith(".weight"):
            grid = min_max(weight, scheme)
            tensors |= {f"{module}.{part}": tensor for part, tensor in smooth_quant.pack(grid.linear(grid.round(weight))).items()}
        else:
            tensors[name] = weight
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return Model(a, Checkpoint(models.files(folder)), unpack=smooth_quant.unpack, schemes=Schemes(scheme))


def round_token_by_token(linear: torch.nn.Linear, scheme: Scheme) -> None:
    """Makes transformers' linear one of W8A8: its weights on the same grid, and each token that it reads rounded by a loop."""
    grid = min_max(linear.weight.data, scheme)
    linear.weight.data = grid.dequantize(grid.round(linear.weight.data))

    def rounded(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        out = inputs[0].clone()
        for token in out.view(-1, out.shape[-1]):
            scale = token.abs().max() / (127 if scheme.activations == "int8" else 448)
            ratio = token / scale
            token.copy_((torch.round(ratio) if scheme.activations == "int8" else ratio.to(torch.float8_e4m3fn).float()) * scale)
        return (out,)

    linear.register_forward_pre_hook(rounded)


@pytest.mark.parametrize("scheme", [Scheme(8, -1, True, "int", "int8"), Scheme(8, -1, True, "fp8", "fp8")], ids=str)
def test_w8a8_is_scored_with_what_its_linears_read_rounded(scheme: Scheme, tmp_path: Path) -> None:
    folder, tokens = models.tiny_llama(tmp_path / "a", seed=1), models.tokens(WINDOWS, LENGTH)
    source = models.opened(folder)
    quantized = eight_bits(source, tmp_path / "b", scheme)
    found = score(source, quantized, tokens, Resources(), quiet).tokens
    p, twin = log_probabilities(theirs(folder), tokens), theirs(folder)
    for name, module in twin.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            round_token_by_token(module, scheme)
    q = log_probabilities(twin, tokens)
    expected = (p.exp() * (p - q)).sum(-1)[:, :-1]
    assert float(found["kl"].mean()) == pytest.approx(float(expected.mean()), rel=0.02)
    assert float((found["kl"] - expected).abs().mean()) < 0.1 * float(expected.mean())  # a value beside a half may round the other way
    alone = score(source, replace(quantized, schemes=Schemes(replace(scheme, activations="none"))), tokens, Resources(), quiet).tokens
    assert alone["kl"].mean() < 0.8 * found["kl"].mean(), "rounding activations costs nothing: the test says nothing"


def test_threads_and_batch_change_no_bit(tmp_path: Path) -> None:
    one, other = models.opened(models.tiny_llama(tmp_path / "a")), models.opened(models.tiny_llama(tmp_path / "b", seed=1))
    runs = [score(one, other, models.tokens(5, 20), Resources(*said), quiet).tokens for said in ((1, 1), (3, 1), (3, 8))]
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in SCORES)


class Counted:
    """A model that counts the blocks that are read of it."""

    def __init__(self, model: Model) -> None:
        self._model, self.read = model, 0

    def blocks(self, layers: Iterable[int], ahead: int) -> Iterator[Block]:
        for block in self._model.blocks(layers, ahead):
            self.read += 1
            yield block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@pytest.mark.parametrize("threads", [1, 3])
def test_policies_in_one_walk_are_to_the_bit_those_of_each_alone(tmp_path: Path, threads: int) -> None:
    one = models.opened(models.tiny_llama(tmp_path / "a", head_dim=64))
    two = models.opened(models.tiny_llama(tmp_path / "b", seed=1, head_dim=64))
    tokens, resources, policies = models.tokens(4, 20), Resources(threads), ("none", "int8", "int4")
    source, quantized = Counted(one), Counted(two)
    together = score_caches(source, quantized, {name: keep(name) for name in policies}, tokens, resources, quiet)  # type: ignore[arg-type]
    assert source.read == quantized.read == one.architecture.layers, "each block is read and unpacked once"
    assert tuple(together) == policies
    for name in policies:
        alone = score(one, replace(two, keep_kv=keep(name)), tokens, Resources(), quiet)
        assert together[name].drift == alone.drift
        assert all(torch.equal(together[name].tokens[part], alone.tokens[part]) for part in SCORES)
    kl = [together[name].tokens["kl"] for name in policies]
    assert not torch.equal(kl[0], kl[1]) and (kl[2] - kl[0]).abs().mean() > 3 * (kl[1] - kl[0]).abs().mean()


def test_long_windows_are_scored_in_pieces_without_a_seam() -> None:
    made, length = torch.Generator().manual_seed(1), 2 * HEAD_CHUNK_TOKENS + 3
    heads = [Head(torch.rand(8, generator=made), torch.randn(50, 8, generator=made), 1e-6) for _ in range(2)]
    one, other = (torch.randn(length, 8, generator=made) for _ in range(2))
    tokens = torch.randint(50, (length,), generator=made)
    found = compare_window((heads[0], heads[1]), one, other, tokens)
    p = heads[0].logits(one).double().log_softmax(-1)[:-1]
    q = heads[1].logits(other).double().log_softmax(-1)[:-1]
    torch.testing.assert_close(found["kl"].double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["source_nll"].double(), -p[torch.arange(length - 1), tokens[1:]], rtol=1e-4, atol=1e-5)
    assert all(len(values) == length - 1 for values in found.values())


def test_drift_is_what_blocks_have_added_up_to(tmp_path: Path) -> None:
    one, _ = (models.opened(models.tiny_llama(tmp_path / name)) for name in ("a", "b"))
    with_noise = tmp_path / "b" / "model.safetensors"
    tensors = load_file(with_noise)
    save_file({name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in tensors.items()}, with_noise, {"format": "pt"})
    tokens = models.tokens(3, 20)
    found = score(one, models.opened(tmp_path / "b"), tokens, Resources(), quiet).drift
    ours, theirs, rotary = one.embed(tokens), models.opened(tmp_path / "b").embed(tokens), tables(one.architecture, 20)
    for layer, drift in enumerate(found):
        ours = [one.block(layer).forward(h, rotary) for h in ours]
        theirs = [models.opened(tmp_path / "b").block(layer).forward(h, rotary) for h in theirs]
        apart = torch.stack(theirs) - torch.stack(ours)
        assert drift == pytest.approx(float(apart.square().sum() / torch.stack(ours).square().sum()), rel=1e-4) and drift > 0.001
    assert len(found) == one.architecture.layers
