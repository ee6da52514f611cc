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

BLOCK = 512  # input channels that a launch of the solvers takes; errors of all others reach it by one product
MANY = 8448  # outputs from which on the solvers' programs take more of them
NARROW = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5) else 16  # earlier ones have no products as narrow as 8
STRIP = 32  # input channels whose errors the solvers' programs apply one by one; those of more by one product
ROWS = 32  # outputs in a tile of the searches
CHANNELS = 128  # input channels in a tile of the searches: a Gram block
PART = 32  # input channels that the searches look at together; groups are made of them, so that one kernel has groups of every usual size


def searchable(scheme: Scheme, in_features: int) -> bool:
    """Whether the searches here hold the scheme: groups have to lie inside a tile, and codes are whole numbers."""
    group = scheme.group(in_features)
    return scheme.number == "int" and group <= CHANNELS and CHANNELS % group == 0 and in_features % CHANNELS == 0


def solvable(weight: Tensor) -> bool:
    """Whether `round_block` and `refine_block` take a matrix [out, in]."""
    return weight.is_cuda and weight.dtype == torch.float32 and weight.shape[1] % CHANNELS == 0


def _shape(outs: int) -> dict[str, int]:
    """How many outputs a program of the solvers has, and how many input channels' errors it weighs at a time: few outputs, so that there is
    a program for every scheduler of every processor, or more, so that H is read less often. A program is one warp: each step needs the one
    before it, and several warps would wait for one another at each. Measured on an H200."""
    few = outs <= MANY
    return {"WIDTH": NARROW if few else 16, "DEPTH": 64 if few else 32, "STRIP": STRIP, "num_warps": 1}


def round_block(
    target: Tensor, wanted: Tensor, factor: Tensor, group: Tensor, scale: Tensor, zero: Tensor, codes: Tensor, errors: Tensor, top: int
) -> None:
    """compensate.round_block on a GPU: rows of a weight do not know of one another, so a program takes a few of them through all columns
    of the block, STRIP of them at a time in registers. float32; `factor` [block, block], `group` [block], scale and zero [groups, out],
    the others [block, out]."""
    ins, outs = target.shape
    shape, pays = _shape(outs), factor.t().contiguous()  # a step reads what one channel's error leaves to those before it
    _round_block[(triton.cdiv(outs, shape["WIDTH"]),)](
        target, wanted, pays, group, scale, zero, codes, errors, ins, outs, float(top), **shape,
    )  # fmt: skip


@triton.jit
def _rounded(value, size, middle, top):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(libdevice.rint(tl.div_rn(value, size)) + middle, 0.0), top)


@triton.jit
def _round_block(  # type: ignore[no-untyped-def]
    target, wanted, pays, group, scale, zero, codes, errors, ins, outs, top,
    WIDTH: tl.constexpr, STRIP: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    column = (tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    inside = column < outs
    row, depth = tl.arange(0, STRIP).to(tl.int64), tl.arange(0, DEPTH).to(tl.int64)
    for done in range(ins // STRIP):
        first = ins - (done + 1) * STRIP
        place = (first + row)[:, None] * outs + column[None, :]
        tile = tl.load(target + place, mask=inside[None, :], other=0.0)
        for start in range(first + STRIP, ins, DEPTH):  # what the errors of the channels after these leave to these
            seen = (start + depth) < ins
            share = tl.load(pays + (first + row)[:, None] + (start + depth)[None, :] * ins, mask=seen[None, :], other=0.0)
            error = tl.load(errors + (start + depth)[:, None] * outs + column[None, :], mask=inside[None, :] & seen[:, None], other=0.0)
            tile = tl.dot(share, error, tile, input_precision="tf32")
        # Memory answers in hundreds of cycles: what a step needs besides the one before it is asked for a step ahead, a group two ahead.
        last = first + STRIP - 1
        here = tl.load(group + last) * outs + column
        size, middle = tl.load(scale + here, mask=inside, other=1.0), tl.load(zero + here, mask=inside, other=0.0)
        want = tl.load(wanted + last * outs + column, mask=inside, other=0.0)
        above = tl.load(pays + last * ins + first + row, mask=row < STRIP - 1, other=0.0)
        coming = tl.load(group + tl.maximum(last - 1, 0))
        made, off = tl.zeros_like(tile), tl.zeros_like(tile)
        for step in range(STRIP):
            at = STRIP - 1 - step
            then = tl.maximum(first + at - 1, 0)
            here = coming * outs + column
            next_size, next_middle = tl.load(scale + here, mask=inside, other=1.0), tl.load(zero + here, mask=inside, other=0.0)
            next_want = tl.load(wanted + then * outs + column, mask=inside, other=0.0)
            next_above = tl.load(pays + then * ins + first + row, mask=row < at - 1, other=0.0)
            coming = tl.load(group + tl.maximum(then - 1, 0))
            this = (row == at)[:, None]
            code = _rounded(tl.sum(tl.where(this, tile, 0.0), 0), size, middle, top)
            error = want - (code - middle) * size
            made, off = tl.where(this, code[None, :], made), tl.where(this, error[None, :], off)
            tile += above[:, None] * error[None, :]
            size, middle, want, above = next_size, next_middle, next_want, next_above
        tl.store(codes + place, made, mask=inside[None, :])
        tl.store(errors + place, off, mask=inside[None, :])
        tl.debug_barrier()  # the errors are read by other threads than wrote them


def refine_block(
    gram: Tensor, added: Tensor, gradient: Tensor, scale: Tensor, zero: Tensor, centered: Tensor, errors: Tensor, top: int, least: float
) -> None:
    """One sweep of refine.refined over a block of whole groups. H of the block is `gram` [block, block] with `added` [block] on its
    diagonal, `gradient` [block, out] is H E^T before it; scale and zero [groups, out], `centered` codes and `errors` [block, out].
    Updates scale, centered and errors."""
    ins, outs = centered.shape
    shape, moved, spare = _shape(outs), torch.empty_like(errors), torch.empty_like(errors)
    _refine_block[(triton.cdiv(outs, shape["WIDTH"]),)](
        gram, gram.stride(0), added, gradient, scale, zero, centered, errors, moved, spare, ins, outs, float(top), least,
        GROUP=ins // len(scale), **shape,
    )  # fmt: skip


@triton.jit
def _refine_block(  # type: ignore[no-untyped-def]
    gram, down, added, gradient, scale, zero, centered, errors, moved, spare, ins, outs, top, least,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, STRIP: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    column = (tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    inside = column < outs
    row, depth = tl.arange(0, STRIP).to(tl.int64), tl.arange(0, DEPTH).to(tl.int64)
    for done in range(ins // GROUP):
        here = ins // GROUP - 1 - done
        first = here * GROUP
        curvature, lean = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
        for part in range(GROUP // STRIP):  # what the scale should be; slopes and pulls are kept for the codes
            low = first + part * STRIP
            strip = (low + row)[:, None] * outs + column[None, :]
            slope = tl.load(gradient + strip, mask=inside[None, :], other=0.0)
            for start in range(first + GROUP, ins, DEPTH):  # what has changed since `gradient` was taken
                seen = (start + depth) < ins
                moments = tl.load(gram + (low + row)[:, None] * down + (start + depth)[None, :], mask=seen[None, :], other=0.0)
                change = tl.load(moved + (start + depth)[:, None] * outs + column[None, :], mask=inside[None, :] & seen[:, None], other=0.0)
                slope = tl.dot(moments, change, slope, input_precision="tf32")
            codes = tl.load(centered + strip, mask=inside[None, :], other=0.0)
            pull = codes * tl.load(added + low + row)[:, None]
            for start in range(first, first + GROUP, STRIP):
                moments = tl.load(gram + (low + row)[:, None] * down + (start + row)[None, :])
                other = tl.load(centered + (start + row)[:, None] * outs + column[None, :], mask=inside[None, :], other=0.0)
                pull = tl.dot(moments, other, pull, input_precision="tf32")
            curvature += tl.sum(codes * pull, 0)
            lean += tl.sum(codes * slope, 0)
            tl.store(moved + strip, slope, mask=inside[None, :])
            tl.store(spare + strip, pull, mask=inside[None, :])
        size = tl.load(scale + here * outs + column, mask=inside, other=1.0)
        better = (size + lean / curvature).to(tl.float16).to(tl.float32)
        better = tl.where((curvature > 0) & (better >= least) & (better < 65505.0), better, size)  # neither too small, Inf nor NaN
        tl.store(scale + here * outs + column, better, mask=inside)
        middle = tl.load(zero + here * outs + column, mask=inside, other=0.0)
        tl.debug_barrier()  # what is kept is read by other threads than wrote it
        for part in range(GROUP // STRIP):
            low = first + GROUP - (part + 1) * STRIP
            strip = (low + row)[:, None] * outs + column[None, :]
            codes = tl.load(centered + strip, mask=inside[None, :], other=0.0)
            slope = tl.load(moved + strip, mask=inside[None, :], other=0.0)
            slope -= tl.load(spare + strip, mask=inside[None, :], other=0.0) * (better - size)[None, :]
            for start in range(low + STRIP, first + GROUP, STRIP):
                moments = tl.load(gram + (low + row)[:, None] * down + (start + row)[None, :])
                off = tl.load(moved + (start + row)[:, None] * outs + column[None, :], mask=inside[None, :], other=0.0)
                slope = tl.dot(moments, off, slope, input_precision="tf32")
            steep = tl.load(gram + (low + row) * down + low + row) + tl.load(added + low + row)
            tile = codes * better[None, :] + slope / steep[:, None]
            last = low + STRIP - 1
            old = tl.load(centered + last * outs + column, mask=inside, other=0.0)
            above = tl.load(gram + last * down + low + row, mask=row < STRIP - 1, other=0.0) / steep  # a row: H is symmetric
            made, off = tl.zeros_like(tile), tl.zeros_like(tile)
            for step in range(STRIP):
                at = STRIP - 1 - step
                then = tl.maximum(low + at - 1, 0)  # asked for a step ahead, as above
                next_old = tl.load(centered + then * outs + column, mask=inside, other=0.0)
                next_above = tl.load(gram + then * down + low + row, mask=row < at - 1, other=0.0) / steep
                this = (row == at)[:, None]
                code = _rounded(tl.sum(tl.where(this, tile, 0.0), 0), better, middle, top) - middle
                change = old * better - code * better
                made, off = tl.where(this, code[None, :], made), tl.where(this, change[None, :], off)
                tile += above[:, None] * change[None, :]
                old, above = next_old, next_above
            tl.debug_barrier()  # all have read the old codes
            tl.store(centered + strip, made, mask=inside[None, :])
            tl.store(moved + strip, off, mask=inside[None, :])
            tl.store(spare + strip, off - codes * (better - size)[None, :], mask=inside[None, :])
            tl.debug_barrier()
        for part in range(GROUP // STRIP):  # until here `moved` was without what the new scale moves, which the slopes knew
            strip = (first + part * STRIP + row)[:, None] * outs + column[None, :]
            change = tl.load(spare + strip, mask=inside[None, :], other=0.0)
            tl.store(moved + strip, change, mask=inside[None, :])
            tl.store(errors + strip, tl.load(errors + strip, mask=inside[None, :], other=0.0) + change, mask=inside[None, :])
        tl.debug_barrier()


def rounding_errors(weight: Tensor, gram: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:  # -> [candidates]
    """search.rounding_error of every row of `scales` [candidates, in] at once: each weight [out, in] is read from memory once."""
    outs, ins = weight.shape
    grid = (triton.cdiv(outs, ROWS), ins // CHANNELS)
    found = torch.empty(len(scales), *grid, device=weight.device)
    _rounding_errors[grid](
        weight, gram, scales, found, outs, ins, len(scales), grid[0] * grid[1], float(scheme.top), float(scheme.middle),
        *_parts(scheme.group(ins)), SYMMETRIC=scheme.symmetric, ROWS=ROWS, CHANNELS=CHANNELS, num_warps=4,
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


def _parts(group: int) -> tuple[int, int]:
    """How many parts a group has, and how many input channels a part."""
    part = min(group, PART)
    return group // part, part


@triton.jit
def _same_group(joined, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[1, parts, parts]: whether two parts are of one group of `joined` parts."""
    group = tl.arange(0, PARTS) // joined
    return (group[:, None] == group[None, :])[None, :, :]


@triton.jit
def _ends(parted, same):  # type: ignore[no-untyped-def]
    """Of [rows, parts, channels] for each part the least and the largest of its group, and zero."""
    low, high = tl.minimum(tl.min(parted, 2), 0.0), tl.maximum(tl.max(parted, 2), 0.0)
    return tl.min(tl.where(same, low[:, None, :], 0.0), 2), tl.max(tl.where(same, high[:, None, :], 0.0), 2)


@triton.jit(do_not_specialize=["candidates", "programs", "joined"])
def _rounding_errors(  # type: ignore[no-untyped-def]
    weight, gram, scales, found, outs, ins, candidates, programs, top, middle, joined,
    PART: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    column = tl.program_id(1) * CHANNELS + channel
    w = tl.load(weight + row[:, None] * ins + column[None, :], mask=(row < outs)[:, None], other=0.0).to(tl.float32)
    moments = tl.load(gram + tl.program_id(1) * CHANNELS * CHANNELS + channel[:, None] * CHANNELS + channel[None, :])
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    same = _same_group(joined, CHANNELS // PART)
    for candidate in range(candidates):
        scale = tl.load(scales + candidate * ins + column)
        parted = tl.reshape(w * scale[None, :], (ROWS, CHANNELS // PART, PART))
        low, high = _ends(parted, same)
        size, zero = _grid(low, high, top, middle, SYMMETRIC)
        code = tl.minimum(tl.maximum(libdevice.rint(tl.div_rn(parted, size[:, :, None])) + zero[:, :, None], 0.0), top)
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
        *_parts(group), SYMMETRIC=scheme.symmetric, ROWS=ROWS, CHANNELS=CHANNELS, num_warps=4,
    )  # fmt: skip
    return best


@triton.jit(do_not_specialize=["count", "joined"])
def _least_error_shrinks(  # type: ignore[no-untyped-def]
    weight, importance, shrinks, best, outs, ins, count, top, middle, joined,
    PART: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    parts: tl.constexpr = CHANNELS // PART
    w = tl.load(weight + row[:, None] * ins + column[None, :], mask=(row < outs)[:, None], other=0.0).to(tl.float32)
    parted = tl.reshape(w, (ROWS, parts, PART))
    heavy = tl.reshape(tl.load(importance + column), (parts, PART))
    same = _same_group(joined, parts)
    low, high = _ends(parted, same)
    least = tl.full((ROWS, parts), float("inf"), tl.float32)
    chosen = tl.full((ROWS, parts), 1.0, tl.float32)
    for at in range(count):
        shrink = tl.load(shrinks + at)
        size, zero = _grid(low * shrink, high * shrink, top, middle, SYMMETRIC)
        code = tl.minimum(tl.maximum(libdevice.rint(tl.div_rn(parted, size[:, :, None])) + zero[:, :, None], 0.0), top)
        off = (code - zero[:, :, None]) * size[:, :, None] - parted
        error = tl.sum(off * off * heavy[None, :, :], 2)
        error = tl.sum(tl.where(same, error[:, None, :], 0.0), 2)  # of the whole group, and so alike for its parts
        better = error < least
        least, chosen = tl.where(better, error, least), tl.where(better, shrink, chosen)
    at = (tl.program_id(1) * parts + tl.arange(0, parts)) // joined
    tl.store(best + row[:, None] * (ins // (PART * joined)) + at[None, :], chosen, mask=(row < outs)[:, None])
