"""What is said of labels without truth: by hand, and on phantoms whose labels are spoiled on purpose."""

import numpy as np
import pytest
import torch

from semisam_o1.data.phantoms import make_phantom
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.report.overlap import soft_dice
from semisam_o1.round_0.alignment import centred_points
from semisam_o1.round_0.propagation import Reference, nearest
from semisam_o1.round_0.quality import back_propagate, estimate_quality, nonpositive_jacobian, roughness

SHAPE, STEP = (20, 19, 18), 2.4


def one_hot(label):
    return torch.from_numpy(np.eye(3, dtype=np.float32)[label].transpose(3, 0, 1, 2).copy())


def phantom(seed):
    image, label = make_phantom(seed, SHAPE, STEP)
    image = torch.from_numpy((image - image.mean()) / image.std())
    return Reference(mind(dilations=(1,), boxes=(3, 5))(image[None, None])[0], one_hot(label))


def test_soft_dice_by_hand():
    one = torch.tensor([[0.2, 1.0], [0.8, 0.0], [0.0, 0.0]]).reshape(3, 2, 1, 1)
    other = torch.tensor([[0.5, 0.6], [0.5, 0.4], [0.0, 0.0]]).reshape(3, 2, 1, 1)
    assert soft_dice(one, other) == pytest.approx(2 * 0.5 / 1.7)  # class 2 is in neither
    assert soft_dice(one, other, "product") == pytest.approx(2 * 0.4 / 1.7)
    assert soft_dice(one, one) == pytest.approx(1)
    hard = torch.tensor([[1.0, 0], [0, 1.0], [0, 0]]).reshape(3, 2, 1, 1)
    assert soft_dice(hard, hard.flip(1)) == 0


def test_roughness_of_a_cube_is_its_surface_over_its_volume():
    label = np.zeros((9, 9, 9), int)
    label[2:6, 2:6, 2:6] = 1
    assert roughness(one_hot(label)) == pytest.approx(6 * 16 / 64)


def test_folding_is_where_the_map_runs_backwards():
    points = centred_points((8, 5, 5), 2.0).clone()
    weight = torch.zeros(8, 5, 5)
    weight[2:4] = 1
    assert nonpositive_jacobian(points, weight) == 0
    points[..., 0] = -points[..., 0]
    assert nonpositive_jacobian(points, weight) == 1


@pytest.fixture(scope="module")
def carried():
    """A template, another case, round 0's label for it and the way back."""
    template, scan = phantom(0), phantom(2)
    return template, scan, nearest([template], scan.tokens, STEP), back_propagate(template.tokens, scan.tokens, STEP)


def spoiled(label):
    """Labels that are wrong in the ways in which propagation goes wrong."""
    number = label.argmax(0).numpy()
    cut = number.copy()
    cut[:, : 2 * number.shape[1] // 3] = 0
    return {
        "shifted": np.roll(number, (4, -4, 3), (0, 1, 2)),
        "mirrored": number[::-1].copy(),
        "cut": cut,
        "empty": np.zeros_like(number),
    }


def test_a_good_label_is_told_from_spoiled_ones(carried):
    template, scan, found, back = carried
    good = estimate_quality(
        template, one_hot(found.probabilities.argmax(0).numpy()), found.probabilities, back, STEP, 0.1
    )
    assert good.predicted_dice > 0.7 and good.reverse_consistency > 0.7
    for name, label in spoiled(found.probabilities).items():
        quality = estimate_quality(template, one_hot(label), found.probabilities, back, STEP, 0.1)
        assert quality.predicted_dice < 0.6, name
        assert quality.reverse_consistency < 0.7 * good.reverse_consistency, name


def test_a_failure_with_which_round_0_agrees_is_found_by_the_way_back(carried):
    template, _, found, back = carried
    wrong = torch.roll(found.probabilities, (4, -4, 3), (1, 2, 3))
    label = one_hot(wrong.argmax(0).numpy())
    quality = estimate_quality(template, label, wrong, back, STEP, 0.1)
    assert quality.agreement > 0.6 and quality.predicted_dice < 0.6


def test_the_way_back_is_its_own(carried):
    template, scan, found, back = carried
    there = found.to_template(centred_points(SHAPE, STEP))
    assert back.points.shape == (*SHAPE, 3) and not torch.allclose(back.points, there)
    again = back_propagate(template.tokens, scan.tokens, STEP)
    assert torch.equal(back.points, again.points)
    assert not torch.equal(back.points, back_propagate(template.tokens, scan.tokens, STEP, seed=2).points)
