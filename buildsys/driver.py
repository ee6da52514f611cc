"""One run of the build system: which steps the store has, building those that it has not, judging the result. Knows nothing of doit.

Steps may run in several threads at once; whoever schedules them (tasks.py with doit, cli.py in a loop) sees to the order.
"""

from __future__ import annotations

import atexit
import gc
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, get_args

from buildsys import console as show
from buildsys import locking
from buildsys.console import Console
from buildsys.errors import BuildError, BuildErrors
from buildsys.history import History, Ingredients
from buildsys.measurement import Verdict
from buildsys.publishers import Release
from buildsys.slots import modules
from buildsys.step import Step, digest, walk
from buildsys.store import Artifact, Store
from buildsys.worker import STEPS, Device, Job, perform
from buildsys.workers import Worker, Workers

if TYPE_CHECKING:
    from buildsys.finder import Finder
    from buildsys.locked import Locked
    from buildsys.plan import Plan
    from buildsys.recipe import Recipe
    from buildsys.release.facts import Facts
    from buildsys.release.signing import Signer
    from buildsys.serving.host import Host
    from buildsys.workspace import Workspace

OBJECTS = 2_000_000
"""New objects between two searches for cycles. What planning makes lives as long as the command, so that searching finds nothing: with
Python's 700 it took a quarter of the time over 1,000 recipes."""

DEVICES: tuple[Device, ...] = get_args(Device)
BATCH = 1  # finished windows that may wait for the one before them; more helps nothing on a CPU

MENDS: Mapping[str, str] = MappingProxyType(
    {
        "kv": "choose a wider kv_cache.policy",
        "memory": "quantize more, or choose a smaller kv_cache.policy or target.session_len",
        "serve": "choose another format, kv_cache or target (`doit report` shows what each server did)",
    }
)
"""What to change where a check fails that quantizing less would not help."""


@dataclass(frozen=True)
class Settings:
    """How to run, as said on the command line; none of it changes a result."""

    threads: int
    batch: int = BATCH
    device: Device = "auto"
    key: str | None = None  # a file with the private key that signs releases
    locked: str | None = None  # "required": nothing is built that is other than its lock says

    @classmethod
    def read(cls, said: Mapping[str, str]) -> Settings:
        asked = said.get("device", "auto")
        device = next((known for known in DEVICES if known == asked), None)
        if device is None:
            raise BuildError(f"device={asked}", "is no kind of device", f"say one of {', '.join(DEVICES)}")
        locked = said.get("locked") or os.environ.get("BUILDSYS_LOCKED") or None
        if locked not in (None, "required"):
            raise BuildError(
                f"locked={locked}", "is nothing that a lock can be", "say locked=required, or leave it (and BUILDSYS_LOCKED) out"
            )
        return cls(_count("threads", said, _processors()), _count("batch", said, BATCH), device, said.get("key"), locked)


def _processors() -> int:
    """Those that this process may use; where the system cannot tell (macOS), all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count(name: str, said: Mapping[str, str], default: int) -> int:
    text = said.get(name, str(default))
    if len(text) > 4 or not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise BuildError(f"{name}={text}", "is no number from 1 to 1024", f"write {name}={default}, or leave it out")
    return int(text)


@dataclass(frozen=True)
class Outcome:
    """What came of one step in this run."""

    built: bool  # False: the store had it
    seconds: float
    size: int
    log: Path | None = None

    def line(self, step: Step) -> str:
        text = f"{'built' if self.built else 'cached':<7} {step.kind:<9} {step.title:<42}"
        text += f" {show.seconds(self.seconds) if self.built else '':>12} {show.size(self.size):>8}"
        return (f"{text}  {self.log}" if self.log else text).rstrip()


class Session:
    """The plans of the recipes asked for, and what is known and built of their steps so far."""

    def __init__(
        self,
        workspace: Workspace,
        store: Store,
        settings: Settings,
        console: Console,
        steps: str = STEPS,
        begun: Worker | None = None,
    ) -> None:
        """`begun`: a child process that is there already."""
        gc.set_threshold(OBJECTS, *gc.get_threshold()[1:])
        atexit.register(gc.freeze)  # Python's last search for cycles would find nothing either: half a second over 1,000 recipes
        self.workspace, self.store, self.settings, self.console = workspace, store, settings, console
        self.locks = locking.Locks(workspace.root)
        self.plans: dict[str, Plan] = {}
        self.outcomes: dict[str, Outcome] = {}  # by planned key
        self.verdicts: dict[str, tuple[Verdict, ...]] = {}  # by recipe
        self.goodbye = "interrupted: what is finished is kept, and the same command goes on from there"  # what Ctrl-C is answered with
        self.releases: dict[str, Release] = {}  # by recipe
        self.unpublished: set[str] = set()  # recipes whose publishing began and has not ended
        self._artifacts: dict[str, Artifact] = {}  # by planned key
        self._histories: dict[str, History] = {}
        self._steps = steps
        self._sets: dict[str, frozenset[Step]] = {}
        self._began = time.monotonic()
        self._lock = threading.RLock()
        self._held = ExitStack()
        self._workers = Workers(store.home, steps, begun)

    def open(self, names: Iterable[str]) -> None:
        """Plans recipes that will be built; gc is held off until `end`."""
        self._held.enter_context(self.store.in_use())
        _ = self._signer  # a key that cannot sign is refused now, and not when all is built
        self.plan(names)

    def plan(self, names: Iterable[str]) -> None:
        """Plans every recipe before any step runs, so that a mistake in the last one costs seconds."""
        errors = [error for refused in self.attempt(names).values() for error in refused]
        if errors:
            raise errors[0] if len(errors) == 1 else BuildErrors(errors)

    def attempt(self, names: Iterable[str]) -> dict[str, tuple[BuildError, ...]]:
        """Plans what can be planned; why the others cannot be, by name."""
        refused: dict[str, tuple[BuildError, ...]] = {}
        for name in (name for name in names if name not in self.plans):
            try:
                made = self._as_locked(self.workspace.load(name))
            except BuildErrors as several:
                refused[name] = several.errors
            except BuildError as error:
                refused[name] = (error,)
            else:
                self.plans[name] = made
        return refused

    def _as_locked(self, recipe: Recipe) -> Plan:
        """The recipe's plan, from its lock where there is one; where it is other than locked, it says so or is refused."""
        locked = self.locks.of(recipe)
        plan = self.planned(recipe, locked)
        must = locking.required(recipe, self.settings.locked)
        if locked is None and not must:
            return plan
        return replace(plan, notes=(*plan.notes, *locking.held(plan, self.locks, locked, must)))

    def planned(self, recipe: Recipe, locked: Locked | None) -> Plan:
        """The recipe's plan; what floats is what `locked` says."""
        from buildsys.deployment import needs_engine
        from buildsys.plan import NOBODY_LOOKED, plan

        host = self._host if needs_engine(recipe) else NOBODY_LOOKED
        return plan(recipe, self.store, self.settings.threads, host, self.settings.device, self.finder, locked)

    def steps(self, name: str) -> tuple[Step, ...]:
        """What a build of the recipe runs, needs first: everything but publishing."""
        plan = self.plans[name]
        return walk(plan.artifact, *(step for _, step in plan.measures))

    def look(self) -> None:
        """Finds what is there, and warms up a child process, and a GPU, where one will be needed."""
        heavy: list[Step] = []
        for name in self.plans:
            steps = self.steps(name)
            found = self.store.walk(steps)
            for step in steps:
                artifact = found[step.planned_key].artifact
                if artifact is not None:
                    self._artifacts[step.planned_key] = artifact
                    continue
                if "backend" in step.knobs:  # another tool: that it is not here is told now, and not when all before it is built
                    modules("backends")[step.knobs["backend"]["name"]].ready(step.hints["where"])
                if step.heavy:
                    heavy.append(step)
                    self._workers.warm()
        first = next((step for step in heavy if step.computes), None)
        if first is not None and not first.engine and self.settings.device != "cpu":  # an engine has the GPU for itself
            self._workers.warm(gpu=True)

    def key(self, step: Step) -> str:
        """The real key, once what the step needs is built."""
        return self.store.key(step, self._artifacts)

    def ready(self, step: Step) -> bool:
        """Whether the store has the step's output; asked when its needs are built."""
        artifact = self._artifacts.get(step.planned_key) or self.store.find(self.key(step))
        if artifact is None:
            return False
        self._done(step, artifact, Outcome(False, 0.0, artifact.size))
        return True

    def build(self, step: Step, again: bool = False) -> None:
        """Runs the step; `again` also where the store has it."""
        key, began = self.key(step), time.monotonic()
        ingredients = Ingredients.of(step, key, self._artifacts)
        job = self._job(step, key, again, ingredients)
        log = self.store.log(step.kind, key) if step.heavy else None

        def progress(phase: str, done: int, total: int) -> None:
            self.console.progress(step.planned_key, job.name, phase, done, total)

        def waiting(holder: str) -> None:
            self.console.line(f"waits   {job.name}: {holder} has it")

        try:
            built = self._workers.run(job, log, progress, waiting) if log else perform(job, progress, waiting, self._functions)
        finally:
            self.console.finished(step.planned_key)
        artifact = self.store.find(key)
        if artifact is None:
            raise BuildError(job.name, "its output was damaged or dropped as soon as it was built", "run the same command again")
        self._done(step, artifact, Outcome(built, time.monotonic() - began, artifact.size, log), write=True)

    def judge(self, name: str) -> list[str]:
        """Holds the recipe's measurements to its limits. artifacts/<recipe> moves where they hold, and never leads to what failed."""
        from buildsys.release.facts import gather
        from buildsys.verdict import judge

        plan = self.plans[name]
        verdicts = self.verdicts[name] = judge(plan, self.store)
        artifact = self._artifacts[plan.artifact.planned_key]
        self._note_limits(name)
        failed = [verdict for verdict in verdicts if verdict.state == "failed"]
        if failed:
            raise self._failed(plan, artifact, failed)
        facts = gather(plan, self.store, verdicts)
        release = self.releases[name] = self.seal(facts)
        self.store.link(name, release.tree)
        several = f"{name}: " if len(self.plans) > 1 else ""
        lines = [f"{several}{verdict.state:<7} {verdict.check:<9} {verdict.text}" for verdict in verdicts]
        return [*lines, f"{several}{self._signed()}"]

    def seal(self, facts: Facts) -> Release:
        """What is published of a build, in the store, signed where there is a key."""
        from buildsys.release import seal

        sealed = seal.seal(facts, self.store, self._signer)
        step = release_step(facts.plan)
        with self._lock:
            self._history(facts.name).note(step, Ingredients.of(step, sealed.key, {}))
            self._history(facts.name).write(self._remembered(facts.name))
        return seal.release(facts.name, sealed, seal.tree(facts, self.store, sealed))

    def _signed(self) -> str:
        if self._signer is None:
            return "unsigned  no key: say key=FILE, or set BUILDSYS_SIGNING_KEY, to sign"
        from buildsys.release.signing import hint

        return f"signed    with the key {hint(self._signer.public)[:16]}"

    def facts(self, name: str) -> Facts:
        """What is known of the recipe's build, judged anew; a gate that fails is a fact. Raises BuildError where nothing is built."""
        from buildsys.release.facts import gather
        from buildsys.verdict import judge

        plan, steps = self.plans[name], self.steps(name)
        found = self.store.walk(steps)
        missing = [step for step in steps if found[step.planned_key].artifact is None]
        if missing:
            what = f"{name} is not built as its recipe says now: {len(missing)} of {len(steps)} steps are missing"
            raise BuildError(plan.recipe.at(), what, f"run `doit build recipe={name}`")
        self._artifacts |= {planned: one.artifact for planned, one in found.items() if one.artifact is not None}
        return gather(plan, self.store, judge(plan, self.store))

    def answers(self, name: str) -> Artifact | None:
        """Both models' answers to the recipe's prompts, computed where the store has none; None: the recipe has no prompts."""
        step = self.plans[name].generated
        if step is None:
            return None
        if not self.ready(step):
            self.build(step)
        return self._artifacts[step.planned_key]

    def summary(self, name: str) -> str:
        """One line on the whole recipe."""
        steps = self.steps(name)
        outcomes = [self.outcomes[step.planned_key] for step in steps if step.planned_key in self.outcomes]
        built = sum(outcome.built for outcome in outcomes)
        took = show.seconds(time.monotonic() - self._began)
        if name not in self.releases or any(verdict.state == "failed" for verdict in self.verdicts[name]):
            return f"{name}: not complete; {len(outcomes)} of {len(steps)} steps are done and kept"
        made = f"built {built} of {len(steps)} steps in {took}" if built else f"{len(steps)} steps, all cached"
        skipped = sum(verdict.state != "passed" for verdict in self.verdicts[name])
        more = (f", {skipped} checks skipped" if skipped else "") + (", not published" if name in self.unpublished else "")
        return f"{name}: {made}{more} -> {self.store.root / name}"

    def beside(self, store: Store) -> Session:
        """The same workspace, settings and console over another store; it ends with this one."""
        session = Session(self.workspace, store, self.settings, self.console, self._steps)
        self.at_end(session.end)
        return session

    def at_end(self, ending: Callable[[], None]) -> None:
        """`ending` is called when this session ends, however that comes; what was given last comes first."""
        self._held.callback(ending)

    def end(self) -> None:
        """No child survives this, and gc may work again."""
        self._workers.end()
        self._held.close()
        self.console.close()

    @cached_property
    def finder(self) -> Finder:
        """What the recipes of this run share: looked at once, and never again before it ends."""
        from buildsys.finder import Finder

        return Finder(self.store)

    @cached_property
    def _host(self) -> Host | str:
        """What can run an engine here, or why nothing can."""
        from buildsys.serving.host import look

        if self.settings.device == "cpu":
            return "device=cpu was said"
        try:
            return look()
        except BuildError as error:
            return f"{error.where}: {error.what}"

    @cached_property
    def _signer(self) -> Signer | None:
        from buildsys.release.signing import signer

        return signer({"key": self.settings.key} if self.settings.key else {})

    @cached_property
    def _functions(self) -> ModuleType:
        return import_module(self._steps)

    def _job(self, step: Step, key: str, again: bool, made_of: Ingredients) -> Job:
        inputs = {
            need.role: {name: str(self.store.path(self._artifacts[need.step.planned_key], name)) for name in made_of.inputs[need.role]}
            for need in step.needs
        }
        settings = self.settings
        return Job(
            kind=step.kind,
            title=step.title,
            key=key,
            knobs=step.knobs,
            hints=step.hints,
            inputs=inputs,
            root=str(self.store.root),
            heavy=step.heavy,
            computes=step.computes,
            engine=step.engine,
            threads=settings.threads,
            batch=settings.batch,
            device=settings.device,
            again=again,
            resumes=step.resumes,
            meta={"version": step.version, "knobs": step.knobs, "inputs": made_of.inputs, **_whence(step)},
        )

    def _done(self, step: Step, artifact: Artifact, outcome: Outcome, write: bool = False) -> None:
        with self._lock:
            self._artifacts[step.planned_key] = artifact
            self.outcomes.setdefault(step.planned_key, outcome)
            if outcome.built:
                self.outcomes[step.planned_key] = outcome
            ingredients = Ingredients.of(step, artifact.key, self._artifacts)
            for name in self.plans:
                if step in self._members(name):
                    self._history(name).note(step, ingredients)
                    if write:
                        self._history(name).write(self._remembered(name))

    def _members(self, name: str) -> frozenset[Step]:
        if name not in self._sets:
            self._sets[name] = frozenset(self._remembered(name))
        return self._sets[name]

    def _remembered(self, name: str) -> list[Step]:
        """What a recipe's history holds: its steps, the answers that its report shows, judging and sealing."""
        plan = self.plans[name]
        asked = [plan.generated] if plan.generated is not None else []
        return [*self.steps(name), *asked, limits(plan), release_step(plan)]

    def _history(self, name: str) -> History:
        if name not in self._histories:
            self._histories[name] = History(self.store.home, name)
        return self._histories[name]

    def _note_limits(self, name: str) -> None:
        step = limits(self.plans[name])
        with self._lock:
            self._history(name).note(step, Ingredients.of(step, digest(step.knobs), {}))
            self._history(name).write(self._remembered(name))

    def _failed(self, plan: Plan, artifact: Artifact, failed: list[Verdict]) -> BuildError:
        link = self.store.root / plan.name
        left = f"there is no {link}"
        if self.store.linked(plan.name) == artifact.digest():
            self.store.unlink(plan.name)
            left = f"{link}, which led to this artifact, was removed"
        elif link.is_symlink():
            left = f"{link} still leads to an earlier build"
        errors = []
        for verdict in failed:
            less = MENDS.get(verdict.check, "quantize less (more bits, smaller groups, more calibration text)")
            if verdict.check in plan.skipped:
                less = "build on a machine with the target's GPU and LMDeploy"
            fix = f"{less}, or set a limit that you can live with; the measurements are kept, and {left}"
            errors.append(BuildError(verdict.where, f"{plan.name} fails check {verdict.check}: {verdict.text}", fix))
        return errors[0] if len(errors) == 1 else BuildErrors(errors)


def _whence(step: Step) -> dict[str, Any]:
    """Where a fetch had its files from, as it was when it ran: what names them may have moved on since."""
    told = {name: step.hints[name] for name in ("module", "pin") if name in step.hints}
    if "how" in step.hints:
        told["how"] = {name: value for name, value in step.hints["how"].items() if name != "files"}
    return {"hints": told} if told else {}


def release_step(plan: Plan) -> Step:
    """Sealing as a step, for gc alone: what it made is kept."""
    return Step("release", "card, provenance, digests", 1, {})


def limits(plan: Plan) -> Step:
    """Judging as a step, for `why` alone: it is never cached."""
    knobs = {name: knobs.model_dump(mode="json") for name, knobs in plan.recipe.verify.checks.items()}
    return Step("judge", "limits against measurements", 1, knobs)
