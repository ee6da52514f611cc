"""Whether TurboMind serves prompts beyond a model's own positions as `target.rope_scaling: dynamic` plans it, on the demo's model.

    python benchmarks/long_session.py [--folder DIR] [--out FILE]

The demo's model has 1,024 positions. It is built for sessions of 2,048 and of 4,096 tokens and loaded with its own deploy/lmdeploy.yaml;
after prompts of 512 to 4,000 tokens of its own text it writes 16 tokens greedily. Each of them has to be one that the dequantized model in
float32 holds for the likeliest, or less than 0.05 nats below it, where that model's rotary theta is the one that the rule in
serving/settings.py (`stretched`) gives for the length of the prompt. Two more runs say that nothing else stretches: without hf_overrides,
and with the engine's field rope_scaling_factor in their place, the tokens are those of the model's own theta. Needs CUDA and lmdeploy.
Exit 1 where a run fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import decided
import engines
import torch
import yaml

from buildsys.architecture import Rope
from buildsys.quant.sample import sample
from buildsys.serving.settings import PROFILE, Settings
from buildsys.step import Resources

ROOT = Path(__file__).resolve().parents[1]
EXCUSED_NATS = 0.05
EACH = 4  # prompts of a length
APART = 1500  # tokens of a prompt; close to the model's 1,024 positions both rules give much the same theta
LENGTHS = {"s2048": (512, 1000, 1016, 1025, 1500, 2000), "s4096": (512, 1016, 1025, 2000, 3000, 4000)}
RUNS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "2048": ("s2048", {}),
    "4096": ("s4096", {}),
    "no hf_overrides": ("s4096", {"hf_overrides": None}),
    "rope_scaling_factor": ("s4096", {"hf_overrides": None, "rope_scaling_factor": 4.0}),
}
"""What is loaded: the variant of the recipe, and the fields that are not as its profile says."""

RECIPE: Mapping[str, Any] = {
    "schema": 1,
    "source": {"local": {"path": "model"}},
    "calibration": {"dataset": "self_generated", "samples": 16, "seqlen": 128},
    "quantization": {"bits": 4, "group_size": 128, "method": ["awq", "gptq"]},
    "format": "awq",
    "kv_cache": {"max_entry_count": 0.05},
    "verify": {"text": "self_generated", "samples": 2, "seqlen": 32},
    "matrix": {
        f"s{length}": {"target": {"gpu": "h200", "session_len": length, "max_batch_size": 8, "rope_scaling": "dynamic"}}
        for length in (2048, 4096)
    },
}


@dataclass(frozen=True)
class Length:
    """What was written after prompts of one length: how many tokens are the likeliest, and how far below it the worst one is, in nats, by
    the stretched theta and by the model's own."""

    prompt_tokens: int
    tokens: int
    stretched: int
    stretched_nats: float
    own: int
    own_nats: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="work here, and leave it")
    parser.add_argument("--out", type=Path, help="write the numbers here too, as JSON")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.run:
        answer(said.folder.resolve(), said.run)
        return 0
    if not torch.cuda.is_available() or importlib.util.find_spec("lmdeploy") is None:
        print("needs a CUDA device and lmdeploy: nothing was compared")
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = (said.folder or Path(temporary)).resolve()
        build(folder)
        found = {name: run(folder, name) for name in RUNS}
    if said.out:
        said.out.write_text(json.dumps({name: [asdict(one) for one in lengths] for name, lengths in found.items()}, indent=1) + "\n")
    held = [report(name, lengths) for name, lengths in found.items()]
    return 0 if all(held) else 1


def build(folder: Path) -> None:
    """The workspace, and both variants of the recipe; what is there already is not built again."""
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    (folder / "dodo.py").write_text("from buildsys.tasks import *\n")
    if not (folder / "recipes" / "model").exists():
        shutil.copytree(ROOT / "recipes" / "demo" / "model", folder / "recipes" / "model")
    (folder / "recipes" / "long.yaml").write_text(yaml.safe_dump(dict(RECIPE), sort_keys=False))
    failed = engines.doit(folder, [f"long@{variant}" for variant in LENGTHS])
    if failed is not None:
        raise SystemExit(failed)


def run(folder: Path, name: str) -> list[Length]:
    """One run in a process of its own, which TurboMind may end or keep."""
    command = [sys.executable, __file__, "--folder", str(folder), "--run", name]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=engines.environment(), timeout=300)
    told = next((line.removeprefix(engines.ANSWER) for line in ran.stdout.splitlines() if line.startswith(engines.ANSWER)), None)
    if told is None:
        raise SystemExit(f"{name}: ended with {ran.returncode}: {' | '.join(ran.stdout.splitlines()[-8:])[-1500:]}")
    return [Length(**one) for one in json.loads(told)]


def report(name: str, lengths: list[Length]) -> bool:
    """Prints the run; whether it went as planned."""
    good = held(name, lengths)
    print(f"{name}: {'as planned' if good else 'NOT as planned'}")
    for one in lengths:
        line = f"stretched theta {one.stretched:3} of {one.tokens} likeliest, worst {one.stretched_nats:6.3f} nats below"
        print(f"  prompts of {one.prompt_tokens:5}: {line}; own theta {one.own:3}, {one.own_nats:6.3f}")
    return good


def held(name: str, lengths: list[Length]) -> bool:
    """Every token is one of the rule's; well beyond the model's positions the other rule would have written others."""
    stretches = not RUNS[name][1]
    for one in lengths:
        ours, other = (one.stretched_nats, one.own_nats) if stretches else (one.own_nats, one.stretched_nats)
        if ours >= EXCUSED_NATS or (one.prompt_tokens >= APART and other < EXCUSED_NATS):
            return False
    return True


# One run


def answer(folder: Path, name: str) -> None:
    """Prints the numbers of one run."""
    variant, other = RUNS[name]
    artifact = folder / "artifacts" / f"long@{variant}"
    settings = Settings.read(artifact / PROFILE)
    factor = settings.engine["hf_overrides"]["rope_parameters"]["factor"]
    whole = reference(folder, variant)
    asked = list(prompts(whole, LENGTHS[variant]))
    serving = engines.serve(str(artifact), settings.backend, settings.with_engine(**other).keywords())
    written = engines.speak(serving, asked)
    print(f"\n{engines.ANSWER}{json.dumps([asdict(one) for one in judged(whole, factor, asked, written)])}", flush=True)
    os._exit(0)  # with the engine alive, as engines.py does it


def reference(folder: Path, variant: str) -> decided.Whole:
    """The artifact's dequantized weights in float32."""
    return engines.packed(folder, f"long@{variant}")


def prompts(whole: decided.Whole, lengths: tuple[int, ...]) -> Iterator[list[int]]:
    """EACH prompts of each length: texts that the model wrote itself within its own positions, one after the other."""
    longest = max(lengths)
    pieces = -(-longest // 512)
    text = sample(whole.model, EACH * pieces, 512, 7, 1.0, Resources(threads=os.cpu_count() or 1), lambda *_: None)
    rows = text.reshape(EACH, -1).tolist()  # [EACH, pieces * 512]
    for length in lengths:
        yield from (row[:length] for row in rows)


def judged(whole: decided.Whole, factor: float, asked: list[list[int]], written: list[list[int]]) -> list[Length]:
    """What was written beside both rules, length by length."""
    found = []
    for length in dict.fromkeys(len(prompt) for prompt in asked):
        pairs = [(prompt, new) for prompt, new in zip(asked, written, strict=True) if len(prompt) == length]
        assert all(len(new) == decided.NEW for _, new in pairs), "every prompt is answered in full"
        stretched, own = ([below(turned, prompt, new) for prompt, new in pairs] for turned in (by_rule(whole, factor, length), whole))
        tokens = len(pairs) * decided.NEW
        found.append(Length(length, tokens, *counted(stretched), *counted(own)))
    return found


def counted(nats: list[torch.Tensor]) -> tuple[int, float]:
    every = torch.cat(nats)
    return int((every == 0).sum()), float(every.max())


def below(whole: decided.Whole, prompt: list[int], new: list[int]) -> torch.Tensor:  # -> [NEW]
    """How far below the likeliest token each written one is, in nats, after all that stands before it."""
    seen = whole.logits(prompt + new)[len(prompt) - 1 : -1].log_softmax(-1)
    return seen.max(-1).values - seen.gather(1, torch.tensor(new)[:, None])[:, 0]


def by_rule(whole: decided.Whole, factor: float, prompt_tokens: int) -> decided.Whole:
    """The model with the theta that TurboMind takes for a prompt of this length."""
    a = whole.model.architecture
    dim, theta = a.head_dim, a.rope.theta
    if prompt_tokens > a.max_positions:
        theta *= (factor * prompt_tokens / a.max_positions - (factor - 1)) ** (dim / (dim - 2))
    return replace(whole, model=replace(whole.model, architecture=replace(a, rope=Rope(theta))))


if __name__ == "__main__":
    sys.exit(main())
