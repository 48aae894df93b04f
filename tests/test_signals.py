"""A signal ends a command, whatever Python is doing when it arrives."""

import signal
import threading
import time
import weakref

import pytest

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
