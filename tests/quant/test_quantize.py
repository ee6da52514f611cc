"""The walk that quantizes against a slow twin that keeps the whole model; what a killed walk left; threads, batch and skips."""

from __future__ import annotations

import json
import os
import shutil
import threading
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from buildsys.errors import BuildError
from buildsys.methods import awq, gptaq, gptq, rtn
from buildsys.quant.block import Block
from buildsys.quant.blocks import load_block
from buildsys.quant.fold import fold, tied_channels
from buildsys.quant.model import Model
from buildsys.quant.observe import calibrate, load_stats
from buildsys.quant.quantize import block_name, errors_name, quantize, quantized_weights, told
from buildsys.quant.rotary import tables
from buildsys.quant.rounding import Job, Method, rescale, round_block, to_half
from buildsys.quant.stream import ERROR_TOKENS, Apart, Moments, Walk
from buildsys.quant.sums import PART
from buildsys.scheme import Scheme, Schemes
from buildsys.step import Resources
from tests import models

LENGTH, LAYERS, MANY, SCHEME = 24, 3, 48, Scheme(4, 32)
ALL = Schemes(SCHEME)
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": 64, "intermediate_size": 96}
AWQ, GPTQ, RTN = Method(awq, awq.Knobs(ratios=4)), Method(gptq, gptq.Knobs()), Method(rtn, rtn.Knobs())
GPTAQ = Method(gptaq, gptaq.Knobs(ridges=(0.1, 1.0, 10.0, 100.0)))  # of little text much is believed only with a large one
JOBS = {
    "awq gptq": Job(ALL, (AWQ,), GPTQ),
    "awq gptaq": Job(ALL, (AWQ,), GPTAQ),
    "gptq": Job(ALL, (), GPTQ),
    "awq rtn": Job(ALL, (AWQ,), RTN),
    "rtn": Job(ALL, (), RTN),
}


def quiet(what: str, done: int, of: int) -> None:
    assert 0 < done <= of


@dataclass(frozen=True)
class Bench:
    """A model with its calibration."""

    model: Model
    tokens: Tensor
    stats: Path

    def quantize(self, job: Job, folder: Path, resources: Resources | None = None) -> dict[str, bytes]:
        folder.mkdir(exist_ok=True)
        tokens = self.tokens if job.sees_tokens else None
        quantize(self.model, job, lambda layer: self.stats / block_name(layer), tokens, folder, resources or Resources(), quiet)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def bench(folder: Path, family: str = "llama", windows: int = 4) -> Bench:
    """`starved`: a mixture whose last expert is sent nothing."""
    starved = family == "starved"
    written = models.FAMILIES["mixtral" if starved else family](folder / "model", **SIZES, **({"num_local_experts": 5} if starved else {}))
    model = models.opened(models.starve(written) if starved else written)
    tokens, stats = models.tokens(windows, LENGTH), folder / "stats"
    stats.mkdir()
    calibrate(model, tokens, stats, Resources(), quiet)
    return Bench(model, tokens, stats)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """With as much text as it takes to aim by."""
    return bench(tmp_path_factory.mktemp("talkative"), windows=MANY)


def windows(job: str) -> int:
    return MANY if JOBS[job].sees_floats else 4


def aims(folder: Path) -> bool:
    """Whether most linears were aimed at something else: else a test says nothing of how."""
    noted = [json.loads(path.read_text()) for path in folder.glob("block-*.errors.json")]
    ridges = {name: notes["aim_ridge"] for block in noted for name, notes in block.items() if "aim_ridge" in notes}
    return len(ridges) > LAYERS and sum(map(bool, ridges.values())) > len(ridges) / 2


def reads(block: Block, hidden: list[Tensor], routing: list[Any] | None = None) -> tuple[dict[str, list[Tensor]], list[Any]]:
    """What is read at each site, window by window; where an expert is sent few tokens, all of them. Experts are sent what `routing` says,
    or what the block's own router says, which comes back."""
    a, sent = block.architecture, []
    found: dict[str, list[Tensor]] = {site: [] for site in a.sites}
    every: dict[str, list[Tensor]] = {site: [] for site in a.sites}
    for at, h in enumerate(hidden):
        x = block.attn_in(h)
        o_in = block.o_in(x, tables(a, LENGTH))
        mlp_in = block.mlp_in(block.after_attention(h, o_in))
        found["attn_in"].append(x)
        found["o_in"].append(o_in)
        if a.experts is None:
            found["mlp_in"].append(mlp_in)
            found["down_in"].append(block.down_in(mlp_in))
            continue
        sent.append(block.routed(mlp_in, a.experts) if routing is None else routing[at])
        for expert, (tokens, _) in enumerate(sent[-1]):
            for kept, shown in ((found, mlp_in[tokens]), (every, mlp_in)):
                kept[f"mlp_in.{expert}"].append(shown)
                kept[f"down_in.{expert}"].append(block.down_in(shown, expert))
    starved = [site for site in a.sites if every[site] and 16 * sum(map(len, found[site])) < a.width(site)]
    return found | {site: every[site] for site in starved}, sent


def twin(bench: Bench, job: Job) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Codes and final weights of every block; all stay in memory, and each linear's inputs come from forwards through all before it."""
    a, done, sources = bench.model.architecture, [], []
    found: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    scheme = job.schemes.default
    for layer in range(a.layers):
        block, stats = bench.model.block(layer), load_stats(bench.stats / block_name(layer))
        for method in job.rescalers:
            for site in reversed(a.scale_sites):
                readers = [block.weights[f"{linear.name}.weight"] for linear in a.at(site)]
                scale = method.module.rescale(readers, stats[site], tied_channels(a, site), scheme, method.knobs)
                block = block.with_weights(fold(a, block.weights, site, scale))
        linears = {f"{linear.name}.weight" for linear in a.linears}
        block = block.with_weights({name: tensor.half().float() for name, tensor in block.weights.items() if name not in linears})
        codes, source = dict[str, Tensor](), block
        if scheme.activations != "none":
            block = replace(block, activations={linear.name: scheme.activations for linear in a.linears})
        hidden, floats = ([*bench.model.embed(bench.tokens)] for _ in range(2))
        for earlier, float_earlier in zip(done, sources, strict=True):
            hidden = [earlier.forward(h, tables(a, LENGTH)) for h in hidden]
            floats = [float_earlier.forward(h, tables(a, LENGTH)) for h in floats]
        for site in a.sites:
            all_read, sent = reads(block, hidden)
            read = all_read[site]
            gram = in_parts([x.t() @ x for x in read if len(x)]) / sum(map(len, read))
            stacked = torch.cat([block.weights[f"{linear.name}.weight"] for linear in a.at(site)])
            wanted, module = stacked, job.rounder.module
            if module.SEES_FLOATS:
                seen = apart(block, source, site, hidden, floats, read, reads(source, floats, sent)[0][site])
                wanted, _ = module.aim(stacked, gram, seen, job.rounder.knobs)
            rounded, row = module.round_weights(wanted, gram, scheme, job.rounder.knobs).linear, 0
            for linear in a.at(site):
                rows = slice(row, row + linear.out_features)
                row, codes[linear.name] = rows.stop, rounded.codes[rows]
                block = block.with_weights({f"{linear.name}.weight": rounded.dequantize()[rows]})
        done.append(block)
        sources.append(source)
        found.append((codes, dict(block.weights)))
    return found


def in_parts(sums: list[Tensor]) -> Tensor:
    """Eight windows one after the other, then the next eight: another order would differ in last bits, and GPTQ's ties with them."""
    parts = [sum(sums[start : start + PART], torch.tensor(0.0)) for start in range(0, len(sums), PART)]
    return sum(parts, torch.tensor(0.0))


def apart(
    block: Block, source: Block, site: str, hidden: list[Tensor], floats: list[Tensor], read: list[Tensor], wanted: list[Tensor]
) -> Apart:
    """How far what is `read` is from what is `wanted`; where it goes back to the residual stream, how far that is behind it."""
    tokens, writes, sums = [0, 0], site in ("o_in", "down_in"), list[Tensor]()
    for at, (h, float_h, x, y) in enumerate(zip(hidden, floats, read, wanted, strict=True)):
        if not len(x):
            continue
        if site == "down_in":
            h, float_h = (
                of.after_attention(start, of.o_in(of.attn_in(start), tables(of.architecture, LENGTH)))
                for of, start in ((block, h), (source, float_h))
            )
        after = "after_attention" if site == "o_in" else "after_mlp"
        off = getattr(source, after)(float_h, y) - getattr(block, after)(h, x) if writes else y - x
        sums.append(torch.zeros(2, off.shape[1], x.shape[1]))
        sums[-1][at % 2] = off.t() @ x
        tokens[at % 2] += len(x)
    return Apart(in_parts(sums) / torch.tensor(tokens)[:, None, None].clamp(min=1), (tokens[0], tokens[1]), writes)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("family", ["llama", "internlm2", "qwen3", "phi3", "qwen3_moe", "starved"])
def test_the_walk_is_the_slow_twin(family: str, job: str, tmp_path: Path) -> None:
    made = bench(tmp_path, family, windows(job))
    made.quantize(JOBS[job], tmp_path / "out")
    assert aims(tmp_path / "out") == JOBS[job].sees_floats
    is_the_twin(made, JOBS[job], tmp_path)


@pytest.mark.parametrize("rounder", [GPTQ, GPTAQ], ids=["gptq", "gptaq"])
def test_so_it_is_where_linears_round_what_they_read(rounder: Method, tmp_path: Path) -> None:
    """The float model beside it rounds nothing."""
    made, job = bench(tmp_path, windows=MANY), Job(Schemes(Scheme(4, 32, False, "int", "int8")), (), rounder)
    made.quantize(job, tmp_path / "out")
    assert aims(tmp_path / "out") == job.sees_floats
    is_the_twin(made, job, tmp_path)


def is_the_twin(made: Bench, job: Job, tmp_path: Path) -> None:
    for layer, (codes, weights) in enumerate(twin(made, job)):
        linears, floats = load_block(tmp_path / "out" / block_name(layer))
        assert linears.keys() == codes.keys() and all(tensor.dtype == torch.float16 for tensor in floats.values())
        assert linears.keys() | floats.keys() == codes.keys() | {name for name in weights if name.removesuffix(".weight") not in codes}
        for name, linear in linears.items():
            assert torch.equal(linear.codes, codes[name]) and torch.equal(linear.dequantize(), weights[f"{name}.weight"]), name
        for name, tensor in floats.items():
            assert torch.equal(tensor.float(), weights[name])


@pytest.mark.parametrize("job", ["awq gptq", "awq gptaq", "rtn"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_killed_walk_goes_on_from_its_finished_blocks(family: str, job: str, tmp_path: Path) -> None:
    made = bench(tmp_path, family, windows(job))
    undisturbed = made.quantize(JOBS[job], tmp_path / "whole")
    assert aims(tmp_path / "whole") == JOBS[job].sees_floats
    assert set(undisturbed) == {name(layer) for layer in range(LAYERS) for name in (block_name, errors_name)}
    for finished in (0, 1, LAYERS):
        folder = tmp_path / str(finished)
        folder.mkdir()
        for layer in range(finished):
            for name in (block_name(layer), errors_name(layer)):
                shutil.copy2(tmp_path / "whole" / name, folder)
        if finished < LAYERS:
            (folder / errors_name(finished)).write_text("{")  # killed between the two files of a block
            (folder / f".{block_name(finished)}.partial").write_bytes(b"half a block")
        before = {path.name: path.stat().st_ino for path in folder.glob("block-*.safetensors")}
        assert made.quantize(JOBS[job], folder) == undisturbed
        assert all((folder / name).stat().st_ino == inode for name, inode in before.items()), "a finished block was made again"


@pytest.mark.parametrize("job", ["awq gptq", "rtn"])
def test_a_block_is_there_only_when_all_of_it_and_its_errors_are_on_the_disk(
    job: str, llama: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk that goes on believes every block file: a power cut takes what was not synced."""
    fsync, rename, synced, there = os.fsync, os.replace, set[int](), list[str]()

    def sync(file: int) -> None:
        fsync(file)
        synced.add(os.fstat(file).st_ino)

    def appear(one: Path | str, other: Path | str) -> None:
        assert os.stat(one).st_ino in synced, f"{other} appears before its bytes are on the disk"
        rename(one, other)
        synced.discard(tmp_path.stat().st_ino)  # until the folder is synced, a name may be lost
        there.append(Path(other).name)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", appear)
    monkeypatch.setattr(Path, "replace", lambda one, other: appear(one, other))
    llama.quantize(JOBS[job], tmp_path)
    assert there == [name(layer) for layer in range(LAYERS) for name in (errors_name, block_name)]
    assert tmp_path.stat().st_ino in synced


@pytest.mark.parametrize("job", ["awq gptq", "awq rtn"])
def test_of_a_finished_block_nothing_is_kept_but_what_the_next_one_reads(
    job: str, llama: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes of a large block are as much as a tenth of all that a walk may hold."""
    made: list[weakref.ref[Tensor]] = []

    def rounded(*given: Any) -> Any:
        assert all(codes() is None for codes in made), "codes of an earlier block"
        found = round_block(*given)
        made.extend(weakref.ref(linear.codes) for linear in found[0].linears.values())
        return found

    monkeypatch.setattr("buildsys.quant.quantize.round_block", rounded)
    llama.quantize(JOBS[job], tmp_path)
    assert len(made) == 7 * LAYERS


class TwoDevices(Resources):
    """Two devices that share the work, each in its own thread, as two GPUs do. Both are this processor."""

    @property
    def devices(self) -> tuple[str, ...]:
        return "cpu:0", "cpu:1"


@pytest.mark.parametrize("job", ["awq gptq", "awq gptaq", "awq rtn"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_devices_that_share_the_work_make_what_one_makes(family: str, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit where blocks know nothing of one another; where windows are summed in two parts, to the last bits of the sums. So too
    when a walk goes on, whose blocks begin beside the work on the one before."""
    begun: list[str] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: (begun.append(device), nullcontext())[1])
    monkeypatch.setattr("buildsys.quant.stream._room", lambda device: 3 * 4 * LENGTH * SIZES["intermediate_size"] // 2)  # one window of two
    monkeypatch.setattr("buildsys.quant.stream.KEEP_BYTES", 0)
    monkeypatch.setattr("buildsys.quant.quantize.quantized_weights", lambda path, device: quantized_weights(path, "cpu"))
    made = bench(tmp_path, family, windows(job))
    alone = made.quantize(JOBS[job], tmp_path / "one")
    assert not begun and aims(tmp_path / "one") == JOBS[job].sees_floats
    for kept in range(2):
        folder = tmp_path / str(kept)
        folder.mkdir()
        for name in (block_name(1), errors_name(1)) if kept else ():
            shutil.copy2(tmp_path / "one" / name, folder)
        together = made.quantize(JOBS[job], folder, TwoDevices(device="cpu:0"))
        assert set(begun) == {"cpu:0", "cpu:1"} and together.keys() == alone.keys()
        if not JOBS[job].sees_tokens:
            assert together == alone
            continue
        for layer in range(LAYERS):
            for name, wanted in load_block(tmp_path / "one" / block_name(layer))[0].items():
                found = load_block(folder / block_name(layer))[0][name]
                assert (found.codes == wanted.codes).float().mean() > 0.99, name
        errors = [told(at)["block_errors"] for at in (folder, tmp_path / "one")]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


class OneDevice(Resources):
    """A device with a thread of its own, as one GPU has."""

    @property
    def devices(self) -> tuple[str, ...]:
        return ("cpu:0",)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_one_device_begins_the_next_block_once_this_one_is_rounded(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a mixture's, which it would have to hold besides; and none before, when it holds the most."""
    made, rescaled = bench(tmp_path, family), [threading.Event() for _ in range(LAYERS)]
    blocks, finish, began, ahead = Model.blocks, Walk.finish, list[bool](), list[int]()

    def noted(block: Block, *given: Any) -> Any:
        rescaled[block.layer].set()
        return rescale(block, *given)

    def rounded(block: Block, *given: Any) -> Any:
        found = round_block(block, *given)
        assert not any(later.is_set() for later in rescaled[block.layer + 1 :])
        return found

    def finished(walk: Walk, block: Block, source: Block | None) -> None:
        began.append(rescaled[block.layer + 1].wait(timeout=5 if family == "llama" else 0.2))
        finish(walk, block, source)

    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr("buildsys.quant.stream._room", lambda _: 0)
    monkeypatch.setattr("buildsys.quant.quantize.rescale", noted)
    monkeypatch.setattr("buildsys.quant.quantize.round_block", rounded)
    monkeypatch.setattr(Walk, "finish", finished)
    monkeypatch.setattr(Model, "blocks", lambda self, layers, count: (ahead.append(count), blocks(self, layers, count))[1])
    found = made.quantize(JOBS["awq gptq"], tmp_path / "one", OneDevice(device="cpu:0"))
    assert began == [family == "llama"] * (LAYERS - 1) and ahead == [0]
    monkeypatch.undo()
    assert found == made.quantize(JOBS["awq gptq"], tmp_path / "cpu")


@pytest.mark.parametrize("job", ["awq gptq", "awq gptaq"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_threads_and_batch_change_no_byte(family: str, job: str, tmp_path: Path) -> None:
    made = bench(tmp_path, family, windows(job))
    runs = [made.quantize(JOBS[job], tmp_path / f"{t}-{b}", Resources(t, b)) for t, b in ((1, 1), (3, 1), (3, 8))]
    assert all(run == runs[0] for run in runs) and aims(tmp_path / "3-8") == JOBS[job].sees_floats


def test_what_the_text_says_too_little_of_is_told(llama: Bench, tmp_path: Path) -> None:
    llama.quantize(Job(ALL, (), Method(gptaq, gptaq.Knobs(ridges=(1e-6,)))), tmp_path)
    first = {f"model.layers.0.self_attn.{part}_proj" for part in "qkv"}  # at which both models read the same
    every = {f"model.layers.{layer}.{linear.name}" for layer in range(LAYERS) for linear in llama.model.architecture.linears}
    assert told(tmp_path)["unaimed"].keys() == every - first


def test_some_linears_are_aimed_and_others_are_not(talkative: Bench, tmp_path: Path) -> None:
    """By what rounds each; of what nothing came before there is nothing to aim at."""
    downs = {f"model.layers.{layer}.mlp.down_proj" for layer in range(LAYERS)}
    for rounder, other, aimed in ((GPTQ, GPTAQ, True), (GPTAQ, GPTQ, False)):
        folder = tmp_path / rounder.module.__name__
        talkative.quantize(Job(ALL, (), rounder, dict.fromkeys(downs, other)), folder)
        noted = {name: notes for layer in range(LAYERS) for name, notes in json.loads((folder / errors_name(layer)).read_text()).items()}
        found = {name for name, notes in noted.items() if "aim_ridge" in notes}
        first = {f"model.layers.0.self_attn.{part}_proj" for part in "qkv"}
        others = {name for name in noted if name.endswith("_proj")} - downs - first
        assert found == (downs if aimed else others) and len(others) == 6 * LAYERS - 3
        assert told(folder).get("unaimed", {}).keys() == {name for name in found if not noted[name]["aim_ridge"]} != found
    talkative.quantize(JOBS["gptq"], tmp_path / "plain")
    plain, mixed = (load_block(tmp_path / at / block_name(0))[0] for at in ("plain", gptq.__name__))
    assert all(torch.equal(plain[name].codes, mixed[name].codes) for name in plain if name != "mlp.down_proj")
    assert not torch.equal(plain["mlp.down_proj"].codes, mixed["mlp.down_proj"].codes)


def test_an_error_is_told_of_the_weight_and_not_of_what_was_aimed_at(llama: Bench) -> None:
    @dataclass
    class Elsewhere:
        """The float model reads half as much again."""

        def gram(self, block: Block, site: str, source: Block | None) -> Moments:
            width = block.architecture.width(site)
            return Moments(torch.eye(width), apart=Apart(0.5 * torch.eye(width).repeat(2, 1, 1), (100, 100), False))

    walk: Any = Elsewhere()
    rounded, _ = round_block(llama.model.block(0), Job(Schemes(Scheme(8, 32)), (), GPTAQ), {}, walk, ("cpu",))
    assert len(rounded.notes) == 7
    for notes in rounded.notes.values():
        assert notes["error"] == pytest.approx((0.5 / (1 + notes["aim_ridge"])) ** 2, rel=0.01)


def test_what_is_skipped_stays_float(llama: Bench, tmp_path: Path) -> None:
    skipped = frozenset({"model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj", "model.layers.2.self_attn.o_proj"})
    llama.quantize(Job(Schemes(SCHEME, skipped), (), GPTQ), tmp_path)
    for layer in range(LAYERS):
        linears, floats = load_block(tmp_path / block_name(layer))
        mine = {name.removeprefix(f"model.layers.{layer}.") for name in skipped if f".{layer}." in name}
        assert {linear.name for linear in llama.model.architecture.linears} - linears.keys() == mine
        for name in mine:
            assert torch.equal(floats[f"{name}.weight"], llama.model.block(layer).weights[f"{name}.weight"].half())
        noted = json.loads((tmp_path / errors_name(layer)).read_text())
        assert noted.keys() == {f"model.layers.{layer}", *(f"model.layers.{layer}.{name}" for name in linears)}


def test_everything_skipped_is_the_float_model(llama: Bench, tmp_path: Path) -> None:
    every = frozenset(f"model.layers.{at}.{linear.name}" for at in range(LAYERS) for linear in llama.model.architecture.linears)
    llama.quantize(Job(Schemes(SCHEME, every), (AWQ,), GPTQ), tmp_path)
    for layer in range(LAYERS):
        linears, floats = load_block(tmp_path / block_name(layer))
        weights = llama.model.block(layer).weights
        assert not linears and floats.keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name].half()) for name, tensor in floats.items())


@pytest.mark.parametrize("job", ["awq gptq", "awq rtn"])
def test_errors_are_relative_output_errors(job: str, llama: Bench, tmp_path: Path) -> None:
    llama.quantize(JOBS[job], tmp_path)
    noted = [json.loads((tmp_path / errors_name(layer)).read_text()) for layer in range(LAYERS)]
    found = {name: notes["error"] for layer in noted for name, notes in layer.items() if "error" in notes}
    assert len(found) == LAYERS * 7 and all(0 < error < 0.2 for error in found.values())
    # RTN without scales, first block, first site: the float model's own inputs on both sides.
    llama.quantize(JOBS["rtn"], tmp_path / "rtn")
    block = llama.model.block(0)
    x = torch.cat([block.attn_in(h) for h in llama.model.embed(llama.tokens)])
    weight = block.weights["self_attn.q_proj.weight"]
    off = load_block(tmp_path / "rtn" / block_name(0))[0]["self_attn.q_proj"].dequantize() - weight
    expected = float((x @ off.t()).square().sum() / (x @ weight.t()).square().sum())
    first = json.loads((tmp_path / "rtn" / errors_name(0)).read_text())["model.layers.0.self_attn.q_proj"]["error"]
    assert first == pytest.approx(expected, rel=1e-3)


def test_each_block_is_compared_with_its_source(llama: Bench, tmp_path: Path) -> None:
    llama.quantize(JOBS["awq gptq"], tmp_path)
    block, cos_sin = llama.model.block(0), tables(llama.model.architecture, LENGTH)
    linears, floats = load_block(tmp_path / block_name(0))
    weights = {name: tensor.float() for name, tensor in floats.items()}
    finished = Block(block.architecture, 0, weights | {f"{name}.weight": linear.dequantize() for name, linear in linears.items()})
    entering = llama.model.embed(llama.tokens)[: ERROR_TOKENS // LENGTH]
    wanted = torch.stack([block.forward(h, cos_sin) for h in entering])
    off = torch.stack([finished.forward(h, cos_sin) for h in entering]) - wanted
    expected = float(off.square().sum() / (wanted - torch.stack(entering)).square().sum())
    found = told(tmp_path)["block_errors"]
    assert found["model.layers.0"] == pytest.approx(expected, rel=1e-4) and len(found) == LAYERS
    llama.quantize(Job(Schemes(Scheme(8, 32)), (AWQ,), GPTQ), tmp_path / "finer")
    assert all(told(tmp_path / "finer")["block_errors"][name] < error / 50 for name, error in found.items())


@pytest.mark.parametrize("job", ["gptq", "rtn"])
def test_an_expert_that_saw_too_few_tokens_is_told_of(job: str, tmp_path: Path) -> None:
    made = bench(tmp_path, "starved")
    made.quantize(JOBS[job], tmp_path / "out")
    lonely = [f"model.layers.{layer}.block_sparse_moe.experts.4.{part}" for layer in range(LAYERS) for part in ("w1", "w2", "w3")]
    assert told(tmp_path / "out")["experts_of_few_tokens"] == dict.fromkeys(lonely, 0)
    for layer in range(LAYERS):
        noted = json.loads((tmp_path / "out" / errors_name(layer)).read_text())
        sent = {name: notes for name, notes in noted.items() if ".experts." in name}
        assert len(sent) == 3 * 5 and all("tokens" not in noted[name] for name in noted.keys() - sent.keys())
        assert sum(notes["tokens"] for name, notes in sent.items() if name.endswith("w1")) == 2 * made.tokens.numel()


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(BuildError, match="65504") as caught:
        to_half(torch.tensor([1.0, -7e4]), "model.norm.weight")
    assert caught.value.where == "model.norm.weight"
    assert torch.equal(to_half(torch.tensor([65504.0, 1e-9]), "x"), torch.tensor([65504.0, 0.0]).half())
