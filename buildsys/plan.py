"""A recipe becomes a graph of steps: `plan` puts together what fits, what serves it, and what building it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Literal

from buildsys import effort, footprint, gpus
from buildsys.deployment import engine_check, serves, target_gpu
from buildsys.errors import BuildErrors
from buildsys.finder import Finder
from buildsys.graph import Graph, located, packed_apart, scored_policies
from buildsys.linears import Linears
from buildsys.located import Located
from buildsys.locked import Locked
from buildsys.misfits import backend_misfits, misfits, ungated, unmeasured
from buildsys.recipe import Recipe
from buildsys.scheme import Schemes
from buildsys.step import Step, walk
from buildsys.store import Store
from buildsys.survey import Survey, recall

if TYPE_CHECKING:
    from buildsys.serving.host import Host


NOBODY_LOOKED = "nobody looked for a GPU"


@dataclass(frozen=True)
class Plan:
    """One recipe's graph. `steps` are in topological order and end with the measurements."""

    recipe: Recipe
    survey: Survey
    layers: Linears
    steps: tuple[Step, ...]
    artifact: Step  # its output is the deployable folder
    quantized: Step  # its output names each layer's error
    measures: tuple[tuple[str, Step], ...]
    generated: Step | None  # both models' answers to the recipe's prompts; only a report runs it
    source: Located
    texts: Mapping[str, Located]  # of calibration and verify, where they are not the model's own
    building: effort.Building
    serving: footprint.Serving | None  # None: the recipe names no target
    notes: tuple[str, ...]
    skipped: Mapping[str, str]  # checks that the recipe names and that cannot run here, each with why

    @property
    def name(self) -> str:
        return self.recipe.name


def plan(
    recipe: Recipe,
    store: Store,
    threads: int = 2,
    host: Host | str = NOBODY_LOOKED,
    device: Literal["auto", "cpu", "cuda"] = "cpu",
    finder: Finder | None = None,
    locked: Locked | None = None,
) -> Plan:
    """The graph of `recipe`; `threads` and `device` tell only how long it takes, `host` what can run an engine here, or why nothing can.
    Whoever plans several recipes in one command hands the same `finder` to each. What floats is what `locked`, the recipe's lock, says.
    Raises BuildErrors with every misfit of the recipe and its model."""
    finder = Finder(store) if finder is None else finder
    source = located(finder, recipe, ("source",), recipe.source, locked.source if locked is not None else None)
    if source.lacks and locked is not None:
        model = locked.model
        surveyed = finder.once(("recalled", id(source)), lambda: recall(model, recipe.at("source")))
    else:
        surveyed = finder.survey(source)
    layers, errors = finder.linears(recipe, surveyed)
    served_as = cache(partial(finder.serving, recipe, surveyed, layers.schemes))
    unheld = partial(finder.unheld, recipe, surveyed, layers.schemes)
    errors += [*misfits(recipe, surveyed, layers.schemes, served_as, unheld), *backend_misfits(recipe, surveyed, layers.schemes)]
    if errors:
        raise BuildErrors(errors)
    engine = finder.engine(recipe, surveyed)
    graph = Graph(recipe, surveyed, layers, finder, source, engine[0], locked)
    fetched = graph.fetch("source", "sources", recipe.source.name, source)
    texts = {section: found for section in ("calibration", "verify") if (found := graph.text(section)) is not None}
    calibration, text = (graph.tokens(section, fetched, texts.get(section)) for section in ("calibration", "verify"))
    disjoint = graph.disjoint(calibration, text)
    calibrated = graph.calibrate(fetched, calibration, disjoint)
    if recipe.quantization.mixed is not None:
        graph = replace(graph, allocated=graph.allocate(fetched, calibrated, calibration))
    quantized = graph.quantize(fetched, calibrated, calibration, disjoint)
    packed = graph.pack(fetched, quantized, graph.outside(fetched))
    artifact = graph.assemble(fetched, packed, source.names)
    host = serves(recipe, engine, host)
    skipped = {name: host for name in recipe.verify.checks if isinstance(host, str) and engine_check(name)}
    served = None if isinstance(host, str) else partial(graph.serve, fetched, packed, artifact, text, host)
    measures = tuple(graph.measures(fetched, quantized, packed, text, served))
    return Plan(
        recipe=recipe,
        survey=surveyed,
        layers=layers,
        steps=walk(artifact, *(step for _, step in measures)),
        artifact=artifact,
        quantized=quantized,
        measures=measures,
        generated=graph.generate(fetched, packed, source.names),
        source=source,
        texts=texts,
        building=builds(recipe, surveyed, layers.schemes, _speed(recipe, threads, device), finder),
        serving=served_as(),
        notes=(
            *engine[1],
            *ungated(recipe),
            *unmeasured(recipe, surveyed),
            *(f"planned from the lock: {lacks}" for lacks in dict.fromkeys(one.lacks for one in (source, *texts.values())) if lacks),
            *(f"verify.{name} is skipped here: {why}" for name, why in skipped.items()),
        ),
        skipped=skipped,
    )


def _builder(recipe: Recipe, device: str) -> gpus.GPU | None:
    """The GPU that builds: this machine's; where `device=cuda` asks for one and there is none, the target's. None: the processors do."""
    if device == "cpu":
        return None
    return gpus.here() or (target_gpu(recipe) if device == "cuda" else None)


def _speed(recipe: Recipe, threads: int, device: str) -> effort.Speed:
    gpu = _builder(recipe, device)
    return effort.cpu_speed(threads) if gpu is None else effort.cuda_speed(gpu)


def builds(recipe: Recipe, surveyed: Survey, schemes: Schemes, speed: effort.Speed, finder: Finder) -> effort.Building:
    """What a clean build of the recipe takes on a machine of that speed."""
    quantization = recipe.quantization
    own = (override.method for override in quantization.overrides.values())
    rounders = [chosen.module for chosen in (quantization.method[-1], *own) if chosen is not None]
    asked = {
        "samples": recipe.calibration.samples,
        "seqlen": recipe.calibration.seqlen,
        "verify_windows": recipe.verify.samples,
        "verify_seqlen": recipe.verify.seqlen,
        "verify_streams": 2 + len(scored_policies(recipe)),
        "gptq": any(module.SEES_TOKENS for module in rounders),
        "floats": any(module.SEES_FLOATS for module in rounders),
        "sampled": tuple(
            (asked.samples, asked.seqlen)
            for asked, dataset in ((recipe.calibration, recipe.calibration.dataset), (recipe.verify, recipe.verify.text))
            if dataset.module.READS == "model"
        ),
        "apart": packed_apart(surveyed.architecture),
    }
    building = finder.building(surveyed, schemes, speed, **asked)
    if not quantization.backend.module.TOOL:
        return building
    ours = ("calibrate", "quantize")  # a tool's own seconds are not known
    return replace(building, seconds={kind: seconds for kind, seconds in building.seconds.items() if kind not in ours})
