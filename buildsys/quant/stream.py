"""Calibration windows on their way through a model that is being quantized: one block at a time, hidden states where they have room.

Several GPUs share the windows; each has its part from beginning to end, and what they sum comes together on the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from buildsys.architecture import Role, Site
from buildsys.quant.block import Block, Rotary
from buildsys.quant.model import Model
from buildsys.quant.observe import few, units
from buildsys.quant.parallel import on_each, ordered, within
from buildsys.quant.rotary import tables
from buildsys.quant.sums import Products, Squares, in_parts
from buildsys.step import Resources

LARGE_BYTES = 256 << 20
ERROR_TOKENS = 1024  # about, in whole windows, that a finished block is compared with its source on
KEEP_BYTES = 1 << 30  # of what down_proj reads, from its own question until the block is finished; of more, as `_keeps` says
ROOM = 4  # that share of a GPU's free memory may be used to save time


MLP: tuple[Role, ...] = ("gate", "up", "gate_up", "down")
BEFORE: dict[Site, tuple[Role, ...]] = {"attn_in": (), "o_in": ("q", "k", "v", "qkv"), "mlp_in": ("o",), "down_in": MLP[:-1]}
"""Linears that compute what is read at a site from what was kept at the one before."""

WRITES: dict[Site, Role] = {"o_in": "o", "down_in": "down"}
"""Linears that read at a site and write to the residual stream."""


@dataclass(frozen=True)
class Apart:
    """How far the walk is from the float model, by what is read at a site: the mean over tokens of y x^T, [2, rows, in], of two halves
    of the windows, with so many `tokens`. y is what the float model reads there less x. Where it is `of_outputs`, at linears that write to
    the residual stream, y is that stream behind them in the float model, less what it is here with their weights not yet rounded."""

    crossed: Tensor
    tokens: tuple[int, int]
    of_outputs: bool


@dataclass(frozen=True)
class Moments:
    """The mean over tokens of x x^T, [in, in], x being what is read at a site. `sent`: how many tokens came to an expert's site; where they
    are `few` the mean is over all tokens. `apart`: of a walk beside which the float model is walked."""

    matrix: Tensor
    sent: int | None = None
    apart: Apart | None = None


class Walk:
    """Asked for the second moments of each site of a block in order (`architecture.sites`), then finished with the block's final weights.

    Each question runs only the part of the block between the last site and this one, so that a walk costs about one forward. Of a mixture
    the question is about one expert and the tokens that it is sent: who is sent where is decided once, when attention is done.

    `beside`: the float model is walked too, on the same windows; each question then comes with that model's block, rescaled as this one.
    """

    def __init__(self, model: Model, tokens: Tensor, resources: Resources, beside: bool = False) -> None:  # tokens: [windows, tokens]
        self._dtype = model.dtype
        self._architecture = model.architecture
        self._resources = resources
        self._rotary: dict[str, Rotary] = {device: tables(model.architecture, tokens.shape[1], device) for device in resources.devices}
        # units x [tokens, hidden]: what enters the block; from mlp_in on, what enters its MLP
        self._hidden = units(model, tokens, resources.devices)
        # The same of the float model, moved past attention when o_in is asked for, past the MLP when down_in is
        self._floats = list(self._hidden) if beside else None
        self._attended: list[Tensor] = []  # windows x [tokens, heads * head_dim], between o_in and mlp_in
        self._inner: list[Tensor | None] = []  # windows x [tokens, intermediate], from down_in on, of those for which there is room
        self._room = {device: _room(device) for device in resources.devices}
        self._routed: list[list[Tensor]] = []  # windows x experts x [sent]: which tokens, from a mixture's first site on
        self._tokens = tokens.numel()

    def answers(self, source: Block) -> list[tuple[Tensor, Tensor]]:
        """A few windows that enter the block, and what the source's block makes of each, on the device where that is."""
        device = str(source.weights[self._architecture.attn_norm].device)
        device = next((one for one in self._resources.devices if one == device), self._resources.device)
        windows = [h for unit in self._hidden[:ERROR_TOKENS] for h in (unit if unit.dim() == 3 else [unit])]
        few, there = windows[: max(1, ERROR_TOKENS // windows[0].shape[0])], source.to(self._dtype)
        entering = [h.to(device, copy=True) for h in few]
        return [(h, there.forward(h, self._rotary[device])) for h in entering]

    def error(self, block: Block, answers: Sequence[tuple[Tensor, Tensor]]) -> float:
        """How far a quantized block's outputs are from these of its source: their mean squared distance, as a share of the mean square of
        what the source's block adds to its inputs."""
        device, there, off, added = self._resources.devices[0], block.to(self._dtype), 0.0, 0.0
        for h, wanted in ((h.to(device), wanted.to(device)) for h, wanted in answers):
            off += float((there.forward(h, self._rotary[device]) - wanted).square().sum(dtype=torch.float64))
            added += float((wanted - h).square().sum(dtype=torch.float64))
        return off / max(added, torch.finfo(torch.float32).tiny)

    def gram(self, block: Block, site: Site, source: Block | None = None) -> Moments:
        """Of what is read at `site` given the block's weights as they are now, and beside it what the float model's block makes of it."""
        expert = self._architecture.at(site)[0].expert
        if expert is not None:
            return self._expert(block, site, expert, source)
        kept: list[Tensor | None] = [None] * len(self._hidden)
        writes = (WRITES[site],) if source is not None and site in WRITES else ()
        everywhere = self._everywhere(block, (*BEFORE[site], *writes))
        floats = self._everywhere(source, (*BEFORE[site], *writes) if writes else ()) if source is not None else {}

        def seen(at: int, windows: Sequence[int], device: str) -> tuple[Tensor, Tensor | None]:
            there = everywhere[device]
            x, keep = self._site(there, site, at, device)
            if site == "mlp_in":  # at once: two copies of all hidden states are more than a GPU should hold
                self._hidden[at], self._attended[at] = keep, keep[:0].clone()
            elif site == "o_in" or (site == "down_in" and self._keeps(keep, at - windows[0], device)):
                kept[at] = keep
            return x, self._apart(floats[device], there, site, at, x, device) if floats else None

        if site == "o_in":
            self._attended = []
        matrix, apart = self._summed(site, seen, range(len(self._hidden)), source)
        if site == "o_in":
            self._attended = [keep for keep in kept if keep is not None]
        elif site == "down_in":
            self._inner = kept
        return Moments(matrix.div_(self._tokens), apart=apart)

    def _keeps(self, inner: Tensor, place: int, device: str) -> bool:
        """Whether what down_proj reads of a device's window of this place is kept: where all of it is little, and of several GPUs on each
        as much as it has room for."""
        return inner.nbytes * len(self._hidden) <= KEEP_BYTES or inner.nbytes * (place + 1) <= self._room[device]

    def _expert(self, block: Block, site: Site, expert: int, source: Block | None) -> Moments:
        if not self._routed:
            self._route(block)
        sent = sum(len(window[expert]) for window in self._routed)
        everyone, everywhere = few(sent, self._architecture.width(site)), self._everywhere(block.alone(expert), None)
        floats = self._everywhere(source.alone(expert), None) if source is not None else {}

        def read(there: Block, hidden: Sequence[Tensor], at: int, device: str) -> Tensor:
            h = hidden[at] if everyone else hidden[at][self._routed[at][expert]]
            x = there.mlp_in(h.to(device))
            return x if site.startswith("mlp_in") else there.down_in(x, expert)

        def seen(at: int, windows: Sequence[int], device: str) -> tuple[Tensor, Tensor | None]:
            x = read(everywhere[device], self._hidden, at, device)
            return x, read(floats[device], self._floats, at, device) - x if self._floats is not None and floats else None

        reached = [at for at in range(len(self._hidden)) if everyone or len(self._routed[at][expert])]
        matrix, apart = self._summed(site, seen, reached, source)
        return Moments(matrix.div_(self._tokens if everyone else sent), sent, apart)

    def _apart(self, source: Block, block: Block, site: Site, at: int, x: Tensor, device: str) -> Tensor:
        """`Apart`'s y of one window, of which `x` is read; where it is of outputs the float model's window moves on to behind them."""
        assert self._floats is not None
        home, float_h, h = self._floats[at].device, self._floats[at].to(device), self._hidden[at].to(device)
        if site == "attn_in":
            return source.attn_in(float_h) - x
        if site == "mlp_in":
            return source.mlp_in(float_h) - x
        if site == "o_in":
            after = source.after_attention(float_h, source.o_in(source.attn_in(float_h), self._rotary[device]))
            here = block.after_attention(h, x)
        else:
            after, here = source.mlp(float_h), block.after_mlp(h, x)
        self._floats[at] = after.to(home)
        return after - here

    def _route(self, block: Block) -> None:
        """Leaves attention: from here on hidden states are what enters the experts."""
        experts = self._architecture.experts
        assert experts is not None
        routed: list[list[Tensor]] = [[] for _ in self._hidden]
        everywhere = self._everywhere(block, ("o",))

        def share(device: str, windows: Sequence[int]) -> None:
            there = everywhere[device]

            def leave(at: int) -> tuple[Tensor, list[Tensor]]:
                home = self._hidden[at].device
                h = there.after_attention(self._hidden[at].to(device), self._attended[at].to(device))
                return h.to(home), [tokens.to(home) for tokens, _ in there.routed(there.mlp_in(h), experts)]

            for at, (h, sent) in zip(windows, ordered(leave, windows, self._resources), strict=True):
                self._hidden[at], self._attended[at], routed[at] = h, h[:0].clone(), sent

        on_each(share, len(self._hidden), self._resources.devices)
        self._routed = routed

    def finish(self, block: Block, source: Block | None = None) -> None:
        """Leave a block whose sites were all asked for; the float model's too, where its experts were asked for apart."""
        self._routed, inner, self._inner = [], self._inner, []

        def after(there: Block, h: Tensor, at: int, _: str) -> Tensor:
            held = inner[at] if inner else None
            return there.mlp(h) if held is None else there.after_mlp(h, held.to(h.device))

        every = bool(inner) and all(held is not None for held in inner)
        self._replace(self._hidden, block, ("down",) if every else MLP, after)
        if source is not None and self._floats is not None and self._architecture.experts is not None:
            self._replace(self._floats, source, MLP, lambda there, h, *_: there.mlp(h))

    def replay(self, block: Block, source: Block | None = None) -> None:
        """Pass through a block that was finished earlier, and through the float model's."""
        for hidden, passed in ((self._hidden, block), (self._floats, source)):
            if hidden is not None and passed is not None:
                self._replace(hidden, passed, None, lambda there, h, _, device: there.forward(h, self._rotary[device]))

    def _everywhere(self, block: Block, roles: Sequence[Role] | None) -> dict[str, Block]:
        """What of the block computes with the linears of these roles (None: all of it), as it computes, on each device: as little as may be
        is sent from one to another, and before the sender is given work that a copy would wait for."""
        left_out = {linear.name for linear in self._architecture.linears if roles is not None and linear.role not in roles}
        kept = {name: tensor for name, tensor in block.weights.items() if name.rpartition(".")[0] not in left_out}
        computes = replace(block, weights=kept).to(self._dtype)
        return {device: computes.to(device) for device in self._resources.devices}

    def _replace(
        self, hidden: list[Tensor], block: Block, roles: Sequence[Role] | None, work: Callable[[Block, Tensor, int, str], Tensor]
    ) -> None:
        """Every window's hidden state by what `work` makes of the block's linears of these roles, it, its number and its device."""
        everywhere = self._everywhere(block, roles)

        def share(device: str, windows: Sequence[int]) -> None:
            there = everywhere[device]

            def after(at: int) -> Tensor:
                return work(there, hidden[at].to(device), at, device).to(hidden[at].device)

            for at, h in zip(windows, ordered(after, windows, self._resources), strict=True):
                hidden[at] = h

        on_each(share, len(hidden), self._resources.devices)

    def _summed(
        self,
        site: Site,
        seen: Callable[[int, Sequence[int], str], tuple[Tensor, Tensor | None]],
        reached: Sequence[int],
        source: Block | None,
    ) -> tuple[Tensor, Apart | None]:
        """The sum of x x^T over the windows that are `reached`, and the means of y x^T where there is a float `source`: x and y are what is
        `seen` of a window by its number, those of its device and that. All devices' shares, in their order, on the first."""
        width, writes = self._architecture.width(site), site in WRITES
        rows = self._architecture.hidden_size if writes else width
        self._make_room(4 * width * width)

        def share(device: str, windows: range) -> tuple[Squares, Products | None]:
            squares, products = Squares(width, device), Products(rows, width, device) if source is not None else None

            def read(part: Sequence[int]) -> tuple[Squares, Products | None]:
                mine, apart = squares.part(), products.part() if products is not None else None
                for at in part:
                    x, y = seen(at, windows, device)
                    mine.include(x)
                    if apart is not None and y is not None:
                        apart.include(at, y, x)
                return mine, apart

            limited = within(self._resources, 4 * width * width + (8 * rows * width if source is not None else 0))
            for mine, apart in ordered(read, in_parts([at for at in reached if at in windows], device), limited):
                squares.add(mine)
                if products is not None and apart is not None:
                    products.add(apart)
            return squares, products

        (total, products), *others = on_each(share, len(self._hidden), self._resources.devices)
        for squares, apart in others:
            total.add(squares)
            if products is not None and apart is not None:
                products.add(apart)
        return total.sum(), Apart(*products.halves(), of_outputs=writes) if products is not None else None

    def _make_room(self, matrix_bytes: int) -> None:
        if self._resources.device != "cpu" and matrix_bytes >= LARGE_BYTES and min(self._room.values()) < matrix_bytes:
            # What smaller tensors left in pieces holds no matrix of this size, and would be kept beside it. Nobody computes meanwhile.
            for device in self._resources.devices:
                torch.cuda.synchronize(device)
            torch.cuda.empty_cache()

    def _site(self, block: Block, site: Site, at: int, device: str) -> tuple[Tensor, Tensor]:
        """What one window reads at `site`, and what later sites need of it."""
        home = self._hidden[at].device
        h = self._hidden[at].to(device)
        if site == "attn_in":
            return block.attn_in(h), h
        if site == "o_in":
            x = block.o_in(block.attn_in(h), self._rotary[device])
            return x, x.to(home)
        if site == "mlp_in":
            h = block.after_attention(h, self._attended[at].to(device))
            return block.mlp_in(h), h.to(home)
        x = block.down_in(block.mlp_in(h))
        return x, x


def _room(device: str) -> int:
    """Bytes that may be used to save time where several GPUs share the work; one alone is asked for as little as may be."""
    return torch.cuda.mem_get_info(device)[0] // ROOM if ":" in device else 0
