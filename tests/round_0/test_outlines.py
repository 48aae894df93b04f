"""What labelled scans tell of how people outline: a factor that helps on scans left out, or none."""

import numpy as np
import pytest
import torch

from semisam_o1.round_0.outlines import Outlined, applied, border_shift_mm, learn

SIDES = (24, 24, 24)


def ball(radius, centre=(11.5, 11.5, 11.5)):
    places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in SIDES), indexing="ij"), -1).float()
    return (places - torch.tensor(centre)).norm(dim=-1), radius


def soft(radius, width=2.0, **more):
    """Probabilities of a ball whose border is ``width`` tokens wide."""
    distance, radius = ball(radius, **more)
    inside = torch.sigmoid((radius - distance) / (width / 4))
    return torch.stack([1 - inside, inside])


def truth(radius, **more):
    distance, radius = ball(radius, **more)
    inside = (distance < radius).float()
    return torch.stack([1 - inside, inside])


def test_a_habit_of_outlining_larger_is_learned():
    scans = [Outlined(soft(6.0), truth(6.6)), Outlined(soft(7.0), truth(7.6)), Outlined(soft(5.5), truth(6.1))]
    found = learn(scans)
    assert found.gain > 0.01 and found.factors[0] > 1.3
    moved = border_shift_mm(scans[0].probabilities, found.factors[0], 1, 2.0)
    assert 0.3 < moved < 2.0  # mm, outwards
    assert border_shift_mm(scans[0].probabilities, 1 / found.factors[0], 1, 2.0) < -0.3


def test_what_helps_on_no_scan_left_out_is_not_learned():
    scans = [Outlined(soft(6.0), truth(7.0)), Outlined(soft(6.0), truth(5.0)), Outlined(soft(6.0), truth(6.0))]
    found = learn(scans)
    assert found.factors == (1.0,) and found.gain < 0.002


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_learned_where_none_can_be_left_out(count):
    found = learn([Outlined(soft(6.0), truth(7.0))] * count)
    assert found.gain is None and set(found.factors) <= {1.0}


def test_factors_weigh_classes_against_background():
    probabilities = torch.tensor([0.5, 0.3, 0.2]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(applied(probabilities, (2.0, 1.0)).flatten(), np.array([0.5, 0.6, 0.2]) / 1.3, rtol=1e-6)


def test_a_class_that_tells_nothing_keeps_its_outline():
    """One habit is learned; of the other classes one is nowhere and one is right whatever its factor."""
    near, far = {"centre": (7.5, 7.5, 7.5)}, {"centre": (17.5, 17.5, 17.5)}

    def classes(first, sure):
        background = 1 - first[1] - sure[1]
        return torch.stack([background, first[1], torch.zeros(SIDES), sure[1]])

    scans = [
        Outlined(classes(soft(r, **near), truth(4.0, **far)), classes(truth(r + 0.6, **near), truth(4.0, **far)))
        for r in (4.5, 5.0, 4.0)
    ]
    found = learn(scans)
    assert found.factors[0] > 1.3 and found.factors[1:] == (1.0, 1.0)
