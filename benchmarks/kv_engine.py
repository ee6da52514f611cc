"""Whether quant/kv.py does to keys and values what TurboMind's cache does: the engine's own logits beside ours, policy by policy.

    python benchmarks/kv_engine.py [--only demo,d128@int4] [--folder DIR] [--out FILE]

The demo model and random ones with heads of 64, 128 and 256, in float16 in TurboMind with quant_policy 0, 8 and 4, beside our forward in
float32 with the policy emulated and without. Two ways of the engine's: `prefill`, logits of whole windows, which attend to what the same
pass has just written to the cache; and `decode`, 32 greedy tokens after each of 20 prompts, with ours forced to read the engine's tokens.
An engine token is ours too where it is our first choice or less than 0.02 nats below it.

`predicted` is the KL that the emulation says the cache adds, `measured` what the engine's logits have: KL from our forward without a cache.
`explained` is the share of the cache's squared error in the logits, over float16's own, that is gone once it is emulated. It cannot be all:
the engine's keys and values are rounded to float16, ours are not yet, and where that carries one over a code's edge the two are a whole
step apart. That is rarer the wider the steps are, and comes back as another input of the next block's cache: random models have one block.
With our own forward in float16 in the engine's place 0.98 (int4) and 0.72 to 0.76 (int8) are explained with one block, 0.85 and 0.41 of the
demo's four. Exit 1 where a row lies below BOUNDS or is PREDICTED off. Needs CUDA and lmdeploy; under 3 minutes on one H200.
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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import decided
import engines
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from buildsys.io.checkpoint import Checkpoint
from buildsys.quant.kv import keep
from buildsys.quant.model import Model
from buildsys.quant.sample import sample
from buildsys.serving.settings import QUANT_POLICY
from buildsys.step import Resources
from buildsys.survey import describe, read_config

DEMO = decided.TOKENIZER
RANDOM: dict[str, dict[str, Any]] = {
    f"d{width}": {"num_hidden_layers": 1, "head_dim": width, "num_attention_heads": 8, "num_key_value_heads": 2} for width in (64, 128, 256)
}
MODELS = ("demo", *RANDOM)
ENDS = ("d64@int4",)  # of which LMDeploy 0.18 dies on sm90, with a misaligned address; gpus.head_dims plans for another engine
WINDOWS, LENGTH = 16, 256
PROMPTS, NEW = 20, 32
TIE_NATS = 0.02
BOUNDS: dict[tuple[bool, str], tuple[float, float]] = {
    (True, "none"): (0.99, 0.0),
    (True, "int8"): (0.98, 0.45),
    (True, "int4"): (0.96, 0.93),
    (False, "none"): (0.98, 0.0),
    (False, "int8"): (0.97, 0.1),
    (False, "int4"): (0.85, 0.65),
}
"""Whether it has one block, and the policy: the least share of tokens that are ours, and of the cache's error that is explained.
Below what our own float16 comes to, as the engine turns keys in float16 too."""
PREDICTED = 0.15  # of what a cache adds; beside it may be four times what float16 adds
VISIBLE = 4.0  # times float16's own squared error that a cache has to add before its share can be told
LIMIT_S = 150
AT_ONCE = 6


@dataclass(frozen=True)
class Distance:
    """How far the engine is from one forward of ours, over all positions: logits, their distribution, and the token."""

    mean_square: float  # of the differences between logits, each position's mean taken off: a softmax does not see it
    largest: float
    nats: float  # KL(engine || ours)
    share: float  # of positions whose token of the engine's is ours too


@dataclass(frozen=True)
class Row:
    """One model and policy on one way of the engine's. `predicted` and `measured`: nats from our forward without a cache to ours with it
    emulated, and to the engine."""

    case: str
    way: str  # prefill or decode
    tokens: int
    emulated: Distance
    plain: Distance
    predicted: float
    measured: float

    def explained(self, none: Row) -> float | None:
        """Given the row of the same model and way without a policy. None: the cache adds too little to tell."""
        float16 = none.plain.mean_square
        added = self.plain.mean_square - float16
        return 1 - max(self.emulated.mean_square - float16, 0.0) / added if added > VISIBLE * float16 else None

    def faults(self, none: Row) -> Iterator[str]:
        model, _, policy = self.case.partition("@")
        share, least = BOUNDS[model in RANDOM, policy]
        explained = self.explained(none)
        if not self.emulated.share >= share:
            yield f"{self.emulated.share:.3f} of the tokens are ours, at least {share} should be"
        if explained is not None and not explained >= least:
            yield f"{explained:.3f} of the cache's error is explained, at least {least} should be"
        if not abs(self.measured - self.predicted) <= PREDICTED * self.predicted + 4 * none.measured:
            yield f"{self.measured:.2e} nats measured, {self.predicted:.2e} predicted"

    def line(self, none: Row) -> str:
        explained = self.explained(none)
        told = f"{self.predicted:9.2e} {self.measured:9.2e} " + ("" if explained is None else f"{explained:9.3f}")
        both = (f"{one.nats:.2e} {one.mean_square**0.5:.4f} {one.largest:6.3f} {one.share:.4f}" for one in (self.emulated, self.plain))
        return f"{self.case:10} {self.way:7} {self.tokens:6}  {'   '.join(both)}   {told}"


HEAD = f"""{"":27}{"KV emulated":33}{"KV as it is":33}nats added
{"case":10} {"way":7} tokens  {"   ".join(["KL       rms    max    same  "] * 2)}   predicted measured explained"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="models (d64) or cases (demo@int4), with commas between")
    parser.add_argument("--folder", type=Path, help="work here, and leave it")
    parser.add_argument("--out", type=Path, help="write the rows here too, as JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.case:
        answer(said.folder, said.case)
    if not torch.cuda.is_available() or importlib.util.find_spec("lmdeploy") is None:
        print("needs a CUDA device and lmdeploy: nothing was compared")
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        rows, failed = compare(said.folder or Path(temporary), chosen(said.only))
    if said.out:
        said.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print("\n".join([HEAD, *(row.line(beside(rows, row)) for row in rows), *failed]))
    print(f"{len(failed)} faults in {len(rows)} rows")
    return 1 if failed or not rows else 0


def chosen(only: str | None) -> list[str]:
    """Names of cases, each model's `none` first, which its others are held against; an unknown one ends the program."""
    every = [f"{model}@{policy}" for model in MODELS for policy in QUANT_POLICY if f"{model}@{policy}" not in ENDS]
    asked = only.split(",") if only else list(MODELS)
    unknown = [name for name in asked if name not in (*every, *MODELS)]
    if unknown:
        raise SystemExit(f"--only {unknown[0]} is no case; cases: {', '.join(every)}")
    named = {case.partition("@")[0] for case in asked}
    return [case for case in every if {case, case.partition("@")[0]} & {*asked} or (case.endswith("@none") and case[:-5] in named)]


def compare(folder: Path, cases: Sequence[str]) -> tuple[list[Row], list[str]]:
    """All rows, and what is wrong, a line for each. Every engine has a process of its own, some at a time."""
    for model in {case.partition("@")[0] for case in cases}:
        write(folder, model)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ended = dict(zip(cases, pool.map(lambda case: run(folder, case), cases), strict=True))
    rows = [row for case in cases if ended[case] is None for row in rows_of(folder, case)]
    failed = [f"{case}: {said}" for case, said in ended.items() if said is not None]
    return rows, failed + faults(rows)


def faults(rows: Sequence[Row]) -> list[str]:
    return [f"{row.case} {row.way}: {said}" for row in rows for said in row.faults(beside(rows, row))]


def beside(rows: Sequence[Row], row: Row) -> Row:
    """The same model on the same way without a policy; the row itself where that did not run."""
    alike = f"{row.case.partition('@')[0]}@none", row.way
    return next((one for one in rows if (one.case, one.way) == alike), row)


# Models, and what is asked of them


def write(folder: Path, name: str) -> None:
    """The model, and beside it the windows that the engines read: text that the model wrote itself."""
    there = folder / name
    if (there / "windows.safetensors").exists():
        return
    if name == "demo":
        shutil.copytree(DEMO, there, dirs_exist_ok=True)
    else:
        config = decided.SIZES | decided.MODELS["llama"] | RANDOM[name]
        architecture, _ = describe(config, "config.json")
        there.mkdir(parents=True, exist_ok=True)
        (there / "config.json").write_text(json.dumps(config, indent=1))
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copyfile(DEMO / file, there / file)
        tensors = {tensor: value.half() for tensor, value in decided.weights(architecture, 0).items()}
        save_file(tensors, there / "model.safetensors", {"format": "pt"})
    with torch.inference_mode():
        windows = sample(opened(there, "none"), WINDOWS + PROMPTS, LENGTH, 0, 1.0, Resources(), lambda *_: None)
    save_file({"windows": windows[:WINDOWS].clone(), "prompts": windows[WINDOWS:].clone()}, there / "windows.safetensors")


def opened(folder: Path, policy: str) -> Model:
    """Our forward of it with a policy emulated."""
    architecture = describe(read_config(folder / "config.json", "config.json"), "config.json")[0]
    return Model(architecture, Checkpoint({"model.safetensors": folder / "model.safetensors"}), keep_kv=keep(policy))


def asked(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Windows to read, and prompts from 8 tokens up to more than two of the cache's blocks of 64."""
    there = load_file(folder / "windows.safetensors")
    return there["windows"].tolist(), [row[: 8 + 7 * at] for at, row in enumerate(there["prompts"].tolist())]


# One case, in a process of its own


def run(folder: Path, case: str) -> str | None:
    """None, or what became of the case's process."""
    command = [sys.executable, __file__, "--folder", str(folder), "--case", case]
    log = folder / f"{case}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=engines.environment(), start_new_session=True
        )
        try:
            ended = f"ended with {process.wait(LIMIT_S)}"
        except subprocess.TimeoutExpired:
            ended = f"did not end within {LIMIT_S} s"
        engines.kill(process.pid)  # an engine's own children may outlive it
        process.wait()
    lines = log.read_text(errors="replace").splitlines()
    return None if answers(folder, case).exists() else f"{ended}: {' | '.join(lines[-6:])[-1500:]}"


def answers(folder: Path, case: str) -> Path:
    return folder / f"{case}.safetensors"


def answer(folder: Path, case: str) -> None:
    """Writes what the engine says in one case, and ends the process."""
    model, _, policy = case.partition("@")
    settings = {"dtype": "float16", "tp": 1, "session_len": 512, "max_batch_size": 32, "model_format": "hf"}
    settings |= {"cache_max_entry_count": engines.CACHE, "quant_policy": QUANT_POLICY[policy]}
    serving = engines.serve(str(folder / model), "turbomind", settings)
    windows, prompts = asked(folder / model)
    read = serving._run(coro=serving.async_engine.async_get_logits(input_ids=windows)).result()
    said = speak(serving, prompts)
    found = {"prefill": torch.stack([logits.float().cpu() for logits in read])}
    found |= {"tokens": torch.tensor([tokens for tokens, _ in said]), "decode": torch.stack([logits.float().cpu() for _, logits in said])}
    path = answers(folder, case)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    sys.stdout.flush()
    os._exit(0)  # with the engine alive, as engines.py does, and for its reasons


def speak(serving: Any, prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], Tensor]]:
    """NEW greedy tokens after each prompt, and the logits [NEW, vocab] that each was chosen from."""
    from lmdeploy import GenerationConfig

    how = GenerationConfig(max_new_tokens=NEW, do_sample=False, top_k=1, ignore_eos=True, output_logits="generation")
    requests = [
        {"session_id": serving.session(), "messages": None, "input_ids": list(ids), "gen_config": how, "stream_response": False}
        for ids in prompts
    ]
    found = []
    for parts in serving._infer(iter(requests), multiplex=False):
        every = list(parts)
        tokens = [token for part in every for token in part.token_ids]
        logits = torch.cat([part.logits for part in every if part.logits is not None])
        if len(tokens) != NEW or len(logits) < NEW:
            raise SystemExit(f"{len(tokens)} tokens and {len(logits)} logits came, {NEW} were asked for")
        found.append((tokens, logits[:NEW]))
    return found


# The comparison


@torch.inference_mode()
def rows_of(folder: Path, case: str) -> Iterator[Row]:
    """Both ways of a case whose answers are there."""
    model, _, policy = case.partition("@")
    ours = {name: decided.Whole.of(opened(folder / model, name)) for name in dict.fromkeys((policy, "none"))}
    windows, prompts = asked(folder / model)
    there = load_file(answers(folder, case))
    read = {name: [whole.logits(ids) for ids in windows] for name, whole in ours.items()}
    yield row(case, "prefill", list(there["prefill"]), read, policy)
    forced = [(prompt, tokens) for prompt, tokens in zip(prompts, there["tokens"].tolist(), strict=True)]
    said = {name: [whole.logits(prompt + new)[len(prompt) - 1 : -1] for prompt, new in forced] for name, whole in ours.items()}
    yield row(case, "decode", list(there["decode"]), said, policy)


def row(case: str, way: str, engine: Sequence[Tensor], ours: Mapping[str, Sequence[Tensor]], policy: str) -> Row:
    """Of logits [tokens, vocab] for each text, the engine's and ours by policy."""
    emulated, plain = (torch.cat(list(ours[name])).double() for name in (policy, "none"))
    theirs = torch.cat(list(engine)).double()[:, : plain.shape[1]]  # an engine may pad its vocabulary
    return Row(case, way, len(theirs), distance(theirs, emulated), distance(theirs, plain), nats(plain, emulated), nats(plain, theirs))


def distance(theirs: Tensor, ours: Tensor) -> Distance:  # [tokens, vocab] each
    apart = (theirs - theirs.mean(-1, keepdim=True)) - (ours - ours.mean(-1, keepdim=True))
    q = ours.log_softmax(-1)
    below = q.amax(-1) - q.gather(1, theirs.argmax(-1, keepdim=True))[:, 0]
    same = (below < TIE_NATS).double().mean()
    return Distance(float(apart.square().mean()), float(apart.abs().max()), nats(theirs, ours), float(same))


def nats(one: Tensor, other: Tensor) -> float:  # logits [tokens, vocab] each
    """KL(one || other), the mean over tokens."""
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


if __name__ == "__main__":
    sys.exit(main())
