"""Notices when what quant/ writes changes for equal input, so that VERSION is bumped and no stale step is taken for a finished one.

Inputs are small whole numbers: their sums and products are exact in float32, so that no CPU's order of summation shows.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from buildsys import quant
from buildsys.methods import awq, rtn
from buildsys.quant.activations import fake_quantize as fake_quantize_activations
from buildsys.quant.blocks import save_block
from buildsys.quant.compensate import compensated, factored
from buildsys.quant.grid import Grid, least_error, min_max
from buildsys.quant.kv import fake_quantize
from buildsys.quant.linear import QuantizedLinear
from buildsys.quant.observe import SiteStats, gram_blocks
from buildsys.quant.pack import pack_dense
from buildsys.quant.refine import refined
from buildsys.scheme import Scheme

GOLDEN = {
    1: "26885af3275ac70e7a3f265c13cad8c684182b7436b359793c57f965e9b9e6d0",
    2: "0bdd5c6fba9490cab15472b46de66463d54c44a42f0247ec12bb32ef59ce46fc",
    3: "0bdd5c6fba9490cab15472b46de66463d54c44a42f0247ec12bb32ef59ce46fc",  # sums in another order: whole numbers do not show it
}
SCHEMES = (
    Scheme(4, 128),
    Scheme(3, 32),
    Scheme(2, 64, True),
    Scheme(8, -1),
    Scheme(8, -1, True, "int", "int8"),
    Scheme(8, -1, True, "fp8", "fp8"),
)
WHAT_TO_DO = """quant/ writes other bytes for equal input, so every step that it computed before is stale.
If that was not meant, undo it. If it was: set buildsys.quant.VERSION to {next} (and a method's own, where it changed),
and add to GOLDEN in this file
    {next}: "{digest}",
An old entry is never changed: it is what artifacts of that version hold."""


def whole_numbers(rows: int, width: int, top: int, seed: int) -> Tensor:
    """From -top to top, by a generator of our own: torch may change its own."""
    state, found = seed, []
    for _ in range(rows * width):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        found.append((state >> 33) % (2 * top + 1) - top)
    return torch.tensor(found, dtype=torch.float32).view(rows, width)


def digest(folder: Path) -> str:
    made = hashlib.sha256()

    def add(*tensors: Tensor) -> None:
        for tensor in tensors:
            made.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())

    def add_linear(linear: QuantizedLinear) -> None:
        add(linear.codes, linear.scale, linear.zero, pack_dense(linear.codes, linear.scheme.bits))

    weight, x = whole_numbers(8, 256, 100, 1) / 256, whole_numbers(64, 256, 8, 2)
    gram, blocks = x.t() @ x / 64, gram_blocks(x) / 64
    add(gram, blocks)
    stats = SiteStats(x.abs().sum(0) / 64, x.abs().amax(0), blocks)
    linears: dict[str, QuantizedLinear] = {}
    for scheme in SCHEMES:
        linears[str(scheme)] = rtn.round_weights(weight, gram, scheme, rtn.Knobs()).linear
        for grid in (min_max(weight, scheme), least_error(weight, scheme, gram.diagonal())):
            add(grid.scale, grid.zero)
            add_linear(grid.linear(grid.round(weight)))
    # The column loops divide, so their codes hang on last bits where a value is near a tie; in float64 none is near enough.
    narrow, tall = whole_numbers(4, 192, 100, 3) / 256, whole_numbers(384, 192, 8, 4)
    grid = min_max(narrow, Scheme(4, 64))
    exact = Grid(grid.scale.double(), grid.zero.double(), grid.scheme)
    for by_activation in (True, False):
        by = factored((tall.t() @ tall / 256).double(), 0.01, by_activation)
        codes = compensated(narrow.double(), by, exact)
        better, best = refined(narrow.double(), by.h, exact, codes, 2)
        add(codes.to(torch.uint8), best.to(torch.uint8), better.scale.half())
    add((awq.rescale([weight], stats, None, Scheme(4, 128), awq.Knobs()).log2() * 64).round())
    for bits in (8, 4):
        add(fake_quantize(weight, bits))
    for to in ("int8", "fp8"):
        add(fake_quantize_activations(weight, to))
    save_block(folder / "block.safetensors", linears, {"norm.weight": weight[0].half()})
    made.update((folder / "block.safetensors").read_bytes())
    return made.hexdigest()


def test_what_quant_writes_is_what_its_version_says(tmp_path: Path) -> None:
    found = digest(tmp_path)
    assert GOLDEN.get(quant.VERSION) == found, WHAT_TO_DO.format(next=max(GOLDEN) + 1, digest=found)


def test_the_digest_sees_a_changed_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(tmp_path)
    monkeypatch.setattr("buildsys.quant.grid.SHRINKS", (1.0, 0.9))
    assert digest(tmp_path) != before
