"""Engine settings say what the recipe says, as a file and as arguments; LMDeploy's own parser and dataclasses make the same of either."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from lmdeployed import Asked

from buildsys.architecture import Rope
from buildsys.errors import BuildError
from buildsys.gpus import KvPolicy
from buildsys.recipe import KvCache, Target
from buildsys.serving.guide import CONFIGS, command
from buildsys.serving.settings import IN_CHAT, QUANT_POLICY, Backend, Settings, ToolCallParser, settings, stretched

SCRIPT = Path(__file__).parent / "lmdeploy_reads.py"
POSITIONS, ROPE = 8192, Rope(500000.0)
KV = {"policy": "int8", "max_entry_count": 0.4}
TARGET = {"gpu": "a10", "count": 2, "session_len": 4096, "max_batch_size": 16}
LONG = TARGET | {"session_len": 20480, "rope_scaling": "dynamic", "tool_call_parser": "qwen3"}


@pytest.fixture(scope="module")
def ask() -> Iterator[Asked]:
    with Asked(SCRIPT) as asked:
        yield asked


kv_caches = st.builds(
    KvCache,
    policy=st.sampled_from(get_args(KvPolicy)),
    max_entry_count=st.floats(0, 1, exclude_min=True, exclude_max=True),
)
targets = st.builds(
    Target,
    gpu=st.just("a10"),
    count=st.integers(1, 64),
    session_len=st.none() | st.integers(16, 16_777_216),
    max_batch_size=st.integers(1, 4096),
    rope_scaling=st.none() | st.just("dynamic"),
    tool_call_parser=st.none() | st.sampled_from(get_args(ToolCallParser)),
)
formats = st.sampled_from(["awq", "gptq", "compressed-tensors"])


@st.composite
def decided(draw: st.DrawFn) -> Settings:
    """The settings of any recipe."""
    target, positions = draw(st.none() | targets), draw(st.integers(16, 16_777_216))
    rope = Rope(draw(st.floats(1, 1e12)), draw(st.sampled_from(["default", "dynamic", "llama3"])))
    said = target.model_dump() if target is not None else None
    return settings(draw(st.sampled_from(get_args(Backend))), draw(formats), draw(kv_caches).model_dump(), said, positions, rope)


@pytest.mark.parametrize(("policy", "number"), QUANT_POLICY.items())
def test_a_profile_says_what_the_recipe_says(policy: str, number: int) -> None:
    made = settings("turbomind", "awq", KV | {"policy": policy}, TARGET, POSITIONS, ROPE)
    assert yaml.safe_load(made.text()) == {
        "backend": "turbomind",
        "dtype": "float16",
        "tp": 2,
        "session_len": 4096,
        "cache_max_entry_count": 0.4,
        "quant_policy": number,
        "max_batch_size": 16,
        "model_format": "awq",
    }


def test_without_a_target_the_models_own_holds() -> None:
    made = settings("pytorch", "awq", KV, None, POSITIONS, ROPE)
    assert made.engine["tp"] == 1 and made.engine["session_len"] == POSITIONS and "max_batch_size" not in made.engine
    assert "model_format" not in made.engine, "the PyTorch engine reads it from config.json, and its own field means another thing"
    assert made.text().startswith("backend: pytorch\n")


def test_a_long_session_is_stretched_by_its_share() -> None:
    made = settings("turbomind", "awq", KV, LONG, POSITIONS, ROPE)
    rule = {"rope_type": "dynamic", "rope_theta": 500000.0, "factor": 2.5}
    assert made.engine["session_len"] == 20480 and made.engine["hf_overrides"] == {"rope_parameters": rule}
    assert made.server == {"tool_call_parser": "qwen3"} and made.arguments()[-2:] == ["--tool-call-parser", "qwen3"]
    own = settings("turbomind", "awq", KV, LONG, POSITIONS, Rope(500000.0, "dynamic", {"factor": 2.0}))
    assert "hf_overrides" not in own.engine and own.engine["session_len"] == 20480, "the model's config.json says it"


def test_every_policy_of_a_recipe_has_its_number() -> None:
    assert set(QUANT_POLICY) == set(get_args(KvPolicy))


@examples(deadline=None)
@given(decided())
def test_a_profile_reads_back(tmp_path_factory: pytest.TempPathFactory, made: Settings) -> None:
    path = tmp_path_factory.getbasetemp() / "lmdeploy.yaml"
    path.write_text(made.text())
    assert Settings.read(path) == made


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read: No such file"),
        ("backend: [", "is not YAML"),
        ("- turbomind", "no mapping"),
        ("1: 2", "no mapping"),
        ("tp: 1", "backend is None"),
        ("backend: vllm", "backend is 'vllm'; turbomind or pytorch"),
        ("backend: [turbomind]", "backend is \\['turbomind'\\]"),
        (b"backend: \xff", "is not YAML"),
        ("backend: turbomind\nx: 2020-13-45", "is not YAML: month must be"),
        ("[" * 3000, "is not YAML"),
        ("backend: turbomind\nhf_overrides: {a: 2020-01-01}", "hf_overrides is .* which is no text, number or flag"),
    ],
)
def test_a_bad_profile_is_told(tmp_path: Path, text: str | bytes | None, said: str) -> None:
    path = tmp_path / "lmdeploy.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BuildError, match=said) as raised:
        Settings.read(path)
    assert raised.value.where == str(path)


def test_fields_change_and_go() -> None:
    made = settings("turbomind", "awq", KV, TARGET, POSITIONS, ROPE)
    other = made.with_engine(model_format=None, cache_max_entry_count=0.01, eager_mode=False)
    assert "model_format" not in other.engine and other.engine["cache_max_entry_count"] == 0.01
    assert made.engine["model_format"] == "awq" and made.engine["cache_max_entry_count"] == 0.4


# As LMDeploy reads it


@examples(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(decided())
def test_arguments_and_keywords_are_one_config(ask: Asked, made: Settings) -> None:
    """The parser of `lmdeploy serve api_server` ends at the same config as the dataclass, in every field, the recipe's and the rest."""
    config = CONFIGS[made.backend]
    by_keyword = ask({"ask": "keywords", "config": config, "given": made.keywords()})
    served = ask({"ask": "server", "words": command(made, "name"), "backend": made.backend})
    by_device = {} if "max_batch_size" in made.engine else {"max_batch_size": 128}  # which the engine itself asks the device for
    assert served["backend_config"] == by_keyword | by_device
    assert {name: by_keyword[name] for name in made.engine} == made.engine
    assert served["tool_call_parser"] == made.server.get("tool_call_parser")
    assert (served["path"], served["model_name"], served["backend"]) == (".", "name", made.backend)


@examples(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(decided())
def test_chat_takes_what_it_can(ask: Asked, made: Settings) -> None:
    reached = ask({"ask": "chat", "words": ["lmdeploy", "chat", ".", *made.chat_arguments()], "backend": made.backend})["backend_config"]
    left_out = {"max_batch_size", "hf_overrides"} | ({"session_len"} if "hf_overrides" in made.engine else set())
    assert {name: reached[name] for name in IN_CHAT if name in made.engine and name not in left_out} == {
        name: value for name, value in made.engine.items() if name not in left_out
    }
    assert reached["session_len"] is None or "hf_overrides" not in made.engine, "or it would write beyond positions that nothing stretches"


OTHER: list[tuple[Backend, dict[str, Any]]] = [
    ("turbomind", {"enable_prefix_caching": True, "enable_metrics": False, "cache_block_seq_len": 128, "max_prefill_token_num": 4096}),
    ("turbomind", {"enable_prefix_caching": False, "enable_metrics": True, "dtype": "bfloat16", "model_format": None}),
    ("pytorch", {"eager_mode": True, "block_size": 128, "device_type": "cuda", "enable_metrics": False}),
]


@pytest.mark.parametrize(("backend", "other"), OTHER)
def test_other_fields_have_their_arguments(ask: Asked, backend: Backend, other: dict[str, Any]) -> None:
    made = settings(backend, "awq", KV, TARGET, POSITIONS, ROPE).with_engine(**other)
    by_keyword = ask({"ask": "keywords", "config": CONFIGS[backend], "given": made.keywords()})
    assert ask({"ask": "server", "words": command(made, "name"), "backend": backend})["backend_config"] == by_keyword


def test_tool_call_parsers_are_lmdeploys(ask: Asked) -> None:
    assert ask({"ask": "parsers"}) == sorted(get_args(ToolCallParser))


@pytest.mark.parametrize("spelled", ["rope_parameters", "rope_theta"])
@pytest.mark.parametrize("model_type", ["llama", "internlm2"])
def test_turbomind_reads_the_stretch(ask: Asked, tmp_path: Path, spelled: str, model_type: str) -> None:
    """As its converter reads config.json with hf_overrides laid over it, in either spelling of the model's own theta."""
    import json

    theta: dict[str, Any] = {"rope_theta": 500000.0}
    said = {"model_type": model_type, "architectures": ["X"], "max_position_embeddings": 1024, "hidden_size": 256, "num_attention_heads": 2}
    said |= {"rope_parameters": theta | {"rope_type": "default"}} if spelled == "rope_parameters" else theta
    (tmp_path / "config.json").write_text(json.dumps(said))
    read = {"ask": "rope", "model": str(tmp_path), "head_dim": 128}
    found = ask({**read, "overrides": stretched(500000.0, 2.0)})
    assert found == {"type": "dynamic", "base": 500000.0, "factor": 2.0, "max_position_embeddings": 1024}
    assert ask({**read, "overrides": {}})["type"] == "default"
