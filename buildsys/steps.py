"""What each kind of step does: the only glue between the slots, the arithmetic and the files.

`run` gets a step's declared inputs and a folder, and nothing else; the store commits what lies in the folder afterwards. Steps that compute
import torch when they run, so that planning and cached builds never pay for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from buildsys import deploy
from buildsys.architecture import Architecture, fused
from buildsys.backends import Work
from buildsys.errors import BuildError
from buildsys.measurement import Measurement, scores_file
from buildsys.relayout import Relayout, relayout
from buildsys.scheme import Scheme, Schemes
from buildsys.serving import guide
from buildsys.serving.settings import settings
from buildsys.slots import modules
from buildsys.step import Inputs, Request, Resources, canonical
from buildsys.survey import describe, read_config

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.io.checkpoint import Checkpoint, Writer
    from buildsys.quant.model import Model

__all__ = ["Request", "Resources", "run"]

Progress = Callable[[str, int, int], None]
SHARDS = 16  # files of a large model, about: several are hashed, sent and read at a time, and the last one is waited for
SHARD_BYTES = (256 << 20, 4 << 30)  # the least and the most of one
TOKENS, GENERATIONS, GENERATION = "tokens.safetensors", "generations.json", "generation_config.json"
CHOSEN, COSTS = "schemes.json", "bits.json"


def run(request: Request, progress: Progress) -> dict[str, Any]:
    """Do one step; returns facts about the run that belong in its manifest. Raises BuildError."""
    return _STEPS[request.kind](request, progress) or {}


def fetch(request: Request, progress: Progress) -> None:
    """Links to the files where they are, or where a hub's client keeps them. Their digests are known since the build was planned."""
    expected: Mapping[str, str] = request.knobs["files"]
    for done, (name, path) in enumerate(sorted(_here(request, expected, progress).items())):
        if request.sha256(path) != expected[name]:
            raise BuildError(str(path), "changed after the build was planned", "run the same command again when nobody writes to it")
        link = request.stage / name
        link.unlink(missing_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
        progress("fetch", done + 1, len(expected))


def _here(request: Request, expected: Mapping[str, str], progress: Progress) -> Mapping[str, Path]:
    hints = request.hints
    if "how" not in hints:
        return {name: Path(path) for name, path in hints["paths"].items()}
    if "unreachable" in hints["how"]:
        what = f"its files are known from the lock alone, and cannot be fetched now: {hints['how']['unreachable']}"
        raise BuildError(str(hints["how"]["pin"]), what, "go online, or build where an earlier build has fetched them")
    brought: Mapping[str, Path] = modules(hints["slot"])[hints["module"]].fetch(hints["how"], expected, progress)
    return brought


def tokens(request: Request, progress: Progress) -> None:
    """Windows of token ids: read, or written by the model itself."""
    from buildsys.io import checkpoint, corpus

    asked, where, resources = request.knobs, str(request.hints.get("where", "calibration")), request.resources
    dataset = modules("datasets")[asked["dataset"]["name"]]
    knobs = dataset.Knobs.model_construct(**asked["dataset"]["knobs"])
    source = request.read("source")
    if dataset.READS == "model":
        model = float_model(source, request)
        found = dataset.generate(knobs, model, asked["samples"], asked["seqlen"], asked["seed"], resources, progress)
    else:
        encode = corpus.tokenizer(source.files, "source")
        files = request.read("text").files
        texts = dataset.texts(knobs, files) if dataset.READS == "text" else dataset.texts(knobs, files, _renderer(source))
        end = "" if dataset.READS == "chat" else "\n"  # a template ends a conversation itself
        found = corpus.windows(texts, encode, asked["samples"], asked["seqlen"], asked["seed"], where, end)
        found = corpus.within(found, asked["vocab_size"], where)
    checkpoint.save(request.stage / TOKENS, {"tokens": found})


def _renderer(source: Inputs) -> Any:
    from buildsys.io import chat

    return chat.renderer(source.files, "source")


def disjoint(request: Request, progress: Progress) -> None:
    """Refuses verify text that calibration has seen, wherever in a window it stands."""
    from buildsys.io import checkpoint, corpus

    ours, theirs = (checkpoint.load(request.read(role).path(TOKENS))["tokens"] for role in ("verify", "calibration"))
    shared = corpus.shared_windows(ours, theirs)
    if shared:
        what = f"verify.text repeats calibration text in {len(shared)} of {len(ours)} windows (first: window {shared[0]})"
        fix = "name other text for one of the two: a model is not verified on text that it was fitted to"
        raise BuildError(str(request.hints.get("where", "verify.text")), what, fix)
    (request.stage / "disjoint.json").write_text(json.dumps({"windows": len(ours), "shared": 0}))


def calibrate(request: Request, progress: Progress) -> None:
    """Activation statistics of the float model."""
    from buildsys.io import checkpoint
    from buildsys.quant import observe
    from buildsys.quant.parallel import tensor_cores

    seen = checkpoint.load(request.read("tokens").path(TOKENS))["tokens"]
    with tensor_cores(request.resources.device):
        model = float_model(request.read("source"), request)
        observe.calibrate(model, seen, request.stage, request.resources, progress, request.finished)


def quantize(request: Request, progress: Progress) -> dict[str, Any]:
    """Codes for every block, by the backend that the recipe names."""
    from buildsys.quant.rounding import Job

    said = request.knobs.get("backend", {"name": "native", "knobs": {}})
    backend = modules("backends")[said["name"]]
    *rescalers, rounder = (_method(one if isinstance(one, Mapping) else {"name": one, "knobs": {}}) for one in request.knobs["methods"])
    own = {name: _method(one) for name, one in request.knobs.get("own_methods", {}).items()}
    job = Job(schemes(request), tuple(rescalers), rounder, own)
    work = Work(request, float_model(request.read("source"), request), job, modules("formats"))
    facts: dict[str, Any] = backend.quantize(backend.Knobs.model_construct(**said["knobs"]), work, progress)
    return facts


def allocate(request: Request, progress: Progress) -> dict[str, Any]:
    """Each linear's bits, chosen under the budget from what they cost; beside them what there was to choose from."""
    from buildsys.io import checkpoint
    from buildsys.quant import allocate as parts
    from buildsys.quant import quantize as walk
    from buildsys.quant.budget import average_bits, spend, table
    from buildsys.quant.parallel import tensor_cores
    from buildsys.quant.rounding import Job

    mixed, stats = request.knobs["mixed"], request.read("stats")
    model = float_model(request.read("source"), request)
    job = Job(schemes(request), tuple(map(_method, request.knobs["methods"])), _method({"name": "rtn", "knobs": {}}))
    seen = checkpoint.load(request.read("tokens").path(TOKENS))["tokens"]
    together = tuple(fused(model.architecture))
    with tensor_cores(request.resources.device):
        groups = parts.measure(
            model, job, together, mixed["bits"], lambda layer: stats.path(walk.block_name(layer)), seen, request.resources, progress
        )
    chosen = spend(groups, mixed["budget_bits"], str(request.hints.get("where", "quantization.mixed")))
    found = {name: asdict(option.scheme) for group, option in zip(groups, chosen, strict=True) for name in group.names}
    (request.stage / CHOSEN).write_bytes(canonical(found))
    (request.stage / COSTS).write_text(json.dumps(table(groups, chosen), indent=1, allow_nan=False) + "\n")
    return {"average_bits": round(average_bits(groups, chosen), 4)}


def schemes(request: Request) -> Schemes:
    """Each linear's scheme: as the recipe says, with the bits that allocate chose where there are such."""
    said = Schemes.from_json(request.knobs)
    if "bits" not in request.inputs:
        return said
    chosen = json.loads(request.read("bits").path(CHOSEN).read_text())
    return Schemes(said.default, said.left_float, {**said.own, **{name: Scheme(**raw) for name, raw in chosen.items()}})


def _method(said: Mapping[str, Any]) -> Any:
    from buildsys.quant.rounding import Method

    module = modules("methods")[said["name"]]
    return Method(module, module.Knobs.model_construct(**said["knobs"]))


def outside(request: Request, progress: Progress) -> None:
    """What lies outside of the blocks, in the format's layout: the same whatever happens to the blocks."""
    from buildsys.io.checkpoint import Checkpoint, Writer

    made, source, floats = _relaid(request), Checkpoint(request.read("source").files), request.knobs["floats"]
    shapes, names = made.architecture.tensors(), made.outside()
    layout = {name: (floats, shape) for name, shape in shapes.items() if name in names}
    with Writer(request.stage, layout, {}, _shard_bytes(layout), request.finished) as writer:
        _through(_outside(made, source, floats, writer, request), "outside", request, progress)
        writer.close()


def pack(request: Request, progress: Progress) -> None:
    """The whole model in the format's layout: codes from the blocks; what lies outside of them from the source, or as packed before."""
    from buildsys.io import headers
    from buildsys.io.checkpoint import Checkpoint, Writer
    from buildsys.quant.blocks import load_block
    from buildsys.quant.quantize import block_name
    from buildsys.quant.rows import relay

    made, source = _relaid(request), Checkpoint(request.read("source").files)
    format, device = modules("formats")[request.knobs["format"]["name"]], request.resources.device
    packed = dict(request.inputs.get("outside", {}))
    layout = packed_layout(made.architecture, format, made.schemes(schemes(request)))
    held = {name for path in packed.values() for name in headers.read(path).tensors}
    ours = {name: kind for name, kind in layout.items() if name not in held}

    def block(writer: Writer, layer: int) -> None:
        prefix = made.architecture.prefix(layer)
        linears, floats = relay(made, *load_block(request.read("blocks").path(block_name(layer)), device))
        _add(writer, {prefix + name: tensor for name, tensor in floats.items()})
        for name, linear in linears.items():
            _add(writer, {f"{prefix}{name}.{part}": tensor for part, tensor in format.pack(linear).items()})

    with Writer(request.stage, ours, {}, _shard_bytes(layout), request.finished, tuple(packed[name] for name in sorted(packed))) as writer:
        around = [] if packed else _outside(made, source, format.FLOATS, writer, request)
        _through([*around, *(partial(block, writer, layer) for layer in range(made.old.layers))], "pack", request, progress)
        writer.close()


def _outside(made: Relayout, source: Checkpoint, floats: str, writer: Writer, request: Request) -> list[Callable[[], None]]:
    from buildsys.io.checkpoint import DTYPES
    from buildsys.quant.rounding import to_half

    def one(name: str, old: str) -> None:
        half = to_half(source.load(old, source.dtype(old), request.resources.device), old)
        assert half.dtype == DTYPES[floats]
        writer.add(name, half)

    return [partial(one, name, old) for name, old in made.outside().items()]


def _through(work: Sequence[Callable[[], None]], what: str, request: Request, progress: Progress) -> None:
    from buildsys.quant.parallel import through_files

    for done, _ in enumerate(through_files(lambda one: one(), work, request.resources)):
        progress(what, done + 1, len(work))


def _shard_bytes(layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """The most that one file of the model holds, but for a tensor that is larger."""
    from buildsys.io import headers

    least, most = SHARD_BYTES
    return min(max(sum(headers.size(*held) for held in layout.values()) // SHARDS, least), most)


def _add(writer: Writer, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        writer.add(name, tensor)


def packed_layout(architecture: Architecture, format: Any, schemes: Schemes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of the packed model with its type and shape, in the order in which an engine loads them."""
    linears = {architecture.prefix(layer) + linear.name: linear for layer in range(architecture.layers) for linear in architecture.linears}
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in architecture.tensors().items():
        linear = linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        whole = name.removesuffix(".weight")
        scheme = schemes.of(whole) if linear is not None else None
        if linear is None or scheme is None:
            found[name] = (format.FLOATS, shape)
        else:
            found |= format.layout(whole, scheme, linear.in_features, linear.out_features)
    return found


def assemble(request: Request, progress: Progress) -> None:
    """The deployable folder: packed weights and the source's other files as links, config.json and deploy/ written."""
    from buildsys.io.chat import has_template

    knobs, source, packed = request.knobs, request.read("source"), request.read("packed")
    made, format = _relaid(request), modules("formats")[knobs["format"]["name"]]
    architecture, held = made.architecture, made.schemes(schemes(request))
    head = [(architecture.lm_head or "lm_head.weight").removesuffix(".weight")]
    rewritten = {
        "config.json": lambda raw: deploy.config(
            made.config, format.config(held, [*head, *architecture.routers(), *sorted(held.left_float)])
        ),
        "tokenizer_config.json": lambda raw: deploy.tokenizer_config(raw, "tokenizer.json" in source.files),
    }
    for name, path in {**source.files, **packed.files}.items():
        target = request.stage / name
        target.unlink(missing_ok=True)
        if name in rewritten:
            target.write_text(json.dumps(rewritten[name](read_config(path, name)), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            target.symlink_to(path)
    for name, text in _served(knobs, made, held, has_template(source.files)).items():
        (request.stage / name).parent.mkdir(exist_ok=True)
        (request.stage / name).write_text(text, encoding="utf-8")


def _served(knobs: Mapping[str, Any], made: Relayout, held: Schemes, chat: bool) -> dict[str, str]:
    """What is in deploy/: nothing where no engine of LMDeploy serves the model."""
    if knobs["engine"] == "none":
        return {}
    a, method = made.architecture, modules("formats")[knobs["format"]["name"]].QUANT_METHOD
    decided = settings(knobs["engine"], method, knobs["kv_cache"], knobs["target"], a.max_positions, a.rope)
    return guide.files(decided, guide.model_name(str(made.config.get("model_type") or ""), a, held), chat)


def score(request: Request, progress: Progress) -> dict[str, Any]:
    """Both models' predictions on the verify text, one value a token, with each KV policy that is asked for; and how
    far apart they are after each block."""
    from buildsys.io import checkpoint
    from buildsys.quant.kv import keep
    from buildsys.quant.score import score_caches

    asked = request.knobs["kv"]
    caches = {policy: keep(policy) for policy in ([asked] if isinstance(asked, str) else asked)}
    seen = checkpoint.load(request.read("tokens").path(TOKENS))["tokens"]
    source, quantized = float_model(request.read("source"), request), packed_model(request, None)
    found = score_caches(source, quantized, caches, seen, request.resources, progress)
    for policy, scores in found.items():
        checkpoint.save(request.stage / scores_file(policy), scores.tokens)
    return {"block_drift": {policy: [float(f"{drift:.6g}") for drift in scores.drift] for policy, scores in found.items()}}


def generate(request: Request, progress: Progress) -> None:
    """Greedy answers of both models to the recipe's prompts, one model in memory after the other."""
    from buildsys.io import corpus
    from buildsys.quant.sample import greedy

    source, asked = request.read("source"), list(request.knobs["prompts"])
    decode, prompts = corpus.decoder(source.files, "source"), _prompts(request, source)
    original = float_model(source, request)
    ends, answers = _ends(source, original.architecture), []
    for phase, model in (("source", original), ("quantized", packed_model(request, None))):
        written = greedy(model, prompts, request.knobs["max_new_tokens"], ends, request.resources, partial(progress, phase))
        answers.append([decode(ids) for ids in written])
    found = [{"prompt": text, "source": first, "quantized": second} for text, first, second in zip(asked, *answers, strict=True)]
    (request.stage / GENERATIONS).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _prompts(request: Request, source: Inputs) -> list[list[int]]:
    """The recipe's prompts as token ids, asked through the chat template where the recipe or the model wants that."""
    from buildsys.io import chat, corpus

    encode, wanted = corpus.tokenizer(source.files, "source"), request.knobs["chat"]
    render = None if wanted is False or (wanted is None and not chat.has_template(source.files)) else _renderer(source)
    return [encode(render([{"role": "user", "content": text}], None, True) if render else text) for text in request.knobs["prompts"]]


def _ends(source: Inputs, architecture: Architecture) -> frozenset[int]:
    """Tokens that end an answer: of config.json, and of generation_config.json, which knows a chat's."""
    said = read_config(source.path(GENERATION), GENERATION).get("eos_token_id") if GENERATION in source.files else None
    more = said if isinstance(said, list) else [said]
    return frozenset((*architecture.eos_token_ids, *(token for token in more if isinstance(token, int))))


def serve(request: Request, progress: Progress) -> None:
    """What a real server of the artifact answers, how fast, and in how much memory; beside it the source model."""
    from buildsys import trials
    from buildsys.io import checkpoint
    from buildsys.quant.kv import keep

    seen = checkpoint.load(request.read("tokens").path(TOKENS))["tokens"]
    prompts = _prompts(request, request.read("source"))
    trials.serve(request, prompts, seen, lambda policy: packed_model(request, keep(policy)), progress)


def measure(request: Request, progress: Progress) -> None:
    """One check's numbers."""
    knobs, made = request.knobs, _relaid(request)
    check = modules("checks")[knobs["check"]["name"]]
    context = SimpleNamespace(
        architecture=made.architecture,
        relayout=made,
        schemes=made.schemes(schemes(request)),
        format=modules("formats")[knobs["format"]["name"]],
        facts=knobs["facts"],
        progress=progress,
        device=request.resources.device,
    )
    inputs = {role: Inputs(files) for role, files in request.inputs.items()}
    found: list[Measurement] = check.measure(check.Knobs.model_construct(**knobs["check"]["knobs"]), inputs, context)
    (request.stage / "measurements.json").write_text(json.dumps([asdict(one) for one in found], indent=1, allow_nan=False))


# Models as steps see them


def _architecture(source: Inputs) -> Architecture:
    return describe(read_config(source.path("config.json"), "config.json"), "config.json")[0]


def _relaid(request: Request) -> Relayout:
    """The names that the recipe writes the model under, and where under its own names each thing is."""
    config = read_config(request.read("source").path("config.json"), "config.json")
    return relayout(describe(config, "config.json")[0], config, "config.json", request.knobs["format"]["knobs"]["as_"])


def float_model(source: Inputs, request: Request) -> Model:
    """The source, read block by block."""
    from buildsys.io.checkpoint import Checkpoint
    from buildsys.quant.model import Model

    return Model(_architecture(source), Checkpoint(source.files), request.resources.device)


def packed_model(request: Request, keep_kv: Any) -> Model:
    """The artifact's weights, unpacked block by block."""
    from buildsys.io.checkpoint import Checkpoint
    from buildsys.quant.model import Model

    made, format = _relaid(request), modules("formats")[request.knobs["format"]["name"]]
    return Model(
        made.architecture,
        Checkpoint(request.read("packed").files),
        request.resources.device,
        unpack=format.unpack,
        schemes=made.schemes(schemes(request)),
        keep_kv=keep_kv,
    )


_STEPS: dict[str, Callable[[Request, Progress], dict[str, Any] | None]] = {
    function.__name__: function
    for function in (fetch, tokens, disjoint, calibrate, allocate, quantize, outside, pack, assemble, score, serve, measure, generate)
}
