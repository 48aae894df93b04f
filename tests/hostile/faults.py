"""Faults of the machine that one process can try on itself: limits of files, and folders that cannot be written."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
from collections.abc import Callable

from filelock import FileLock

from tests.hostile.trials import QUICK, REFUSED, RIGHT, SETTINGS, Place, Trial, leave, same_labels

FIRST = ("propagate", "{data}", "--output", "{out}", *QUICK)
AGAIN = ("run", "{data}", "--output", "{run}", *SETTINGS)
PREDICT = ("predict", "{image}", "--run", "{run}", "--output", "{out}", "--device", "cpu")


@contextlib.contextmanager
def limit(what: int, most: int):
    kept, ignored = resource.getrlimit(what), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(what, (most, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, kept)
        signal.signal(signal.SIGXFSZ, ignored)


def file_size(lowest: int, highest: int) -> Callable:
    return lambda place: limit(resource.RLIMIT_FSIZE, place.rng.randrange(lowest, highest))


def open_files(place: Place):
    return limit(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) + place.rng.randrange(0, 4))


def locked(place: Place):
    return FileLock(place.run / ".lock")


def step_back(place: Place) -> None:
    """The last round is not finished yet."""
    shutil.rmtree(place.run / "round_2")


def of(name: str, spoil, command, fault, *ends: str, check=None) -> Trial:
    return Trial("faults", name, spoil, command, ends, check, fault)


TRIALS = [
    *(of(f"file_size_{n}", leave, FIRST, file_size(1, 20_000), REFUSED, RIGHT) for n in range(4)),
    *(of(f"file_size_again_{n}", step_back, AGAIN, file_size(100, 6_000_000), REFUSED, RIGHT) for n in range(3)),
    of("file_size_predict", leave, PREDICT, file_size(1, 300), REFUSED),
    of("file_size_demo", leave, ("demo-data", "{out}", "--cases", "3"), file_size(1, 3000), REFUSED),
    of("file_size_suggest", leave, ("suggest-template", "{data}", "--output", "{out}"), file_size(1, 3000), REFUSED),
    of("file_size_convert", leave, ("convert-weights", "{run}/round_2/model.pt", "{out}.safetensors"),
       file_size(1, 300), REFUSED),
    of("file_size_evaluate", leave, ("evaluate", "{run}", "{data}"), file_size(1, 100), REFUSED),
    *(of(f"open_files_{n}", leave, FIRST, open_files, REFUSED, RIGHT) for n in range(3)),
    of("open_files_validate", leave, ("validate", "{data}"), open_files, REFUSED, RIGHT),
    of("open_files_predict", leave, PREDICT, open_files, REFUSED, RIGHT),
    of("locked", leave, AGAIN, locked, REFUSED),
    of("nothing", leave, AGAIN, None, RIGHT, check=same_labels),
]  # fmt: skip
