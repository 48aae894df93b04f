"""Which scan to look at next, by hand."""

import numpy as np
import pytest

from semisam_o1.review.ranking import DEFAULT, REASONS, STRATEGIES, Known, order

# Scans 0 and 1 are alike, 2 is alone and badly labelled, 3 is near the labelled scan.
KNOWN = Known(
    distances=np.array([[0.0, 0.1, 0.9, 0.9], [0.1, 0.0, 0.9, 0.9], [0.9, 0.9, 0.0, 0.9], [0.9, 0.9, 0.9, 0.0]]),
    served=np.array([0.8, 0.7, 0.85, 0.1]),
    error=np.array([0.2, 0.2, 0.6, 0.1]),
    uncertainty=np.array([0.1, 0.3, 0.2, 0.4]),
)


@pytest.mark.parametrize(
    ("strategy", "first", "last"),
    [("most typical", 0, 3), ("worst predicted", 2, 3), ("most uncertain", 3, 0), ("expected win", 2, 3)],
)
def test_the_order_of_each_strategy(strategy, first, last):
    found = order(KNOWN, strategy)
    assert (found[0], found[-1]) == (first, last) and sorted(found) == [0, 1, 2, 3]


def test_a_scan_that_serves_itself_alone_wins_what_it_is_far():
    np.testing.assert_allclose(STRATEGIES["most typical"](KNOWN)[2], 0.85 / 4)
    np.testing.assert_allclose(STRATEGIES["most typical"](KNOWN)[0], (0.8 + 0.6) / 4)
    np.testing.assert_allclose(STRATEGIES["expected win"](KNOWN)[3], 0.1 / 4)


def test_every_strategy_has_a_reason():
    assert REASONS.keys() == STRATEGIES.keys() and DEFAULT in STRATEGIES
