"""Tiny models of every architecture whose greedy text is decided: what engines.py builds and serves.

A random model's two best tokens are often a rounding error apart, so that two right engines write different text. Here the blocks are
random and the output projection is solved for (least squares on the states of the last block, as an echo state network's readout: Jaeger
2001, GMD report 148): after each prompt the model prefers a text of its own by MARGIN, while the other logits are a random model's.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from buildsys.architecture import Architecture
from buildsys.io.checkpoint import Checkpoint
from buildsys.quant.block import Block, rms_norm
from buildsys.quant.model import Head, Model
from buildsys.quant.rotary import tables
from buildsys.survey import describe

TOKENIZER = Path(__file__).resolve().parents[1] / "recipes" / "demo" / "model"
PROMPTS, NEW = 20, 16  # their product has to stay below hidden_size: as many states as that can be given any logits
FIRST = 16  # tokens below are special, or may be
MARGIN = 5.0  # nats, of the float model: enough for four bits and not for a wrong model. Other logits have a standard deviation of one
ATTENDED = (".o_proj.weight", ".wo.weight")  # what attention found goes through these
SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,  # no engine's default: one that reads it elsewhere shows
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
MOE = {"intermediate_size": 512, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "head_dim": 128, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "num_attention_heads": 8},
    "internlm2": {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False, "pad_token_id": 1},
    "internlm3": {
        "model_type": "internlm3",
        "architectures": ["InternLM3ForCausalLM"],
        "head_dim": 128,
        "bias": False,
        "qkv_bias": False,
        "pad_token_id": 1,
    },
    "phi3": {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 512, "pad_token_id": 1},
    "mixtral": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, **MOE},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 128,
        "num_experts": 4,
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **MOE,
    },
}
"""config.json of each, over SIZES. Widths are multiples of 128, and heads 128 wide: what TurboMind's kernels take."""


@dataclass(frozen=True)
class Whole:
    """A model with all its blocks in memory, read once."""

    model: Model
    blocks: tuple[Block, ...]
    head: Head

    @staticmethod
    def of(model: Model) -> Whole:
        return Whole(model, tuple(model.block(layer) for layer in range(model.architecture.layers)), model.head())

    def states(self, ids: list[int]) -> Tensor:  # -> [tokens, hidden]
        """What the output projection reads."""
        h, rotary = self.model.embed(torch.tensor([ids]))[0], tables(self.model.architecture, len(ids))
        for block in self.blocks:
            h = block.forward(h, rotary)
        return rms_norm(h, self.head.norm, self.head.eps)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:  # -> [tokens, vocab]
        """Of the token after each of `ids`."""
        return self.states(ids) @ self.head.weight.t()


def write(folder: Path, name: str, seed: int = 0) -> None:
    """The model of that name with the demo's tokenizer, in float16."""
    config = SIZES | MODELS[name]
    architecture, _ = describe(config, "config.json")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)
    tensors = {name: tensor.half() for name, tensor in weights(architecture, seed).items()}
    path = folder / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    head = architecture.lm_head
    assert head is not None, "a head that is the embedding cannot be solved for"
    asked, said = prompts(), answers(architecture.vocab_size)
    with torch.inference_mode():
        model = Whole.of(Model(architecture, Checkpoint({path.name: path})))
        seen = torch.cat([model.states(before + after)[len(before) - 1 : -1] for before, after in zip(asked, said, strict=True)])
        save_file(tensors | {head: readout(seen, torch.tensor(said).flatten()).half()}, path, {"format": "pt"})


def weights(architecture: Architecture, seed: int) -> dict[str, Tensor]:
    """Random tensors that keep activations near one, and let no part be left out unseen: a token's own embedding says little beside what
    attention brings from those before it, and norms and biases are no ones and zeros."""
    made, found = torch.Generator().manual_seed(seed), {}
    for name, shape in architecture.tensors().items():
        drawn = torch.randn(shape, generator=made)
        if name.endswith((".q_norm.weight", ".k_norm.weight")):
            found[name] = 1 + 0.6 * drawn
        elif name.endswith("norm.weight"):
            found[name] = 1 + 0.2 * drawn
        elif len(shape) == 1 or name == architecture.embed:
            found[name] = 0.4 * drawn
        else:
            found[name] = drawn * shape[-1] ** -0.5 * (3 if name.endswith(ATTENDED) else 1)
    return found


def prompts() -> list[list[int]]:
    """Token ids, of lengths from 6 to 25: every engine gets the same."""
    drawn = torch.Generator().manual_seed(1)
    return [torch.randint(FIRST, SIZES["vocab_size"], (6 + at,), generator=drawn).tolist() for at in range(PROMPTS)]


def answers(vocab_size: int) -> list[list[int]]:
    """What the float model says after each prompt."""
    drawn = torch.Generator().manual_seed(2)
    found: list[list[int]] = torch.randint(FIRST, vocab_size, (PROMPTS, NEW), generator=drawn).tolist()
    return found


def readout(seen: Tensor, said: Tensor) -> Tensor:  # [states, hidden], [states] -> [vocab, hidden]
    """The least projection that gives each state random logits, but for the token that is to be said: MARGIN above the largest."""
    wanted = torch.randn(len(seen), SIZES["vocab_size"], generator=torch.Generator().manual_seed(3))
    rows = torch.arange(len(seen))
    wanted[rows, said] = -torch.inf
    wanted[rows, said] = wanted.amax(-1) + MARGIN
    solved: Tensor = torch.linalg.lstsq(seen, wanted, driver="gelsd").solution
    return solved.t().contiguous()
