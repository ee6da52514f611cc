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
from buildsys.quant.observe import Squares, few, units
from buildsys.quant.parallel import on_each, ordered, within
from buildsys.quant.rotary import tables
from buildsys.step import Resources

LARGE_BYTES = 256 << 20
ERROR_TOKENS = 1024  # about, in whole windows, that a finished block is compared with its source on
KEEP_BYTES = 1 << 30  # of what down_proj reads, from its own question until the block is finished; of more, as `_keeps` says
ROOM = 4  # that share of a GPU's free memory may be used to save time


MLP: tuple[Role, ...] = ("gate", "up", "gate_up", "down")
BEFORE: dict[Site, tuple[Role, ...]] = {"attn_in": (), "o_in": ("q", "k", "v", "qkv"), "mlp_in": ("o",), "down_in": MLP[:-1]}
"""Linears that compute what is read at a site from what was kept at the one before."""


@dataclass(frozen=True)
class Moments:
    """The mean over tokens of x x^T, [in, in], x being what is read at a site. `sent`: how many tokens came to an expert's site; where they
    are `few` the mean is over all tokens."""

    matrix: Tensor
    sent: int | None = None


class Walk:
    """Asked for the second moments of each site of a block in order (`architecture.sites`), then finished with the block's final weights.

    Each question runs only the part of the block between the last site and this one, so that a walk costs about one forward. Of a mixture
    the question is about one expert and the tokens that it is sent: who is sent where is decided once, when attention is done.
    """

    def __init__(self, model: Model, tokens: Tensor, resources: Resources) -> None:  # tokens: [windows, tokens]
        self._dtype = model.dtype
        self._architecture = model.architecture
        self._resources = resources
        self._rotary: dict[str, Rotary] = {device: tables(model.architecture, tokens.shape[1], device) for device in resources.devices}
        # units x [tokens, hidden]: what enters the block; from mlp_in on, what enters its MLP
        self._hidden = units(model, tokens, resources.devices)
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

    def gram(self, block: Block, site: Site) -> Moments:
        """Of what is read at `site` given the block's weights as they are now."""
        expert = self._architecture.at(site)[0].expert
        if expert is not None:
            return self._expert(block, site, expert)
        kept: list[Tensor | None] = [None] * len(self._hidden)
        everywhere = self._everywhere(block, BEFORE[site])

        def share(device: str, windows: Sequence[int]) -> Squares:
            there = everywhere[device]
            squares = Squares(self._architecture.width(site), device)

            def read(part: Sequence[int]) -> Tensor:
                return squares.of(seen(at) for at in part)

            def seen(at: int) -> Tensor:
                x, keep = self._site(there, site, at, device)
                if site == "mlp_in":  # at once: two copies of all hidden states are more than a GPU should hold
                    self._hidden[at], self._attended[at] = keep, keep[:0].clone()
                elif site == "o_in" or (site == "down_in" and self._keeps(keep, at - windows[0], device)):
                    kept[at] = keep
                return x

            for part in ordered(read, squares.parts(windows), self._within(site)):
                squares.add(part)
            return squares

        if site == "o_in":
            self._attended = []
        total = self._together(share, self._architecture.width(site))
        if site == "o_in":
            self._attended = [keep for keep in kept if keep is not None]
        elif site == "down_in":
            self._inner = kept
        return Moments(total.div_(self._tokens))

    def _keeps(self, inner: Tensor, place: int, device: str) -> bool:
        """Whether what down_proj reads of a device's window of this place is kept: where all of it is little, and of several GPUs on each
        as much as it has room for."""
        return inner.nbytes * len(self._hidden) <= KEEP_BYTES or inner.nbytes * (place + 1) <= self._room[device]

    def _expert(self, block: Block, site: Site, expert: int) -> Moments:
        if not self._routed:
            self._route(block)
        width, sent = self._architecture.width(site), sum(len(window[expert]) for window in self._routed)
        everyone, everywhere = few(sent, width), self._everywhere(block.alone(expert), None)

        def share(device: str, windows: Sequence[int]) -> Squares:
            there, squares = everywhere[device], Squares(width, device)

            def read(part: Sequence[int]) -> Tensor:
                return squares.of(seen(at) for at in part)

            def seen(at: int) -> Tensor:
                h = self._hidden[at] if everyone else self._hidden[at][self._routed[at][expert]]
                x = there.mlp_in(h.to(device))
                return x if site.startswith("mlp_in") else there.down_in(x, expert)

            reached = [at for at in windows if everyone or len(self._routed[at][expert])]
            for part in ordered(read, squares.parts(reached), self._within(site)):
                squares.add(part)
            return squares

        return Moments(self._together(share, width).div_(self._tokens if everyone else sent), sent)

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

    def finish(self, block: Block) -> None:
        """Leave a block whose sites were all asked for."""
        self._routed, inner, self._inner = [], self._inner, []

        def after(there: Block, h: Tensor, at: int, _: str) -> Tensor:
            held = inner[at] if inner else None
            return there.mlp(h) if held is None else there.after_mlp(h, held.to(h.device))

        every = bool(inner) and all(held is not None for held in inner)
        self._replace(block, ("down",) if every else MLP, after)

    def replay(self, block: Block) -> None:
        """Pass through a block that was finished earlier."""
        self._replace(block, None, lambda there, h, _, device: there.forward(h, self._rotary[device]))

    def _everywhere(self, block: Block, roles: Sequence[Role] | None) -> dict[str, Block]:
        """What of the block computes with the linears of these roles (None: all of it), as it computes, on each device: as little as may be
        is sent from one to another, and before the sender is given work that a copy would wait for."""
        left_out = {linear.name for linear in self._architecture.linears if roles is not None and linear.role not in roles}
        kept = {name: tensor for name, tensor in block.weights.items() if name.rpartition(".")[0] not in left_out}
        computes = replace(block, weights=kept).to(self._dtype)
        return {device: computes.to(device) for device in self._resources.devices}

    def _replace(self, block: Block, roles: Sequence[Role] | None, work: Callable[[Block, Tensor, int, str], Tensor]) -> None:
        """Every window's hidden state by what `work` makes of the block's linears of these roles, it, its number and its device."""
        everywhere = self._everywhere(block, roles)

        def share(device: str, windows: Sequence[int]) -> None:
            there = everywhere[device]

            def after(at: int) -> Tensor:
                return work(there, self._hidden[at].to(device), at, device).to(self._hidden[at].device)

            for at, h in zip(windows, ordered(after, windows, self._resources), strict=True):
                self._hidden[at] = h

        on_each(share, len(self._hidden), self._resources.devices)

    def _within(self, site: Site) -> Resources:
        return within(self._resources, 4 * self._architecture.width(site) ** 2)

    def _together(self, share: Callable[[str, Sequence[int]], Squares], width: int) -> Tensor:
        """The sum of all devices' shares [width, width], in their order, on the first."""
        matrix_bytes = 4 * width * width
        if self._resources.device != "cpu" and matrix_bytes >= LARGE_BYTES and min(self._room.values()) < matrix_bytes:
            # What smaller tensors left in pieces holds no matrix of this size, and would be kept beside it. Nobody computes meanwhile.
            for device in self._resources.devices:
                torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        total, *others = on_each(share, len(self._hidden), self._resources.devices)
        for other in others:
            total.take(other)
        return total.sum()

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
