"""Facts of really built artifacts, and the same facts made extreme: what the report's tests render."""

from __future__ import annotations

import dataclasses
import random
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs

from buildsys import verdict
from buildsys.architecture import SITES
from buildsys.measurement import Measurement, Verdict
from buildsys.quant.bootstrap import Interval
from buildsys.release.facts import Facts, gather
from buildsys.report import compare
from buildsys.report.catalogue import Entry, catalogue, entry, unbuilt
from buildsys.report.page import page
from buildsys.report.view import Generation, Outliers, View, outliers
from buildsys.store import Store

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;\x00\x1b[31m\ud800 {{ 7*7 }} </style><!--"
LONG = "internlm2_5-" + "very" * 50 + "-chat"
LAYERS = 80


def facts_of(workspace: Path, recipe: str) -> tuple[Facts, View]:
    plan, store = runs.planned(workspace, recipe), Store(workspace / "artifacts")
    facts = gather(plan, store, verdict.judge(plan, store))
    calibrated = facts.of_kind("calibrate")[0].output
    return facts, View(outliers=outliers({name: store.path(calibrated, name) for name in calibrated.files}))


@pytest.fixture(scope="session")
def shown(demo: tuple[Path, runs.Ran]) -> tuple[Facts, View]:
    """The demo as it was built, with a target GPU and limits."""
    workspace, ran = demo
    ran.fine()
    facts, view = facts_of(workspace, "demo")
    answers = (
        Generation("What is a whale?", "It is the largest animal of all.", "It is the largest fish, they said."),
        Generation("Count to three.", "one, two, three", "one, two, three"),
    )
    return facts, dataclasses.replace(view, generations=answers, catalogue="index.html", signature="Signed with a key of its publisher's.")


@pytest.fixture(scope="session")
def plain(tiny: Path) -> tuple[Facts, View]:
    """A recipe without a target, prompts or a limit that could fail."""
    return facts_of(tiny, "tiny")


@pytest.fixture(scope="session")
def cached(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Facts, View]:
    """With the kv check: every policy was scored, int8 is the recipe's own, and a target is named."""
    workspace = runs.copy(tiny, tmp_path_factory.mktemp("cached") / "workspace")
    recipe = workspace / "recipes" / "tiny.yaml"
    runs.edit(recipe, "  kl: {max_nats: 9.0}", "  kl: {max_nats: 9.0}\n  kv: {max_increase_nats: 1.0}\ntarget: {gpu: t4}")
    runs.edit(recipe, "policy: none", "policy: int8")
    runs.doit(workspace, "build", "recipe=tiny").fine()
    return facts_of(workspace, "tiny")


@pytest.fixture(scope="session")
def large(shown: tuple[Facts, View]) -> tuple[Facts, View]:
    """80 layers, 200 prompts, long and hostile names, numbers that are none, and all three verdicts."""
    facts, _ = shown
    drawn, plan = random.Random(0), facts.plan
    architecture = dataclasses.replace(plan.survey.architecture, layers=LAYERS)
    recipe = plan.recipe.model_copy()
    recipe._name = LONG
    survey = dataclasses.replace(plan.survey, architecture=architecture)
    changed = dataclasses.replace(plan, recipe=recipe, survey=survey, notes=(HOSTILE, LONG))
    names = [architecture.prefix(layer) + linear.name for layer in range(LAYERS) for linear in architecture.linears]
    nan = float("nan")
    measurements = {
        **facts.measurements,
        "kl": (Measurement("kl", nan, "nats", nan, nan, HOSTILE),),
        "perplexity": (*facts.measurements["perplexity"], Measurement("wild", 1.2e300, LONG, -1e-300, 1.5e300, LONG)),
    }
    verdicts = (
        Verdict("kl", "failed", f"kl nan nats, limit: at most 0.12; {HOSTILE}", "recipes/x.yaml:3"),
        Verdict("serve", "skipped", "no CUDA device", "recipes/x.yaml:4"),
        Verdict("memory", "passed", "free_gib 2.7 GiB", "recipes/x.yaml:5"),
    )
    answers = tuple(Generation(f"{HOSTILE} {at}", f"{LONG} {at} " + "word " * 80, f"{LONG} {at} שלום {HOSTILE}") for at in range(200))
    peaks = tuple(Outliers(layer, site, drawn.uniform(5, 4000), drawn.uniform(1, 50)) for layer in range(LAYERS) for site in SITES)
    return (
        dataclasses.replace(
            facts,
            plan=changed,
            measurements=measurements,
            verdicts=verdicts,
            layer_errors={name: drawn.lognormvariate(-6, 1) for name in names if "79.mlp" not in name} | {names[3]: nan},
        ),
        View(answers, outliers=(*peaks, Outliers(LAYERS, "attn_in", nan, nan)), signature=HOSTILE),
    )


@pytest.fixture(scope="session")
def bare(plain: tuple[Facts, View]) -> tuple[Facts, View]:
    """Nothing was measured, nothing was judged, nothing is known of the layers or of the steps' runs."""
    facts, _ = plain
    steps = tuple(dataclasses.replace(ran, output=dataclasses.replace(ran.output, meta={})) for ran in facts.steps)
    return dataclasses.replace(facts, steps=steps, measurements={}, verdicts=(), layer_errors={}), View()


def entries(count: int) -> list[Entry]:
    """Recipes of several sizes and qualities."""
    drawn = random.Random(count)
    found = []
    for at in range(count):
        bits, weights = drawn.choice((3, 4, 8)), drawn.choice((1.8e9, 7e9, 70e9))
        value = drawn.uniform(0.5, 2) * {3: 0.15, 4: 0.03, 8: 0.002}[bits]
        kl = Measurement("kl", value, "nats", value * drawn.uniform(0, 1), value * drawn.uniform(1, 1.4))
        state = drawn.choice(("passed", "passed", "failed", "skipped", "open"))
        name = f"internlm2_5-{weights / 1e9:g}b-chat-w{bits}a16-{at}"
        scheme = f"{bits}-bit g128 asymmetric, awq + gptq"
        size = int(weights * bits / 8)
        found.append(Entry(name, "internlm/internlm2_5 (hf_hub)", scheme, "a100-40gb", state, size, kl, "at most 0.05", f"{at}.html"))
    return found


def sides(*builds: Facts) -> Iterator[compare.Side]:
    """Builds to hold against the first of them."""
    drawn = random.Random(1)
    for at, facts in enumerate(builds):
        low, high = sorted((drawn.uniform(-0.01, 0.005), drawn.uniform(-0.005, 0.01)))
        paired = compare.Difference(Interval((low + high) / 2, low, high)) if at % 3 != 1 else compare.Difference(None, f"not {HOSTILE}")
        yield compare.Side(string.ascii_uppercase[at], facts, Path(), f"{at}.html", paired if at else None)


@pytest.fixture(scope="session")
def pages(
    shown: tuple[Facts, View], plain: tuple[Facts, View], cached: tuple[Facts, View], large: tuple[Facts, View], bare: tuple[Facts, View]
) -> dict[str, str]:
    """Every kind of page."""
    nan = float("nan")
    odd = [
        Entry(HOSTILE, HOSTILE, LONG, LONG, "failed", 7, Measurement("kl", nan, "nats", nan, nan)),
        Entry(LONG, LONG, HOSTILE, HOSTILE, "passed", 9 * 10**9),
    ]
    compared = compare.page(list(sides(shown[0], plain[0])))
    hostile = compare.page(list(sides(bare[0], large[0], *[plain[0]] * 6)))
    return {
        "compare": compared,
        "compare odd": hostile,
        "demo": page(*shown),
        "plain": page(*plain),
        "cached": page(*cached),
        "large": page(*large),
        "bare": page(*bare),
        "catalogue 0": catalogue([]),
        "catalogue 1": catalogue([entry(shown[0], "demo.html")]),
        "catalogue 3": catalogue([*entries(3), unbuilt(plain[0].plan.recipe)]),
        "catalogue 200": catalogue([*entries(200), *odd]),
    }
