"""A recipe's steps: what each reads, and so what is in its key. The knobs and the files that a step names are all that it gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from buildsys import footprint, gpus
from buildsys.architecture import Architecture
from buildsys.deployment import engine_check, source_engine
from buildsys.errors import BuildError
from buildsys.finder import Finder
from buildsys.linears import Linears
from buildsys.located import Located
from buildsys.locked import Locked, Pinned
from buildsys.measurement import scores_file
from buildsys.quant import VERSION as QUANT
from buildsys.recipe import Recipe
from buildsys.serving.settings import PROFILE
from buildsys.slots import Choice, modules
from buildsys.step import Need, Step
from buildsys.store import Store
from buildsys.survey import Survey

if TYPE_CHECKING:
    from buildsys.serving.host import Host

WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json")
"""What a step reads that computes with a model."""

CHAT = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json")
"""Beside the tokenizer, what turns a conversation into text, and special tokens into their ids."""

SERVED = ("rope_scaling", "tool_call_parser")
"""Knobs of the target that change no number that planning knows."""

LOADED = ("*.json", "*.safetensors", "*.model", "*.model.v*", "*.tiktoken", "*.jinja", "vocab.txt", "merges.txt", PROFILE)
"""What an engine reads of a model's folder: not what is written there for people."""

SERVE_OUTPUT, MEASURED = ("served.json",), ("measurements.json",)
"""What the serve step writes, and what a check writes. The first tells an engine's times and memory, and so does what is made of it."""

CHOSEN = "schemes.json"
"""What allocate writes: the scheme of each linear."""

OUTSIDE_BYTES = 256 << 20
"""From so many on, what lies outside of a model's blocks is packed by a step of its own."""

VERSIONS = MappingProxyType(
    {
        **dict.fromkeys(("fetch", "tokens", "disjoint", "calibrate", "allocate", "outside", "measure", "generate", "serve"), 1),
        **dict.fromkeys(("quantize", "score"), 2),
        "assemble": 3,
        "pack": 4,
    }
)
"""Of the steps' own glue in steps.py; arithmetic, methods, formats and checks have VERSIONs of their own, which are in the keys too."""


def located(finder: Finder, recipe: Recipe, where: tuple[str, ...], chosen: Choice, pinned: Pinned | None = None) -> Located:
    """The files of the recipe's choice at `where`; what is wrong with them is told at the recipe's own line.

    `pinned` is what the recipe's lock says of it: where the recipe still says the same, the commit there is asked for, and where the hub
    cannot be reached the lock answers.
    """
    if pinned is None or not pinned.pin or not pinned.fits(chosen):
        return finder.located(recipe, where, chosen)
    try:
        return finder.located(recipe, where, chosen, pinned.pin)
    except BuildError as error:
        why, name = error.what, str(chosen.knobs.model_dump().get("repo") or chosen.name)
        key = ("from lock", chosen.slot, chosen.name, pinned.model_dump_json())
        return finder.once(key, lambda: _from_lock(pinned, name, finder.store, why))


def _from_lock(pinned: Pinned, named: str, store: Store, why: str) -> Located:
    """What a lock knows of files that cannot be asked for; where a build has fetched them before, the files themselves."""
    pin = f"{named} at {pinned.pin[:12]}"
    fetch = Step("fetch", "", VERSIONS["fetch"], {"files": dict(pinned.files)})
    artifact = store.find(fetch.planned_key)  # it needs nothing, so its planned key is its real one
    if artifact is not None:
        files = {name: store.path(artifact, name) for name in pinned.files}
        return Located(files, sha256=pinned.files, commit=pinned.pin, pin=pin)
    return Located({}, pinned.files, pinned.sizes, how={"unreachable": why, "pin": pin}, lacks=why, commit=pinned.pin, pin=pin)


def text_of(recipe: Recipe, section: str) -> tuple[str, Choice]:
    """The dataset of `calibration` or `verify`, and the key that names it there."""
    return ("dataset", recipe.calibration.dataset) if section == "calibration" else ("text", recipe.verify.text)


def scored_policies(recipe: Recipe) -> tuple[gpus.KvPolicy, ...]:
    """KV policies that are scored beside none: those that the kv check names, and the recipe's own."""
    own, named = recipe.kv_cache.policy, recipe.verify.checks.get("kv")
    asked = {own, *getattr(named, "policies", ())} - {"none"}
    return tuple(policy for policy in footprint.KV_BITS if policy in asked)


def packed_apart(architecture: Architecture) -> bool:
    """Whether what lies outside of the blocks has a step of its own."""
    matrices = 1 if architecture.lm_head is None else 2  # in float16
    return 2 * matrices * architecture.vocab_size * architecture.hidden_size >= OUTSIDE_BYTES


def _method(chosen: Choice) -> dict[str, Any]:
    return {"name": chosen.name, "version": chosen.module.VERSION, "knobs": chosen.knobs.model_dump()}


@dataclass(frozen=True)
class Graph:
    """Makes a recipe's steps; each names exactly the knobs and the files that it reads."""

    recipe: Recipe
    surveyed: Survey
    layers: Linears
    finder: Finder
    located: Located  # the source's files
    engine: str  # that deploy/ names
    locked: Locked | None = None  # the recipe's lock
    allocated: Step | None = None  # chooses each linear's bits, where the recipe leaves that open

    def _step(self, kind: str, title: str, knobs: Mapping[str, Any], *needs: Need, **more: Any) -> Step:
        return Step(kind, title, VERSIONS[kind], knobs, needs, **{"heavy": True, **more})

    @cached_property
    def _packing(self) -> dict[str, Any]:
        """How the packed weights are to be read."""
        chosen = self.recipe.format
        return {
            "format": {"name": chosen.name, "version": chosen.module.VERSION, "knobs": chosen.knobs.model_dump()},
            **self.layers.schemes.to_json(),
        }

    @property
    def _bits(self) -> tuple[Need, ...]:
        """Where linears' bits are told, unless the recipe tells them."""
        return (Need("bits", self.allocated, (CHOSEN,)),) if self.allocated is not None else ()

    def fetch(self, what: str, slot: str, name: str, found: Located) -> Step:
        """Its key holds what the files are, never where they come from: a model on a hub and its copy on a disk are one step."""
        files = self.finder.digests(found)
        if found.how:
            hints: dict[str, Any] = {"how": dict(found.how), "slot": slot, "module": name}
        else:
            hints = {"paths": {file: str(path.absolute()) for file, path in found.files.items()}}
            hints |= {"module": name, "pin": found.pin} if found.pin else {}  # all of a hub's files may be here
        title = f"{what} ({name}{' ' + found.pin if found.pin else ''})"
        return self._step("fetch", title, {"files": files}, heavy=bool(found.how), hints=hints, promises=files)

    def text(self, section: str) -> Located | None:
        """The files of one of the recipe's two texts; None: the model writes it."""
        key, dataset = text_of(self.recipe, section)
        if dataset.module.READS == "model":
            return None
        pinned = None if self.locked is None else self.locked.calibration if section == "calibration" else self.locked.text
        return located(self.finder, self.recipe, (section, key), dataset, pinned)

    def tokens(self, section: str, source: Step, found: Located | None) -> Step:
        """Windows of one of the recipe's two texts; files are fetched first where the dataset has any."""
        asked = self.recipe.calibration if section == "calibration" else self.recipe.verify
        key, dataset = text_of(self.recipe, section)
        module, written = dataset.module, dataset.knobs.model_dump(exclude=set(dataset.module.PLACES))
        knobs = {
            "dataset": {"name": dataset.name, "version": module.VERSION, "knobs": written},
            "samples": asked.samples,
            "seqlen": asked.seqlen,
            "seed": asked.seed,
        }
        where = self.recipe.at(section, "samples")
        if found is None:
            knobs |= {"model": self.surveyed.computed, "quant": QUANT}
            needs = [Need("source", source, WEIGHTS)]
        else:
            knobs |= {"vocab_size": self.surveyed.architecture.vocab_size}
            text = self.fetch(f"{section} text", "datasets", dataset.name, found)
            if module.READS == "chat":
                fix = "use text_files for a base model, or the chat model of its family as the source"
                self._has_template(section, key, "the dataset holds conversations", fix)
            needs = [Need("source", source, self._tokenizer(module.READS == "chat")), Need("text", text)]
        title = f"{section} {dataset.name} {asked.samples} x {asked.seqlen}, seed {asked.seed}"
        return self._step("tokens", title, knobs, *needs, hints={"where": where}, computes=module.READS == "model")

    def _has_template(self, section: str, key: str, needed: str, fix: str) -> None:
        from buildsys.io.chat import has_template

        known = self.locked.model.template if self.located.lacks and self.locked is not None else has_template(self.located.files)
        if not known:
            raise BuildError(self.recipe.at(section, key), f"the model has no chat template, and {needed}", fix)

    def _tokenizer(self, chat: bool) -> tuple[str, ...]:
        """Files of the source that turn text into tokens; tokenizer.json says it all, a sentencepiece model leaves added tokens out."""
        whole = self.surveyed.tokenizer == "tokenizer.json" and not chat
        return (self.surveyed.tokenizer,) if whole else (self.surveyed.tokenizer, *CHAT)

    def disjoint(self, calibration: Step, text: Step) -> Step:
        """Refuses verify text that calibration has seen; nothing reads its output, but nothing expensive starts before it."""
        needs = Need("calibration", calibration), Need("verify", text)
        return self._step("disjoint", "verify text is new", {}, *needs, hints={"where": self.recipe.at("verify", "text")})

    def calibrate(self, source: Step, tokens: Step, disjoint: Step) -> Step:
        knobs = {"model": self.surveyed.computed, "quant": QUANT}
        needs = Need("source", source, WEIGHTS), Need("tokens", tokens)
        return self._step("calibrate", "activation statistics", knobs, *needs, after=(disjoint,), computes=True)

    def _methods(self) -> list[dict[str, Any]]:
        return [_method(chosen) for chosen in self.recipe.quantization.method]

    def allocate(self, source: Step, stats: Step, tokens: Step) -> Step:
        """Bits for each linear from what it costs to have fewer there."""
        mixed = self.recipe.quantization.mixed
        assert mixed is not None
        knobs = {
            "model": self.surveyed.computed,
            "quant": QUANT,
            **self.layers.schemes.to_json(),
            "methods": self._methods()[:-1],
            "mixed": mixed.model_dump(mode="json"),
        }
        title = f"bits from {', '.join(map(str, mixed.bits))} under {mixed.budget_bits:g}"
        needs = Need("source", source, WEIGHTS), Need("stats", stats), Need("tokens", tokens)
        return self._step("allocate", title, knobs, *needs, computes=True, hints={"where": self.recipe.at("quantization", "mixed")})

    def quantize(self, source: Step, stats: Step, tokens: Step, disjoint: Step) -> Step:
        asked, own, backend = self.recipe.quantization, self.layers.methods, self.recipe.quantization.backend
        methods = {name: _method(chosen) for name, chosen in sorted(own.items())}
        knobs = {
            "model": self.surveyed.computed,
            "quant": QUANT,
            **self.layers.schemes.to_json(),
            "methods": self._methods(),
        } | ({"own_methods": methods} if methods else {})
        if backend.module.TOOL:  # its methods are the tool's, whatever version ours have
            knobs |= {"methods": [chosen.name for chosen in asked.method], "backend": _method(backend)}
        reads = backend.module.READS
        needs = [Need("source", source, WEIGHTS), *([Need("stats", stats)] if "stats" in reads else ()), *self._bits]
        if "stats" not in reads or any(chosen.module.SEES_TOKENS for chosen in (asked.method[-1], *own.values())):
            needs.append(Need("tokens", tokens))
        title = f"{asked.told}, {' + '.join(m.name for m in asked.method)}{f' by {backend.module.TOOL}' if backend.module.TOOL else ''}"
        hints = {"where": self.recipe.at("quantization", "backend")} if backend.module.TOOL else {}
        after = () if "stats" in reads else (disjoint,)
        return self._step("quantize", title, knobs, *needs, after=after, hints=hints, resumes=backend.module.RESUMES, computes=True)

    def outside(self, source: Step) -> Step | None:
        """The embedding, the last norm and the head, where they are large: the same whatever happens to the blocks, and so one step and one
        set of files for all variants of a recipe."""
        if not packed_apart(self.surveyed.architecture):
            return None
        chosen = self.recipe.format
        as_ = chosen.knobs.model_dump()["as_"]
        knobs = {"model": self.surveyed.computed, "quant": QUANT, "floats": chosen.module.FLOATS, "format": {"knobs": {"as_": as_}}}
        return self._step("outside", "embedding and head", knobs, Need("source", source, WEIGHTS), computes=True)

    def pack(self, source: Step, blocks: Step, outside: Step | None) -> Step:
        knobs = {"model": self.surveyed.computed, "quant": QUANT, **self._packing}
        needs = [Need("source", source, WEIGHTS), Need("blocks", blocks, ("*.safetensors",)), *self._bits]
        needs += [Need("outside", outside, ("*.safetensors",))] if outside is not None else []
        return self._step("pack", f"format {self.recipe.format.name}", knobs, *needs, computes=True)

    def assemble(self, source: Step, packed: Step, files: tuple[str, ...]) -> Step:
        """Everything of the source that is not weights, the packed weights, and how to serve them."""
        target = self.recipe.target.model_dump() if self.recipe.target is not None else None
        if self.recipe.target is not None and self.recipe.target.tool_call_parser is not None:
            self._has_template("target", "tool_call_parser", "a server calls tools through it", "leave tool_call_parser out")
        knobs = {
            **self._packing,
            "model": self.surveyed.computed,
            "kv_cache": self.recipe.kv_cache.model_dump(),
            "target": target,
            "engine": self.engine,
        }
        rest = tuple(sorted(name for name in files if not name.endswith((".safetensors", ".safetensors.index.json"))))
        needs = Need("source", source, rest), Need("packed", packed), *self._bits
        return self._step("assemble", "deployable folder", knobs, *needs, heavy=False)

    def score(self, source: Step, packed: Step, tokens: Step, policies: tuple[str, ...]) -> Step:
        """One walk over both models for these KV policies. What is scored without one has the key that it had before there were several."""
        knobs = {"model": self.surveyed.computed, "quant": QUANT, **self._packing}
        knobs["kv"] = "none" if policies == ("none",) else list(policies)
        needs = Need("source", source, WEIGHTS), Need("packed", packed), Need("tokens", tokens), *self._bits
        title = "predictions beside the source's" + ("" if policies == ("none",) else f", KV cache {', '.join(policies)}")
        return self._step("score", title, knobs, *needs, computes=True)

    def scores(self, source: Step, packed: Step, tokens: Step) -> tuple[Need, ...]:
        """What checks read of predictions: without a KV policy, and with each that is asked for (docs/decisions/0017-kv-policies.md).

        A recipe that names the kv check has all its policies scored in one walk, the same for each of kv_cache.policy. One that only has a
        policy pays for it alone, beside the scores without one that its recipe without a policy has too.
        """
        own, named = self.recipe.kv_cache.policy, self.recipe.verify.checks.get("kv")
        asked = scored_policies(self.recipe)
        if named is not None:
            plain = with_kv = self.score(source, packed, tokens, ("none", *asked))
        else:
            plain, with_kv = self.score(source, packed, tokens, ("none",)), self.score(source, packed, tokens, (own,))
        needs = [Need("scores", plain, (scores_file("none"),))]
        return (*needs, Need("kv_scores", with_kv, tuple(map(scores_file, asked)))) if asked else tuple(needs)

    def generate(self, source: Step, packed: Step, files: tuple[str, ...]) -> Step | None:
        """Both models' greedy answers to the recipe's prompts."""
        asked = self.recipe.report
        prompts = [*asked.prompts, *self._prompts_file()]
        if not prompts:
            return None
        knobs = {
            "prompts": prompts,
            "max_new_tokens": asked.max_new_tokens,
            "chat": asked.chat,
            "model": self.surveyed.computed,
            "quant": QUANT,
            **self._packing,
        }
        beside = tuple(name for name in (self.surveyed.tokenizer, *CHAT, "generation_config.json") if name in files)
        needs = Need("source", source, (*WEIGHTS, *beside)), Need("packed", packed), *self._bits
        where = self.recipe.at("report")
        title = f"answers to {len(prompts)} prompts"
        return self._step("generate", title, knobs, *needs, hints={"where": where}, computes=True)

    def _prompts_file(self) -> list[str]:
        """Prompts of `report.path`, one a line."""
        if self.recipe.report.path is None:
            return []
        path = self.recipe.folder("report") / self.recipe.report.path
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            what = f"{path} cannot be read as text: {error.strerror if isinstance(error, OSError) else error}"
            raise BuildError(self.recipe.at("report", "path"), what, "write a UTF-8 file with one prompt a line") from None
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise BuildError(self.recipe.at("report", "path"), f"{path} holds no prompt", "write one prompt a line, or leave path out")
        return prompts

    def serve(self, source: Step, packed: Step, artifact: Step, tokens: Step, host: Host, asked: Any) -> Step:
        """A server of the artifact, and what it is held beside, on this machine's GPU: of another GPU, driver or engine it says nothing."""
        report, module = self.recipe.report, modules("checks")["serve"]
        chosen = asked.model_dump(mode="json", exclude={*module.LIMITS, *module.ASIDE})
        count = 1 if self.recipe.target is None else self.recipe.target.count
        policy = self.recipe.kv_cache.policy
        knobs = {
            "asked": chosen,
            "prompts": [*report.prompts, *self._prompts_file()],
            "chat": report.chat,
            "host": {"lmdeploy": host.lmdeploy, "gpus": [[device.name, device.driver] for device in host.devices[:count]]},
            "source": source_engine(self.recipe, self.surveyed),
            "token_bytes": {said: footprint.kv_bytes_per_token(self.surveyed.architecture, said, count) for said in ("none", policy)},
            "kv": policy,
            "model": self.surveyed.computed,
            "quant": QUANT,
            **self._packing,
        }
        needs = (
            Need("source", source, LOADED),
            Need("packed", packed),
            Need("artifact", artifact, LOADED),
            Need("tokens", tokens),
            *self._bits,
        )
        hints = {"python": host.python, "timeout_s": asked.timeout_s, "where": self.recipe.at("verify", "serve")}
        title = f"a server on {', '.join(sorted({device.name for device in host.devices[:count]}))}"
        return self._step("serve", title, knobs, *needs, hints=hints, computes=True, engine=True, clocked=SERVE_OUTPUT)

    def measures(
        self, source: Step, quantized: Step, packed: Step, tokens: Step, served: Callable[[Any], Step] | None
    ) -> Iterator[tuple[str, Step]]:
        """One step a check, without its limits: those are judged, and a change of them measures nothing again. `served` makes the step
        that a check reads which asks an engine; None: there is none here, and such a check is skipped."""
        policy = self.recipe.kv_cache.policy
        every = Need("packed", packed), Need("blocks", quantized, ("*.safetensors",)), *self.scores(source, packed, tokens)
        outputs = {need.role: need for need in every}
        named = self.recipe.verify.checks
        for name, module in modules("checks").items():
            if not (module.ALWAYS or name in named or ("kv_scores" in module.READS and policy != "none")):
                continue
            chosen = named[name] if name in named else module.Knobs()
            if engine_check(name):
                if served is None:
                    continue
                outputs["served"] = Need("served", served(chosen), SERVE_OUTPUT)
            needs = [outputs[role] for role in module.READS if role in outputs]
            knobs = {
                "check": {"name": name, "version": module.VERSION, "knobs": chosen.model_dump(exclude={*module.LIMITS, *module.ASIDE})},
                "model": self.surveyed.computed,
                "quant": QUANT if module.READS != ("plan",) else None,
                **self._packing,
                "facts": self._facts(module.READS),
            }
            # config.json tells the architecture; where a check reads no weights, nothing else of the source is in its key.
            more = {"computes": "packed" in module.READS, "clocked": MEASURED if engine_check(name) else ()}
            yield name, self._step("measure", name, knobs, Need("source", source, ("config.json",)), *needs, *self._bits, **more)

    def _facts(self, reads: tuple[str, ...]) -> dict[str, Any]:
        """What planning knows, for the checks that ask for it."""
        kv_cache = self.recipe.kv_cache
        if "plan" in reads:
            target = self.recipe.target.model_dump(exclude=set(SERVED)) if self.recipe.target is not None else None
            return {"kv_cache": kv_cache.model_dump(), "target": target}
        return {"kv_cache": {"policy": kv_cache.policy}} if "kv_scores" in reads else {}
