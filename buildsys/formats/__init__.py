"""How codes lie on disk. A module: Knobs (a `Layout`), VERSION, and what follows.

`QUANT_METHOD`: what config.json calls the format. `FLOATS`: the type of every tensor that stays float. `accepts(scheme)`, `fits(scheme, in,
out)`: why it cannot hold a scheme, or a linear of this shape. `mixes(kinds)`, `keeps_float(names)`: why it cannot hold several schemes in
one model, or leave these linears of the blocks float. `layout(name, scheme, in, out)`: the tensors that stand for a linear. `pack(linear)`,
`unpack(tensors, scheme)`: the linear to them and back, bit for bit. `config(schemes, not_converted)`, `schemes_of(config)`: the model's
`quantization_config` and back (`scheme_of`: the default alone).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal, cast, get_args

from pydantic import Field

from buildsys.errors import BuildError
from buildsys.scheme import Bits, GroupSize, Scheme, Schemes
from buildsys.slots import Frozen

FUSED: Final = MappingProxyType({"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")})
"""Modules that vLLM makes of several linears, and asks for by their own names."""

_PATTERN = re.compile(r"\^(?P<parent>(?:[\w-]|\\[.-])*)\((?P<parts>[\w|-]+)\)\$")


class Layout(Frozen):
    """What every format lets a recipe choose."""

    as_: Literal["llama"] | None = Field(
        default=None, alias="as", description="write the model in this architecture's layout, which needs no remote code (internlm2)"
    )


def weights_alone(scheme: Scheme) -> str | None:
    """Why a format for whole-number weights beside float activations cannot hold a scheme."""
    if scheme.number != "int":
        return f"holds whole numbers, quantization.number is {scheme.number}"
    if scheme.activations != "none":
        return f"is for float activations, quantization.activations is {scheme.activations}"
    return None


def one_for_all(kinds: Sequence[Scheme]) -> str | None:
    """Why a format with a single scheme for all linears cannot hold these."""
    return f"holds one scheme for all linears, asked are {', '.join(map(str, kinds))}" if len(set(kinds)) > 1 else None


def by_scheme(schemes: Schemes) -> list[tuple[Scheme, list[str]]]:
    """The linears with schemes of their own: each scheme with their names, always in the same order."""
    found: dict[Scheme, list[str]] = {}
    for name, scheme in sorted(schemes.own.items()):
        if scheme != schemes.default and name not in schemes.left_float:
            found.setdefault(scheme, []).append(name)
    return list(found.items())


def patterns(names: Iterable[str]) -> list[str]:
    """Regular expressions that match the whole names of these modules, and of what an engine fuses of several of them, and no others."""
    left, found = set(names), dict[str, None]()
    for name in sorted(left):
        parent, dot, own = name.rpartition(".")
        parts: tuple[str, ...] = (own,)
        for fused, of in FUSED.items():
            if own in of and all(f"{parent}{dot}{part}" in left for part in of):
                parts = (*of, fused)
        found[f"^{re.escape(parent + dot)}({'|'.join(parts)})$"] = None
    return list(found)


def named(pattern: str) -> tuple[str, ...]:
    """The modules that one of `patterns` was written for: its inverse. Another's expression is refused, and never run."""
    match = _PATTERN.fullmatch(pattern)
    if match is None:
        raise unknown(f"names modules by the expression {pattern[:200]!r}")
    parent = re.sub(r"\\(.)", r"\1", match["parent"])
    parts = match["parts"].split("|")
    return tuple(parent + part for part in parts if len(parts) == 1 or part not in FUSED)  # alone it is a linear of the model's own (Phi-3)


def unknown(what: str) -> BuildError:
    """A `quantization_config` that says what no format of ours writes."""
    return BuildError("config.json", f"quantization_config {what}", "give a model whose layout one of buildsys's formats writes")


def expect(config: Mapping[str, Any], **wanted: Any) -> None:
    """Refuse a config that says otherwise."""
    for key, value in wanted.items():
        if config.get(key) != value:
            raise unknown(f"has {key}: {config.get(key)!r}, not {value!r}")


def names_said(config: Mapping[str, Any], key: str) -> frozenset[str]:
    """The list of names under a key that may be absent or null."""
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise unknown(f"has {key}: {str(names)[:200]}, not a list of names")
    return frozenset(names)


def weights_said(said: Mapping[str, Any], bits: str, *, symmetric: bool) -> Scheme:
    """The scheme that `said` tells under the keys `bits` and group_size. A boolean is no number, however Python compares it."""
    for key, known in ((bits, get_args(Bits)), ("group_size", get_args(GroupSize))):
        if type(said.get(key)) is not int or said[key] not in known:
            raise unknown(f"has {key}: {said.get(key)!r}; known are {', '.join(map(str, known))}")
    return Scheme(cast(Bits, said[bits]), cast(GroupSize, said["group_size"]), symmetric)
