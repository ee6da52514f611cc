"""Reads artifacts as the descriptions of their layouts say, by division, masks and loops: what our own unpacking is held to.

Nothing of buildsys is used here. compressed-tensors has a reader of its own: the library of that name, which transformers calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Floats = NDArray[np.float32]


def unpack_awq(qweight: NDArray[Any], qzeros: NDArray[Any], scales: NDArray[Any]) -> Floats:
    """A weight [out, in] from AWQ's gemm layout, written from the layout's description: one output channel at a time, by division alone.

    qweight int32 [in, out/8], qzeros int32 [in/group, out/8], scales float16 [in/group, out]. The lowest four bits of a word are output
    channel 0 of its eight; then come channels 2, 4 and 6, and then 1, 3, 5 and 7. A weight is (code - zero) * scale.
    """
    inputs, words = qweight.shape
    group = inputs // qzeros.shape[0]
    weight = np.zeros((8 * words, inputs), dtype=np.float32)
    for lane, channel in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        for word in range(words):
            out = 8 * word + channel
            column = qweight[:, word].astype(np.int64) % 2**32 // 16**lane % 16
            for start in range(0, inputs, group):
                codes = column[start : start + group]
                zero = int(qzeros[start // group, word]) % 2**32 // 16**lane % 16
                weight[out, start : start + group] = (codes - zero) * np.float32(scales[start // group, out])
    return weight


def unpack_gptq(qweight: NDArray[Any], qzeros: NDArray[Any], scales: NDArray[Any], g_idx: NDArray[Any], bits: int, plus: int) -> Floats:
    """A weight [out, in] from GPTQ's layout: codes are `bits` of one long number, the lowest first, which 32-bit words hold end to end.

    qweight int32 [in*bits/32, out], qzeros int32 [groups, out*bits/32], scales float16 [groups, out], g_idx int32 [in]: the group of each
    input channel. `plus` is what the reader adds to zeros: 1 of the kind "gptq", 0 of "gptq_v2".
    """
    codes, zeros = _run_on(qweight.T, bits), _run_on(qzeros, bits).T  # [out, in], [out, groups]
    weight: Floats = (codes - zeros[:, g_idx] - plus).astype(np.float32) * scales.T.astype(np.float32)[:, g_idx]
    return weight


def _run_on(words: NDArray[Any], bits: int) -> NDArray[np.int64]:  # int32 [rows, words] -> [rows, codes]
    digits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return digits.reshape(len(words), -1, bits).astype(np.int64) @ (1 << np.arange(bits))


def weights(artifact: Path) -> dict[str, Floats]:
    """Every tensor of a model under its float name, packed ones unpacked."""
    said = json.loads((artifact / "config.json").read_text())["quantization_config"]
    modules: dict[str, dict[str, NDArray[Any]]] = {}
    for path in sorted(artifact.glob("*.safetensors")):
        for name, value in load_file(path).items():
            module, _, part = name.rpartition(".")
            modules.setdefault(module, {})[part] = value
    found: dict[str, Floats] = {}
    for module, parts in modules.items():
        floats = {part: parts[part].astype(np.float32) for part in ("weight", "bias") if part in parts}
        found |= {f"{module}.{part}": value for part, value in (floats | _unpacked(module, parts, said)).items()}
    return found


def _unpacked(module: str, parts: Mapping[str, NDArray[Any]], said: Mapping[str, Any]) -> dict[str, Floats]:
    method = said["quant_method"]
    if method == "awq" and "qweight" in parts:
        return {"weight": unpack_awq(parts["qweight"], parts["qzeros"], parts["scales"])}
    if method == "gptq" and "qweight" in parts:
        bits, plus = _bits(module, said), {"gptq": 1, "gptq_v2": 0}[said["checkpoint_format"]]
        return {"weight": unpack_gptq(parts["qweight"], parts["qzeros"], parts["scales"], parts["g_idx"], bits, plus)}
    if method == "smooth_quant" and "scale" in parts:
        return {"weight": parts["weight"].astype(np.float32) * parts["scale"]}
    return {}


def _bits(module: str, said: Mapping[str, Any]) -> int:
    """As GPTQModel reads `dynamic`: the first pattern that matches."""
    for pattern, own in said["dynamic"].items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), module):
            assert pattern.startswith("+:"), f"{module} is packed, and {pattern} says that it is not"
            return int(own["bits"])
    return int(said["bits"])


def as_float(artifact: Path, folder: Path) -> Path:
    """The model of `artifact` as a float32 checkpoint, which anyone loads."""
    config = json.loads((artifact / "config.json").read_text())
    del config["quantization_config"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    save_file(weights(artifact), folder / "model.safetensors", {"format": "pt"})
    return folder
