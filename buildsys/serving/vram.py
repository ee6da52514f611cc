"""GPU memory in use while something runs, as nvidia-smi has it: the most of what was seen, looked at twice a second."""

from __future__ import annotations

import threading
from types import TracebackType

from buildsys.errors import BuildError
from buildsys.serving.host import memory_each

LOOK_EVERY_S = 0.5


class Peak:
    """`with Peak() as peak: …`; then `peak.each` for each visible GPU, or their sum. All processes there count."""

    def __init__(self) -> None:
        self.each: tuple[int, ...] = ()
        self._error: BuildError | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def used_bytes(self) -> int:
        """Of all GPUs; the sum of what each had at most."""
        return sum(self.each)

    def __enter__(self) -> Peak:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        if error is None:
            if self._error is not None:
                raise self._error
            self._look()

    def _watch(self) -> None:
        while not self._done.wait(LOOK_EVERY_S):
            try:
                self._look()
            except BuildError as error:
                self._error = error
                return

    def _look(self) -> None:
        now = memory_each()
        self.each = tuple(map(max, self.each, now)) if self.each else now
