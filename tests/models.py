"""Small random models on disk, one of each family, with a tokenizer and text that belongs to it: what tests build from.

Written with the safetensors and tokenizers packages alone, so that a test which needs a model does not pay for importing transformers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from buildsys.architecture import Architecture
from buildsys.io.checkpoint import Checkpoint
from buildsys.quant.model import Model
from buildsys.quant.rotary import tables
from buildsys.survey import describe

VOCAB = 320  # 2 special tokens, 256 bytes, 62 merges
BOS, EOS = 0, 1

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "float32",
}

SPOKEN = (
    "the of and a to in he was that it his her with as had for she not at but be on they have him which said from all this you by one "
    "river stone winter candle harbour window letter garden morning shadow silver captain mountain forgotten whisper thunder lantern"
)
WORDS = SPOKEN.split()


def tiny_llama(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A Llama with grouped queries; 2 layers, width 128, about 0.4 M weights. Keywords go to config.json."""
    return _write(folder, "llama", "LlamaForCausalLM", config, seed, dtype)


def tiny_mistral(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A Mistral; its sliding window of 16 tokens is shorter than most tests' sequences."""
    return _write(folder, "mistral", "MistralForCausalLM", {"sliding_window": 16, "head_dim": 32} | config, seed, dtype)


def tiny_qwen2(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A Qwen2: biases on queries, keys and values, tied embeddings."""
    return _write(folder, "qwen2", "Qwen2ForCausalLM", {"tie_word_embeddings": True} | config, seed, dtype)


def tiny_qwen3(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A Qwen3: norms on each head's queries and keys, heads wider than hidden_size / heads."""
    return _write(folder, "qwen3", "Qwen3ForCausalLM", {"head_dim": 64} | config, seed, dtype)


def tiny_internlm2(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """An InternLM2 with fused wqkv, and the auto_map that its publisher ships."""
    auto_map = {"AutoConfig": "configuration_internlm2.InternLM2Config", "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}
    return _write(folder, "internlm2", "InternLM2ForCausalLM", {"bias": False, "auto_map": auto_map} | config, seed, dtype)


def tiny_internlm3(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """An InternLM3 with biases on queries, keys and values alone, and the auto_map that its publisher ships."""
    auto_map = {"AutoConfig": "configuration_internlm3.InternLM3Config", "AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM"}
    shipped = {"qkv_bias": True, "bias": False, "head_dim": 32, "auto_map": auto_map}
    return _write(folder, "internlm3", "InternLM3ForCausalLM", shipped | config, seed, dtype)


def tiny_phi3(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A Phi-3: q, k and v in one matrix, gate and up in another; its window of 24 tokens is shorter than most tests' sequences."""
    return _write(folder, "phi3", "Phi3ForCausalLM", {"sliding_window": 24} | config, seed, dtype)


def tiny_mixtral(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A Mixtral with four experts, of which each token asks two."""
    return _write(folder, "mixtral", "MixtralForCausalLM", {"num_local_experts": 4} | config, seed, dtype)


def tiny_qwen3_moe(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A Qwen3 with six narrow experts, of which each token asks three; heads wider than hidden_size / heads."""
    said = {"head_dim": 64, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True}
    width = config.get("moe_intermediate_size", config.get("intermediate_size", 64))
    return _write(folder, "qwen3_moe", "Qwen3MoeForCausalLM", said | {"moe_intermediate_size": width} | config, seed, dtype)


FAMILIES = {
    "llama": tiny_llama,
    "mistral": tiny_mistral,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "internlm2": tiny_internlm2,
    "internlm3": tiny_internlm3,
    "phi3": tiny_phi3,
    "mixtral": tiny_mixtral,
    "qwen3_moe": tiny_qwen3_moe,
}


def starve(folder: Path) -> Path:
    """Rewrites the routers of a mixture of five, of which each token asks two, so that the last expert is sent none: the logits are a, -a,
    b, -b and 0."""
    held = load_file(folder / "model.safetensors")
    for name in [name for name in held if name.endswith("gate.weight")]:
        v, w = held[name][0], held[name][1]
        held[name] = torch.stack([v, -v, w, -w, torch.zeros_like(v)])
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return folder


def files(folder: Path) -> dict[str, Path]:
    """A folder's files by name, as a step gets them."""
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}


def opened(folder: Path) -> Model:
    """The float model in `folder`, as steps open it."""
    config = json.loads((folder / "config.json").read_text())
    return Model(describe(config, "config.json")[0], Checkpoint(files(folder)))


def streamed(model: Model, tokens: Tensor) -> Tensor:  # [windows, tokens] -> [windows, tokens, vocab]
    """Logits, one block after the other as steps compute them."""
    hidden, rotary = model.embed(tokens), tables(model.architecture, tokens.shape[1])
    for block in model.blocks(range(model.architecture.layers)):
        hidden = [block.forward(h, rotary) for h in hidden]
    return torch.stack([model.head().logits(h) for h in hidden])


def prose(words: int, seed: int = 0) -> str:
    """Made-up sentences, in lines of about twelve words: other text for another seed, about 3 tokens a word."""
    chosen = random.Random(seed).choices(WORDS, k=words)
    return "\n".join(" ".join(chosen[at : at + 12]) + "." for at in range(0, words, 12)) + "\n"


def tokens(windows: int, length: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    """Random int32 [windows, length]."""
    return torch.randint(2, vocab, (windows, length), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def weights(architecture: Architecture, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 tensors that keep activations near one; norms and biases are no ones and zeros, so that dropping one shows."""
    made = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, shape in sorted(architecture.tensors().items()):
        drawn = torch.randn(shape, generator=made)
        if name.endswith("norm.weight"):
            found[name] = 1 + 0.2 * drawn
        elif len(shape) == 1:
            found[name] = 0.3 * drawn
        else:
            found[name] = drawn * (1.0 if name == architecture.embed and architecture.lm_head else shape[1] ** -0.5)
    return found


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with a vocabulary of VOCAB: any text has tokens, all below VOCAB."""
    (folder / "tokenizer.json").write_text(_tokenizer(), encoding="utf-8")
    said = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


@cache
def _tokenizer() -> str:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([prose(2000, seed=99)], trainer)
    assert made.get_vocab_size() == VOCAB
    return str(made.to_str())


def _write(folder: Path, model_type: str, name: str, changed: Mapping[str, Any], seed: int, dtype: torch.dtype) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = SIZES | {"model_type": model_type, "architectures": [name], "dtype": str(dtype).removeprefix("torch.")} | dict(changed)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    architecture, _ = describe(config, "config.json")
    tensors = {name: tensor.to(dtype) for name, tensor in weights(architecture, seed).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_tokenizer(folder)
    return folder
