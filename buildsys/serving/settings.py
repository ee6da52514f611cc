"""The engine settings that a recipe decides: as a file of the artifact, as arguments of LMDeploy's commands, as fields of its dataclasses.

Names are those of LMDeploy 0.18: TurbomindEngineConfig and PytorchEngineConfig (lmdeploy/messages.py), cli/serve.py, cli/cli.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from buildsys.architecture import Rope
from buildsys.errors import BuildError

PROFILE = "deploy/lmdeploy.yaml"
LMDEPLOY = "0.18.0"
"""The version of LMDeploy that names and behaviour here are of."""

QUANT_POLICY: Mapping[str, int] = {"none": 0, "int8": 8, "int4": 4}
"""LMDeploy's quant_policy for each of the recipe's KV policies."""

Backend = Literal["turbomind", "pytorch"]
RopeScaling = Literal["dynamic"]
ToolCallParser = Literal[
    "deepseek-v32",
    "deepseek-v4",
    "glm47",
    "intern-s1",
    "internlm",
    "interns2-preview",
    "kimi-k2",
    "kimi_k2",
    "llama3",
    "qwen",
    "qwen2d5",
    "qwen3",
    "qwen3coder",
]
"""What `--tool-call-parser` takes: the names registered in lmdeploy/serve/parsers/tool_parser/. The command itself takes any text, and ends
after it has loaded the model."""

SERVER = ("tool_call_parser",)
"""Fields that are arguments of `lmdeploy serve api_server` alone."""

IN_CHAT = ("dtype", "tp", "session_len", "cache_max_entry_count", "quant_policy", "model_format")
"""Engine fields that `lmdeploy chat` has an argument for."""

_FLAGS: Mapping[str, str] = {"block_size": "cache-block-seq-len", "device_type": "device"}
"""Engine fields whose argument has another name than theirs."""


@dataclass(frozen=True)
class Settings:
    """Of one engine and its server: `engine` are fields of the backend's dataclass, `server` arguments of the server's own.

    Values are what YAML holds: text, numbers, flags, and mappings of them."""

    backend: Backend
    engine: Mapping[str, Any]
    server: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The profile, flat: the backend, the engine's fields, the server's."""
        return yaml.safe_dump({"backend": self.backend, **self.engine, **self.server}, sort_keys=False)

    @staticmethod
    def read(path: Path) -> Settings:
        """The inverse of `text`. Raises BuildError where the file is not such a profile."""
        fix = "build the artifact again, and start the server with other settings by arguments of its own"
        try:
            said = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BuildError(str(path), f"cannot be read: {error.strerror}", fix) from None
        except (ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or a date or number that is none
            raise BuildError(str(path), f"is not YAML: {' '.join(str(error).split())}", fix) from None
        if not isinstance(said, dict) or not all(isinstance(name, str) for name in said):
            raise BuildError(str(path), "is no mapping of names to values", fix)
        strange = [name for name, value in said.items() if not _is_plain(value)]
        if strange:
            raise BuildError(
                str(path), f"{strange[0]} is {said[strange[0]]!r}, which is no text, number or flag, and no mapping of them", fix
            )
        backend = said.pop("backend", None)
        if backend not in get_args(Backend):
            raise BuildError(str(path), f"backend is {backend!r}; {' or '.join(get_args(Backend))} was expected", fix)
        engine = {name: value for name, value in said.items() if name not in SERVER}
        return Settings(backend, engine, {name: said[name] for name in SERVER if name in said})

    def keywords(self) -> dict[str, Any]:
        """For TurbomindEngineConfig or PytorchEngineConfig."""
        return dict(self.engine)

    def arguments(self) -> list[str]:
        """What follows `lmdeploy serve api_server MODEL`."""
        return [*self._spelled(self.engine), *_arguments(self.server)]

    def chat_arguments(self) -> list[str]:
        """What follows `lmdeploy chat MODEL`, which has no argument for the rest."""
        # It cannot be told how to stretch positions either, so its conversations end where the model's own do: its default.
        beyond = ("session_len",) if "hf_overrides" in self.engine else ()
        return [*self._spelled({name: value for name, value in self.engine.items() if name in IN_CHAT and name not in beyond})]

    def _spelled(self, engine: Mapping[str, Any]) -> Iterator[str]:
        yield from ("--backend", self.backend)
        yield from _arguments(engine)

    def with_engine(self, **fields: Any) -> Settings:
        """With other engine fields; None takes one away, and the engine's own default holds."""
        changed = {**self.engine, **fields}
        return replace(self, engine={name: value for name, value in changed.items() if value is not None})


def settings(
    backend: Backend, format: str, kv_cache: Mapping[str, Any], target: Mapping[str, Any] | None, max_positions: int, rope: Rope
) -> Settings:
    """What a recipe decides. `format`: the artifact's quant_method. `max_positions` and `rope`: the model's own."""
    target = target or {}
    session_len = target.get("session_len") or max_positions
    engine: dict[str, Any] = {
        "dtype": "float16",
        "tp": target.get("count", 1),
        "session_len": session_len,
        "cache_max_entry_count": kv_cache["max_entry_count"],
        "quant_policy": QUANT_POLICY[kv_cache["policy"]],
    }
    if target.get("max_batch_size"):
        engine["max_batch_size"] = target["max_batch_size"]
    if backend == "turbomind":
        engine["model_format"] = format
    if target.get("rope_scaling") and rope.kind == "default":  # a model whose own rule is dynamic says so in config.json
        engine["hf_overrides"] = stretched(rope.theta, session_len / max_positions)
    return Settings(backend, engine, {name: target[name] for name in SERVER if target.get(name)})


def stretched(theta: float, factor: float) -> dict[str, Any]:
    """`hf_overrides` that make a model's rotary positions dynamic NTK (Reddit's emozilla 2023; arXiv:2309.00071, section 3.3).

    TurboMind's field `rope_scaling_factor` would be the shorter way, and nothing in 0.18 reads it: turbomind/models/utils.py
    parse_rope_param takes rule and factor from the model's config alone, after hf_overrides were laid over it (converter.py). The theta is
    said again because parse_rope_param takes it from `rope_parameters` wherever there are such, and transformers 4 makes none.

    With L tokens in the prompt and M positions of the model's own, TurboMind multiplies theta by (factor L / M - factor + 1) to the power
    of dim / (dim - 2) if L > M, once, when a request comes in (unified_attention_layer.cc init_dynamic_ntk): all its keys and queries turn
    alike, prompts of up to M tokens are served as they were, and an answer that grows past M from such a prompt is not stretched.
    transformers takes the length of the sequence so far instead, and leaves cached keys as they were turned. So does the PyTorch engine,
    and with the longest sequence of the whole batch (backends/default/rotary_embedding.py): planning refuses it there.
    """
    return {"rope_parameters": {"rope_type": "dynamic", "rope_theta": theta, "factor": factor}}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(each) for name, each in value.items())
    return isinstance(value, str | int | float)


def _arguments(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        flag = _FLAGS.get(name, name).replace("_", "-")
        if name == "enable_metrics":  # the one field that is on by itself
            yield from () if value else ("--disable-metrics",)
        elif isinstance(value, bool):
            yield from (f"--{flag}",) if value else ()
        else:
            yield from (f"--{flag}", json.dumps(value) if isinstance(value, Mapping) else str(value))
