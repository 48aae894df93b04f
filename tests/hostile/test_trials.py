"""Every trial of every family ends in one of the ways that it may end in; see `trials`."""

import pytest

from tests.hostile.families import TRIALS
from tests.hostile.trials import Stock, Trial, attempt, make_stock

EVERY = 3  # of so many trials one runs here, all with `make fuzz`
SLOW = 12  # of so many of these, all but one are left out with the slow tests
CHOSEN = [pytest.param(t, id=t.id, marks=[pytest.mark.slow] if n % SLOW else []) for n, t in enumerate(TRIALS[::EVERY])]


@pytest.fixture(scope="session")
def stock(made_once) -> Stock:
    return make_stock(made_once("hostile", make_stock))


@pytest.mark.parametrize("trial", CHOSEN)
def test_trial(trial: Trial, stock, tmp_path):
    end = attempt(trial, stock, tmp_path / "place")
    assert not end.wrong, str(end)


def test_there_are_enough_and_each_has_its_own_name():
    assert len(CHOSEN) >= 300
    assert len({trial.id for trial in TRIALS}) == len(TRIALS)
