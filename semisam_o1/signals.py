"""Ctrl-C and SIGTERM end a command, and neither gets lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

SOON = 0.05  # seconds


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM raises a `KeyboardInterrupt`, as Ctrl-C does; its argument is the number of the signal.

    Python drops an exception that is raised inside a callback of a weak reference or a ``__del__``, which may be what
    runs when a signal arrives. The signal is then sent again. Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    again: list[threading.Timer] = []
    report = sys.unraisablehook

    def dropped(what: Any) -> None:
        if not isinstance(what.exc_value, KeyboardInterrupt):
            report(what)
            return
        again.append(threading.Timer(SOON, os.kill, (os.getpid(), number_of(what.exc_value))))
        again[-1].start()

    handler = signal.signal(signal.SIGTERM, _raise)
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        for timer in again:
            timer.cancel()
        sys.unraisablehook = report
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)  # None: it was not set by Python


def number_of(stop: KeyboardInterrupt) -> int:
    """The signal that raised it."""
    return stop.args[0] if stop.args else signal.SIGINT


def _raise(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(number)
