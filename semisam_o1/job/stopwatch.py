"""Run time and peak memory of a stage."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import psutil

INTERVAL_S = 0.1  # between two samples of the memory; shorter peaks may be missed


class Stopwatch:
    """Context manager: calls ``done(name, seconds, peak_mib)`` when the block ends without an error.

    The peak is the largest resident memory of the whole process during the block, MiB.
    """

    def __init__(self, name: str, done: Callable[[str, float, float], None]):
        self.name, self.done, self.peak = name, done, 0
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        process = psutil.Process()
        while True:
            self.peak = max(self.peak, process.memory_info().rss)
            if self._over.wait(INTERVAL_S):
                return

    def __enter__(self) -> Stopwatch:
        self._began = time.perf_counter()
        self._watch.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._over.set()
        self._watch.join()
        if kind is None:
            self.done(self.name, time.perf_counter() - self._began, self.peak / 2**20)
