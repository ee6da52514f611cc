"""What a build shows: one line for each step that ended, and how far the running ones are.

On a terminal running steps have bars with the time they still need (rich); elsewhere a plain line every few seconds.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_EVERY_S = 5.0
BAR_AFTER_S = 0.5


@dataclass
class _Running:
    """One running step. The time it needs is guessed from where its present phase began."""

    name: str
    phase: str
    phase_began_s: float
    phase_first: int
    told_s: float
    bar: TaskID | None = None


class Console:
    """Safe to use from several threads. Writes to the real stdout: doit swaps sys.stdout around a task's actions."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._lock = threading.RLock()
        self._running: dict[str, _Running] = {}
        self._bars: Progress | None = None
        self.redirect(out if out is not None else sys.__stdout__ or sys.stdout)

    def redirect(self, out: TextIO) -> None:
        """Lines go to `out` from now on."""
        self._out = out
        self._terminal = out.isatty() and os.environ.get("TERM") != "dumb"

    def line(self, text: str) -> None:
        self._print(text, self._out)

    def error(self, text: str) -> None:
        self._print(text, sys.__stderr__ or sys.stderr)

    def progress(self, key: str, name: str, phase: str, done: int, total: int) -> None:
        """The running step `key` has done `done` of `total` units of `phase` (total 0: unknown)."""
        now = time.monotonic()
        with self._lock:
            running = self._running.get(key)
            if running is None or running.phase != phase:
                told_s = running.told_s if running is not None else now
                self._unbar(running)
                running = self._running[key] = _Running(name, phase, now, done, told_s)
            if self._terminal:
                self._bar(running, done, total)
            elif now - running.told_s >= PLAIN_EVERY_S:
                running.told_s = now
                self.line(f"  ...   {name}: {_so_far(running, done, total, now)}")

    def finished(self, key: str) -> None:
        """The step `key` runs no longer."""
        with self._lock:
            self._unbar(self._running.pop(key, None))
            if not self._running:
                self.close()

    def close(self) -> None:
        """Takes the bars off the terminal."""
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
                self._bars = None
            for running in self._running.values():
                running.bar = None

    def _print(self, text: str, out: TextIO) -> None:
        with self._lock:
            if self._bars is not None:
                self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
                return
            try:
                print(text, file=out, flush=True)
            except BrokenPipeError:  # `doit build … | head`: that nobody reads on is no reason to end a build
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), out.fileno())

    def _unbar(self, running: _Running | None) -> None:
        if running is not None and running.bar is not None and self._bars is not None:
            self._bars.remove_task(running.bar)

    def _bar(self, running: _Running, done: int, total: int) -> None:
        if self._bars is None:
            if time.monotonic() - running.told_s < BAR_AFTER_S:
                return  # importing rich takes longer than many a step
            self._bars = _bars(self._out)
            self._bars.start()
        described = f"{running.name}: {running.phase}"
        if running.bar is None:
            running.bar = self._bars.add_task(described, total=total or None, completed=done)
        self._bars.update(running.bar, description=described, total=total or None, completed=done)


def _bars(out: TextIO) -> Progress:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("  {task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    rich = RichConsole(file=out, force_terminal=True)
    left = TimeRemainingColumn(elapsed_when_finished=True)
    return Progress(*columns, TextColumn("left"), left, console=rich, transient=True, redirect_stdout=False, redirect_stderr=False)


def _so_far(running: _Running, done: int, total: int, now_s: float) -> str:
    spent_s = now_s - running.phase_began_s
    if not total:
        return f"{running.phase}, {seconds(spent_s)}"
    text = f"{running.phase} {done}/{total}, {seconds(spent_s)}"
    if done > running.phase_first:
        text += f", about {seconds(spent_s / (done - running.phase_first) * (total - done))} left"
    return text


def seconds(amount_s: float) -> str:
    if amount_s < 60:
        return f"{amount_s:.1f} s"
    if amount_s < 3600:
        return f"{int(amount_s) // 60} min {int(amount_s) % 60:02d} s"
    return f"{int(amount_s) // 3600} h {int(amount_s) // 60 % 60:02d} min"


def size(amount_bytes: int) -> str:
    amount = float(amount_bytes)
    for unit in ("B", "kB", "MB"):
        if amount < 999.5:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 99.5 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"
