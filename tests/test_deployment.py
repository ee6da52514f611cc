"""Which machine is a recipe's target, and what a measurement there depends on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import runs

from buildsys.errors import BuildErrors
from buildsys.plan import Plan, plan
from buildsys.serving.host import Device, Host
from buildsys.step import reads
from buildsys.store import Store
from buildsys.workspace import Workspace

H200, L4 = Device("NVIDIA H200", "580.95.05", 143771 << 20), Device("NVIDIA L4", "580.95.05", 23034 << 20)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A recipe that asks a server, for an H200."""
    made = runs.tiny(tmp_path / "workspace", num_attention_heads=2, num_key_value_heads=1)
    serve = "serve: {prompt_tokens: 16, new_tokens: 16}"
    runs.edit(made / "recipes" / "tiny.yaml", "  kl: {max_nats: 9.0}\n", f"  kl: {{max_nats: 9.0}}\n  {serve}\ntarget: {{gpu: h200}}\n")
    runs.edit(made / "recipes" / "tiny.yaml", "group_size: 32", "group_size: 128")
    return made


def on(workspace: Path, *devices: Device) -> Plan:
    return plan(Workspace(workspace).load("tiny"), Store(workspace / "artifacts"), host=Host("python", "0.18.0", devices))


def test_a_licence_measures_nothing_again(workspace: Path) -> None:
    """Hours of a GPU depend on what engines read: a chat template is that, what is written for people is not."""
    step = next(one for one in on(workspace, H200).steps if one.kind == "serve")
    read = {"config.json", "tokenizer.model.v3", "chat_template.jinja", "merges.txt", "model-00001-of-00002.safetensors"}
    for role in ("source", "artifact"):
        need = next(need for need in step.needs if need.role == role)
        told = {name for name in (*read, "LICENSE.txt", "NOTICE", "USE_POLICY.md", "deploy/README.md") if reads(need.files, name)}
        assert told == read


def test_answers_have_room_in_a_session(workspace: Path) -> None:
    """A server cuts them short: known now, and not when all servers have run."""
    runs.edit(workspace / "recipes" / "tiny.yaml", "prompt_tokens: 16, new_tokens: 16", "prompt_tokens: 64, new_tokens: 240")
    with pytest.raises(BuildErrors) as caught:
        on(workspace, H200)
    assert "asks for 240 tokens after prompts of 32; a session holds 256" in str(caught.value)


@pytest.mark.parametrize(
    ("devices", "why"),
    [
        ((H200,), ""),
        ((H200, L4), ""),
        ((L4, H200), "here are NVIDIA L4 with 22 GiB, NVIDIA H200 with 140 GiB; name the target's first in CUDA_VISIBLE_DEVICES"),
        ((replace(H200, name="NVIDIA H20"),), "the target is 1 x h200, here is NVIDIA H20 with 140 GiB"),
        ((replace(H200, name="NVIDIA H200 in MIG slices"),), "the target is 1 x h200, here is NVIDIA H200 in MIG slices"),
    ],
)
def test_only_the_target_itself_is_measured(workspace: Path, devices: tuple[Device, ...], why: str) -> None:
    """An engine takes the first GPUs: one further on is not what was measured."""
    made = on(workspace, *devices)
    assert ("serve" in made.skipped) == bool(why) and why in made.skipped.get("serve", "")
    assert any(step.kind == "serve" for step in made.steps) == (not why)
