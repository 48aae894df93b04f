"""A signal ends a command, whatever Python is doing when it arrives."""

import pydoc
import signal
import sys
import threading
import time
import weakref

import pytest

from semisam_o1 import cli
from semisam_o1.signals import number_of, stoppable


class Thing:
    """Can be referred to weakly."""


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT])
def number(request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts with "&"
    yield request.param
    signal.signal(signal.SIGINT, before)


def test_a_signal_raises(number):
    with pytest.raises(KeyboardInterrupt) as stop, stoppable():
        signal.raise_signal(number)
    assert number_of(stop.value) == number


def test_a_signal_that_python_drops_comes_again(number):
    """It arrives in the callback of a weak reference, from which no exception gets out."""
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt) as stop, stoppable():
        del thing
        assert reference() is None
        time.sleep(5)
    assert number_of(stop.value) == number


def test_nothing_comes_after_the_end(number):
    before = signal.getsignal(signal.SIGTERM)
    with stoppable():
        thing = Thing()
        reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
        del thing
    assert reference() is None and signal.getsignal(signal.SIGTERM) == before
    time.sleep(0.2)


def test_another_thread_has_no_handlers():
    failed = []

    def enter():
        try:
            with stoppable():
                pass
        except BaseException as error:  # noqa: BLE001 - reported below
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not failed


def test_a_signal_during_an_import_stops_the_command(monkeypatch, capsys, tmp_path):
    """pydoc, by which MONAI finds components, makes an error of its own of it, and MONAI wraps that again."""

    def build(options):
        try:
            raise KeyboardInterrupt(signal.SIGTERM)
        except KeyboardInterrupt:
            try:
                raise pydoc.ErrorDuringImport("a module", sys.exc_info())
            except pydoc.ErrorDuringImport as error:
                raise RuntimeError("Failed to evaluate") from error

    monkeypatch.setattr(cli.commands, "validate", build)
    assert cli.main(["validate", str(tmp_path)]) == 143
    assert "stopped" in capsys.readouterr().err
