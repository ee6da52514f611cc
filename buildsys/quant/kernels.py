"""Triton kernels for the inner loops that on a GPU would be thousands of small launches; each has its slow twin in torch, which CPUs run.

Imported where tensors are on a GPU alone: CPU builds of torch bring no Triton. Nothing is compiled at import.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from buildsys.scheme import Scheme

COLUMNS = 32  # outputs that one program of `round_block` carries through its 128 steps
ROWS = 32  # outputs in a tile of the searches
CHANNELS = 128  # input channels in a tile of the searches: a Gram block


def searchable(scheme: Scheme, in_features: int) -> bool:
    """Whether the searches here hold the scheme: groups have to lie inside a tile."""
    group = scheme.group(in_features)
    return group <= CHANNELS and CHANNELS % group == 0 and in_features % CHANNELS == 0


def round_block(
    target: Tensor, wanted: Tensor, factor: Tensor, group: Tensor, scale: Tensor, zero: Tensor, codes: Tensor, errors: Tensor, top: int
) -> None:
    """compensate._round_block on a GPU: a program keeps its outputs' whole block in registers. float32; `factor` [block, block], `group`
    [block], scale and zero [groups, out], the others [block, out]."""
    rows, outs = target.shape
    grid = (triton.cdiv(outs, COLUMNS),)
    _round_block[grid](
        target, wanted, factor, factor.stride(0), factor.stride(1), group, scale, zero, codes, errors, rows, outs, float(top),
        BLOCK=triton.next_power_of_2(rows), WIDTH=COLUMNS, num_warps=4,
    )  # fmt: skip


@triton.jit
def _round_block(  # type: ignore[no-untyped-def]
    target, wanted, factor, down, right, group, scale, zero, codes, errors, rows, outs, top, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    row = tl.arange(0, BLOCK)
    inside = column < outs
    tile = tl.load(target + row[:, None] * outs + column[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    for step in range(rows):
        at = rows - 1 - step
        value = tl.sum(tl.where((row == at)[:, None], tile, 0.0), 0)
        here = tl.load(group + at) * outs + column
        size = tl.load(scale + here, mask=inside, other=1.0)
        middle = tl.load(zero + here, mask=inside, other=0.0)
        code = tl.minimum(tl.maximum(libdevice.rint(tl.div_rn(value, size)) + middle, 0.0), top)
        error = tl.load(wanted + at * outs + column, mask=inside, other=0.0) - (code - middle) * size
        tl.store(codes + at * outs + column, code, mask=inside)
        tl.store(errors + at * outs + column, error, mask=inside)
        above = tl.load(factor + row * down + at * right, mask=row < at, other=0.0)
        tile += above[:, None] * error[None, :]


def rounding_errors(weight: Tensor, gram: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:  # -> [candidates]
    """search.rounding_error of every row of `scales` [candidates, in] at once: each weight [out, in] is read from memory once."""
    outs, ins = weight.shape
    grid = (triton.cdiv(outs, ROWS), ins // CHANNELS)
    found = torch.empty(len(scales), *grid, device=weight.device)
    _rounding_errors[grid](
        weight, gram, scales, found, outs, ins, len(scales), grid[0] * grid[1], float(scheme.top), float(scheme.middle),
        SYMMETRIC=scheme.symmetric, GROUP=scheme.group(ins), ROWS=ROWS, CHANNELS=CHANNELS, num_warps=4,
    )  # fmt: skip
    return found.sum((1, 2), dtype=torch.float64)


@triton.jit
def _grid(low, high, top, middle, SYMMETRIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """grid.min_max on the ends of groups."""
    if SYMMETRIC:
        size = tl.maximum(tl.div_rn(high, top - middle), tl.div_rn(-low, middle))
    else:
        size = tl.div_rn(high - low, top)
    size = tl.maximum(size.to(tl.float16).to(tl.float32), 6.103515625e-05)  # grid.SMALLEST_SCALE
    if SYMMETRIC:
        zero = tl.zeros_like(size) + middle
    else:
        zero = tl.minimum(tl.maximum(libdevice.rint(tl.div_rn(-low, size)), 0.0), top)
    return size, zero


@triton.jit
def _rounding_errors(  # type: ignore[no-untyped-def]
    weight, gram, scales, found, outs, ins, candidates, programs, top, middle,
    SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    column = tl.program_id(1) * CHANNELS + channel
    w = tl.load(weight + row[:, None] * ins + column[None, :], mask=(row < outs)[:, None], other=0.0).to(tl.float32)
    moments = tl.load(gram + tl.program_id(1) * CHANNELS * CHANNELS + channel[:, None] * CHANNELS + channel[None, :])
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    for candidate in range(candidates):
        scale = tl.load(scales + candidate * ins + column)
        grouped = tl.reshape(w * scale[None, :], (ROWS, CHANNELS // GROUP, GROUP))
        low, high = tl.minimum(tl.min(grouped, 2), 0.0), tl.maximum(tl.max(grouped, 2), 0.0)
        size, zero = _grid(low, high, top, middle, SYMMETRIC)
        code = tl.minimum(tl.maximum(libdevice.rint(tl.div_rn(grouped, size[:, :, None])) + zero[:, :, None], 0.0), top)
        error = tl.reshape((code - zero[:, :, None]) * size[:, :, None], (ROWS, CHANNELS)) / scale[None, :] - w
        seen = tl.dot(error, moments, input_precision="tf32")
        tl.store(found + candidate * programs + place, tl.sum(seen * error))


def least_error_shrinks(weight: Tensor, scheme: Scheme, importance: Tensor, shrinks: tuple[float, ...]) -> Tensor:  # -> [out, groups]
    """The shrink of `shrinks` with the least weighted squared error, for each group: the search of grid.least_error."""
    outs, ins = weight.shape
    group = scheme.group(ins)
    best = torch.empty(outs, ins // group, device=weight.device)
    tried = torch.tensor(shrinks, device=weight.device)
    grid = (triton.cdiv(outs, ROWS), ins // CHANNELS)
    _least_error_shrinks[grid](
        weight, importance, tried, best, outs, ins, len(shrinks), float(scheme.top), float(scheme.middle),
        SYMMETRIC=scheme.symmetric, GROUP=group, ROWS=ROWS, CHANNELS=CHANNELS, num_warps=4,
    )  # fmt: skip
    return best


@triton.jit
def _least_error_shrinks(  # type: ignore[no-untyped-def]
    weight, importance, shrinks, best, outs, ins, count, top, middle,
    SYMMETRIC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    groups: tl.constexpr = CHANNELS // GROUP
    w = tl.load(weight + row[:, None] * ins + column[None, :], mask=(row < outs)[:, None], other=0.0).to(tl.float32)
    grouped = tl.reshape(w, (ROWS, groups, GROUP))
    heavy = tl.reshape(tl.load(importance + column), (groups, GROUP))
    low, high = tl.minimum(tl.min(grouped, 2), 0.0), tl.maximum(tl.max(grouped, 2), 0.0)
    least = tl.full((ROWS, groups), float("inf"), tl.float32)
    chosen = tl.full((ROWS, groups), 1.0, tl.float32)
    for at in range(count):
        shrink = tl.load(shrinks + at)
        size, zero = _grid(low * shrink, high * shrink, top, middle, SYMMETRIC)
        code = tl.minimum(tl.maximum(libdevice.rint(tl.div_rn(grouped, size[:, :, None])) + zero[:, :, None], 0.0), top)
        off = (code - zero[:, :, None]) * size[:, :, None] - grouped
        error = tl.sum(off * off * heavy[None, :, :], 2)
        better = error < least
        least, chosen = tl.where(better, error, least), tl.where(better, shrink, chosen)
    at = tl.program_id(1) * groups + tl.arange(0, groups)
    tl.store(best + row[:, None] * (ins // GROUP) + at[None, :], chosen, mask=(row < outs)[:, None])
