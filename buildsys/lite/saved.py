"""The folder that lite saves, read as the blocks that our own quantize step writes: from there on everything is the same.

Its tensors have the source's names, and its linears lie as a format of ours does (`awq`, `smooth_quant`), so that format's `unpack` reads
them. Scales of W8A8 are float32 there, and stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys.errors import BuildError
from buildsys.scheme import Scheme, Schemes

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.architecture import Architecture
    from buildsys.io.checkpoint import Checkpoint
    from buildsys.quant.linear import QuantizedLinear

Unpack = Callable[[Mapping[str, "Tensor"], Scheme], "QuantizedLinear"]
BUG = "this is a bug in buildsys: please report it with the step's log"


@dataclass(frozen=True)
class Saved:
    """What lite saved. Its methods raise BuildError at `where` for what is not as asked."""

    made: Checkpoint
    architecture: Architecture
    schemes: Schemes
    unpack: Unpack
    where: str

    def linear(self, name: str) -> QuantizedLinear:
        """One linear by its whole name."""
        scheme = self.schemes.of(name)
        assert scheme is not None, name  # none stays float: the backend refuses such a recipe
        found = {part: f"{name}.{part}" for part in ("qweight", "qzeros", "scales", "weight", "scale") if f"{name}.{part}" in self.made}
        try:
            return self.unpack({part: self.made.load(whole, None) for part, whole in found.items()}, scheme)
        except (KeyError, AssertionError) as error:
            held = ", ".join(f"{part} {self.made.entry(whole).dtype} {list(self.made.shape(whole))}" for part, whole in found.items())
            what = f"LMDeploy saved {name} as {held or 'no tensor'}, which is no {scheme} ({type(error).__name__} {error})"
            raise BuildError(self.where, what, BUG) from None

    def floats(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors that stay float, by whole names, in float16."""
        from buildsys.quant.rounding import to_half

        missing = [name for name in names if name not in self.made]
        if missing:
            raise BuildError(self.where, f"LMDeploy saved no {missing[0]}; {len(missing)} tensors are missing", BUG)
        return {name: to_half(self.made.load(name, self.made.dtype(name)), name) for name in names}

    def check_outside(self, source: Mapping[str, Path]) -> None:
        """Embeddings, the last norm and the head are packed from the source: lite must have left them as they are."""
        import torch

        from buildsys.io.checkpoint import Checkpoint
        from buildsys.quant.rounding import to_half

        a, original = self.architecture, Checkpoint(source)
        for name in (a.embed, a.final_norm, *([a.lm_head] if a.lm_head is not None else [])):
            if not torch.equal(self.floats([name])[name], to_half(original.load(name, original.dtype(name)), name)):
                raise BuildError(self.where, f"LMDeploy changed {name}, which it was to leave as it is", BUG)


def write_blocks(saved: Saved, stage: Path) -> None:
    """A block file for each layer into `stage`, and beside it the errors of its linears: none, as lite measures none."""
    from buildsys import disk
    from buildsys.quant.blocks import save_block
    from buildsys.quant.quantize import block_name, errors_name

    a = saved.architecture
    for layer in range(a.layers):
        prefix = a.prefix(layer)
        linears = {linear.name: saved.linear(prefix + linear.name) for linear in a.linears}
        rest = [name for name in a.block_tensors() if name.removesuffix(".weight") not in linears]
        floats = saved.floats([prefix + name for name in rest])
        disk.write(stage / errors_name(layer), b"{}")
        save_block(stage / block_name(layer), linears, {name.removeprefix(prefix): tensor for name, tensor in floats.items()})
