"""Labels carried by features: hand-worked cosines, scipy's resampling and morphology, and phantoms."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation, zoom

from semisam_o1.data.phantoms import make_phantom
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.round_0 import propagation
from semisam_o1.round_0.places import centred_points
from semisam_o1.round_0.propagation import (
    Reference,
    class_prototypes,
    class_radius,
    emptied,
    in_view,
    label_radius,
    reach_of,
    reached,
)

SHAPE, STEP = (18, 17, 16), 2.6


def one_hot(label, num_classes=3):
    return torch.from_numpy(np.eye(num_classes, dtype=np.float32)[np.asarray(label)].transpose(3, 0, 1, 2).copy())


def tokens_of(rows, shape):
    """(C, H, W, D) of one vector a place."""
    return torch.tensor(rows, dtype=torch.float32).T.reshape(-1, *shape)


def phantom(seed):
    """Descriptors and label of one case on tokens 2 mm apart."""
    image, label = make_phantom(seed, SHAPE, STEP)
    image = torch.from_numpy((image - image.mean()) / image.std())
    return Reference(mind(dilations=(1,), boxes=(3, 5))(image[None, None])[0], one_hot(label)), label


@pytest.fixture(scope="module")
def first():
    return phantom(0)


def copy(*args, **settings):
    return propagation.copy(*args, **settings).probabilities


def prototype(*args, **settings):
    return propagation.prototype(*args, **settings).probabilities


def nearest(*args, **settings):
    return propagation.nearest(*args, **settings).probabilities


def dice(found, label, number):
    found, label = found.argmax(0).numpy() == number, label == number
    return 2 * (found & label).sum() / (found.sum() + label.sum())


# Copy


@pytest.mark.parametrize("shape", [(6, 5, 4), (12, 10, 8), (9, 4, 4)])
def test_copy_stretches_the_label_over_the_scan(shape):
    label = torch.rand(3, 6, 5, 4, generator=torch.Generator().manual_seed(0)).softmax(0)
    found = copy([Reference(torch.zeros(2, 6, 5, 4), label)], torch.zeros(2, *shape))
    factors = np.array(shape) / (6, 5, 4)
    expected = np.stack([zoom(c, factors, order=1, mode="nearest", grid_mode=True) for c in label.numpy()])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-6)


def test_copy_of_several_templates_is_their_mean():
    one, two = (Reference(torch.zeros(1, 2, 2, 2), one_hot(np.full((2, 2, 2), n))) for n in (0, 2))
    found = copy([one, two, two], torch.zeros(1, 3, 3, 3))
    np.testing.assert_allclose(found[:, 1, 1, 1], (1 / 3, 0, 2 / 3), atol=1e-6)


# Prototypes


def test_class_prototypes_by_hand():
    tokens = tokens_of([(3, 0), (1, 0), (0, 2), (4, 4)], (4, 1, 1))
    label = torch.tensor([[0.9, 0.1, 0], [0.6, 0.4, 0], [0.2, 0.8, 0], [0.4, 0.6, 0]]).T.reshape(3, 4, 1, 1)
    background, organ, absent = class_prototypes(Reference(tokens, label))
    np.testing.assert_allclose(background, [[1, 0]])  # mean (2, 0)
    np.testing.assert_allclose(organ, [[2 / math.sqrt(13), 3 / math.sqrt(13)]], rtol=1e-6)  # mean (2, 3)
    assert absent is None


def test_several_prototypes_a_class_are_its_clusters():
    rows = [(5, 0), (5, 0.1), (0, 7), (0.1, 7), (-1, -1)]
    reference = Reference(tokens_of(rows, (5, 1, 1)), one_hot(np.array([0, 0, 0, 0, 1]).reshape(5, 1, 1), 2))
    background, organ = class_prototypes(reference, k=2)
    expected = np.array([[5, 0.05], [0.05, 7]])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(background[background[:, 1].argsort()], expected, atol=1e-5)
    np.testing.assert_allclose(organ, [[-math.sqrt(0.5)] * 2], atol=1e-6)  # one member, one prototype


def test_prototype_scores_by_hand():
    reference = Reference(tokens_of([(2, 0), (0, 5)], (2, 1, 1)), one_hot(np.array([0, 1]).reshape(2, 1, 1), 2))
    scan = tokens_of([(1, 0), (0.6, 0.8), (-3, 4)], (3, 1, 1))
    found = prototype([reference], scan, temperature=0.5)
    cosines = np.array([[1, 0.6, -0.6], [0, 0.8, 0.8]])
    expected = np.exp(cosines / 0.5)
    np.testing.assert_allclose(found.reshape(2, 3), expected / expected.sum(0), rtol=1e-5)


def test_a_class_without_a_token_wins_where_all_others_are_negative():
    reference = Reference(tokens_of([(1, 0), (0.6, 0.8)], (2, 1, 1)), one_hot(np.array([0, 1]).reshape(2, 1, 1), 3))
    scan = tokens_of([(1, 0), (0, 1), (-1, 0), (0, -1)], (4, 1, 1))
    # cosines with class 0: 1, 0, -1, 0; with class 1: .6, .8, -.6, -.8; class 2 keeps the score 0
    found = prototype([reference], scan, temperature=0.1).flatten(1)
    expected = np.exp(np.array([[1, 0, -1, 0], [0.6, 0.8, -0.6, -0.8], [0, 0, 0, 0]]) / 0.1)
    np.testing.assert_allclose(found, expected / expected.sum(0), rtol=1e-4, atol=1e-7)
    assert found.argmax(0)[:3].tolist() == [0, 1, 2]


def test_prototypes_of_several_templates():
    label = one_hot(np.array([0, 1]).reshape(2, 1, 1), 2)
    one = Reference(tokens_of([(1, 0), (0, 1)], (2, 1, 1)), label)
    two = Reference(tokens_of([(0, 9), (0, -2)], (2, 1, 1)), label)
    bare = Reference(tokens_of([(1, 0), (1, 0)], (2, 1, 1)), one_hot(np.zeros((2, 1, 1), int), 2))
    scan = tokens_of([(0.6, 0.8), (0.8, -0.6)], (2, 1, 1))

    # class 0: (1, 0) and (0, 1) meet at 45 degrees; class 1: (0, 1) alone, `bare` has none
    three = prototype([one, bare, Reference(two.tokens, one_hot(np.zeros((2, 1, 1), int), 2))], scan, temperature=1)
    background = np.array([1, 0]) + np.array([1, 0]) + np.array([0, 1.0])
    background /= np.linalg.norm(background)
    scores = np.stack([[(0.6, 0.8) @ background, (0.8, -0.6) @ background], [0.8, -0.6]])
    np.testing.assert_allclose(three.flatten(1), np.exp(scores) / np.exp(scores).sum(0), rtol=1e-5)

    # with several a class they stay apart, and the best of them speaks
    best = prototype([one, two], scan, k=2, temperature=1).flatten(1)
    scores = np.array([[max(0.6, 0.8), max(0.8, -0.6)], [max(0.8, -0.8), max(-0.6, 0.6)]])
    np.testing.assert_allclose(best, np.exp(scores) / np.exp(scores).sum(0), rtol=1e-5)


def test_an_empty_score_is_not_a_class_that_is_nowhere_in_one_of_the_templates():
    rows = tokens_of([(1, 0), (0, 1)], (2, 1, 1))
    with_organ = Reference(rows, one_hot(np.array([0, 1]).reshape(2, 1, 1), 2))
    without = Reference(rows, one_hot(np.zeros((2, 1, 1), int), 2))
    found = prototype([with_organ, without], rows, temperature=0.1).flatten(1)
    assert found[1, 1] > 0.5  # the organ's own token, by the template that shows it


# Size and reach


def test_label_radius_is_that_of_the_ball_as_large():
    label = torch.zeros(3, 8, 8, 8)
    label[0] = 1
    label[:, :4, :4, :4] = torch.tensor([0.25, 0.5, 0.25])[:, None, None, None]
    assert label_radius(label) == pytest.approx((3 * 48 / (4 * math.pi)) ** (1 / 3))
    points = np.moveaxis(np.indices((31, 31, 31)), 0, -1) - 15
    ball = (np.linalg.norm(points, axis=-1) <= 10).astype(int)
    assert label_radius(one_hot(ball, 2)) == pytest.approx(10, rel=0.02)
    assert label_radius(one_hot(np.zeros((4, 4, 4), int))) > 0  # nothing there: still a number to divide by


def test_class_radius_is_the_geometric_mean_of_the_classes():
    label = torch.zeros(4, 30, 30, 30)
    label[1, :4, :4, :4], label[2, 10:26, 10:26, 10:26] = 1, 1  # a class of 4^3, one of 16^3, one without a voxel
    label[0] = 1 - label.sum(0)
    assert class_radius(label) == pytest.approx(8 * (3 / (4 * math.pi)) ** (1 / 3))
    alone = torch.stack([1 - label[1], label[1]])
    assert class_radius(alone) == pytest.approx(label_radius(alone))
    assert class_radius(one_hot(np.zeros((4, 4, 4), int))) > 0


@pytest.mark.slow
def test_a_large_grid_is_aligned_at_full_resolution():
    """A ball of 60 tokens a side whose surface is waved: `deform` stops at half of the resolution."""
    shape = (52, 52, 52)
    points = centred_points(shape, 1.0)
    waves = torch.stack([torch.sin(2 * torch.pi * points[..., (axis + 1) % 3] / 9) for axis in range(3)], -1)
    radius = (points.norm(dim=-1), (points + 1.5 * waves).norm(dim=-1))
    image, other = (torch.sigmoid(2 * (16 - r)) for r in radius)
    noise = 0.05 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    encoder = mind(dilations=(1,), boxes=(3,))
    template, scan = (encoder((v + n)[None, None] * 4)[0] for v, n in zip((image, other), noise))
    reference = Reference(template, one_hot((radius[0] < 16).long().numpy(), 2))
    truth = (radius[1] < 16).numpy()
    found = {sharp: nearest([reference], scan, 1.0, neighbours=0, sharp=sharp) for sharp in (False, True)}
    assert dice(found[True], truth, 1) > dice(found[False], truth, 1) + 0.005


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_reach_is_a_dilation_by_cubes(tokens):
    mask = torch.rand(2, 12, 10, 9, generator=torch.Generator().manual_seed(2)) > 0.99
    cube = np.ones((2 * tokens + 1,) * 3, bool)
    expected = np.stack([binary_dilation(channel, cube) for channel in mask.numpy()])
    np.testing.assert_array_equal(reach_of(mask, tokens), expected)
    assert 0 < expected.mean() < 1


# Nearest


def test_the_template_itself_gets_its_label_back(first):
    reference, label = first
    found = nearest([reference], reference.tokens, STEP)
    assert found.shape == reference.label.shape
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-4)
    assert found.min() >= -1e-5
    for number in (1, 2):
        assert dice(found, label, number) > 0.98


def test_a_shifted_scan_gets_a_shifted_label(first):
    reference, label = first
    shift = (3, -2, 2)
    scan = torch.roll(reference.tokens, shift, (1, 2, 3))
    moved = np.roll(label, shift, (0, 1, 2))
    found = nearest([reference], scan, STEP)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-4)
    for number in (1, 2):
        assert dice(copy([reference], scan), moved, number) < 0.75
        assert dice(found, moved, number) > 0.95


def test_another_field_of_view_does_not_matter(first):
    reference, label = first
    found = nearest([reference], reference.tokens[:, 1:-4, 2:, :-1], STEP, deformation=False)
    for number in (1, 2):
        assert dice(found, label[1:-4, 2:, :-1], number) > 0.95


def test_several_templates_and_another_case(first):
    one, two = first[0], phantom(1)[0]
    scan, label = phantom(2)
    found = nearest([one, two], scan.tokens, STEP, channels=8)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-4)
    for number in (1, 2):
        assert dice(found, label, number) > dice(copy([one], scan.tokens), label, number)
        assert dice(found, label, number) > 0.7


def test_the_template_that_fits_counts_for_more(first):
    reference = first[0]
    stranger = Reference(phantom(1)[0].tokens, one_hot(np.zeros(SHAPE, int)))  # says background everywhere
    found = nearest([stranger, reference], reference.tokens, STEP, channels=6, deformation=False)
    for number in (1, 2):
        assert dice(found, first[1], number) > 0.9


def test_without_alignment_positions_are_those_of_the_stretched_grid(first):
    reference, label = first
    found = nearest([reference], reference.tokens, STEP, alignment=False)
    for number in (1, 2):
        assert dice(found, label, number) > 0.98
    # uniform descriptors say nothing: all hangs on positions, stretched as by `copy`
    blank = torch.zeros(2, 12, 11, 14)
    found = nearest([Reference(torch.zeros(2, *SHAPE), reference.label)], blank, STEP, alignment=False)
    expected = copy([reference], blank)
    np.testing.assert_array_equal(found.argmax(0).shape, expected.argmax(0).shape)
    for number in (1, 2):
        assert dice(found, expected.argmax(0).numpy(), number) > 0.85


def test_nearest_is_deterministic_and_draws_references_by_its_seed(first):
    reference, scan = first[0], phantom(3)[0].tokens
    settings = dict(alignment=False, max_references=200)
    found = [nearest([reference], scan, STEP, seed=seed, **settings) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_template_without_foreground_gives_background(first):
    empty = Reference(first[0].tokens, one_hot(np.zeros(SHAPE, int)))
    found = nearest([empty], first[0].tokens, STEP, alignment=False)
    assert found.argmax(0).eq(0).all() and found.isfinite().all()


def test_emphasis_lies_within_reach_of_the_label():
    label = torch.zeros(2, 21, 21, 21)
    label[1, 8:13, 8:13, 8:13] = 1  # 125 tokens: a ball of radius 3.1, of which 0.4 is 1 token
    label[0] = 1 - label[1]
    weight = propagation.emphasis(label)
    assert weight.unique().tolist() == pytest.approx([0.2, 1.5])
    near = (weight > 1).nonzero()
    assert near.amin(0).tolist() == [7] * 3 and near.amax(0).tolist() == [13] * 3 and len(near) == 7**3


def test_a_label_cut_by_its_field_of_view_ends_there():
    label = torch.zeros(3, 6, 5, 4)
    label[2, 3:] = 1  # runs out of the grid
    label[0] = 1 - label[2]
    points = torch.tensor([[5.0, 0, 0], [5.9, 0, 0], [6.1, 0, 0], [40.0, 0, 0], [5.0, 5.1, 0]])  # half sides 6, 5, 4 mm
    found = propagation.sample_label(label, points, 2.0)
    np.testing.assert_allclose(found[2], [1, 1, 0, 0, 0])
    np.testing.assert_allclose(found.sum(0), 1)


def test_a_class_that_a_scan_does_not_reach_is_emptied():
    """A row of 8 tokens, class 1 on the left and class 2 on the right; the scan sees the left half."""
    label = torch.zeros(3, 8, 1, 1)
    label[0, 3:5], label[1, :3], label[2, 5:] = 1, 1, 1
    points = centred_points((8, 1, 1), 2.0)
    assert torch.equal(reached(label, points, 2.0), torch.ones(2))
    share = reached(label, points[:4], 2.0)
    assert share.tolist() == [1, 0] and reached(label, points[:6], 2.0)[1] == pytest.approx(2 / 3)
    probabilities = torch.tensor([0.2, 0.3, 0.5]).reshape(3, 1, 1, 1)
    assert emptied(probabilities, share).flatten().tolist() == pytest.approx([0.7, 0.3, 0])
    assert emptied(probabilities, torch.ones(2)) is probabilities
    assert in_view(torch.tensor([0.2, 0.2]), probabilities).tolist() == pytest.approx([0, 0.2])  # the token has class 2
    assert in_view(torch.tensor([0.3, 0.04]), probabilities).tolist() == pytest.approx([0.3, 0])
    nowhere = label.clone()
    nowhere[0] += nowhere[2]
    nowhere[2] = 0
    assert reached(nowhere, points[:4], 2.0).tolist() == [1, 1]  # a class without a token is not outside


@pytest.mark.parametrize("begin", [13, 14])
def test_an_organ_outside_of_the_field_of_view_is_left_empty(begin):
    """The scan is cut so that the first organ, on the left, lies outside of it."""
    shape, step = (22, 20, 19), 2.0

    def half(seed, begin):
        image, label = (array[begin:] for array in make_phantom(seed, shape, step))
        image = torch.from_numpy((image - image.mean()) / image.std())
        return Reference(mind(dilations=(1, 2), boxes=(3, 5))(image[None, None])[0], one_hot(label))

    template, scan = half(0, 0), half(2, begin)
    assert scan.label.sum((1, 2, 3))[1] == 0 < scan.label.sum((1, 2, 3))[2]
    found = propagation.nearest([template], scan.tokens, step)
    share = in_view(reached(template.label, found.points, step), found.probabilities)
    assert share[0] == 0 and share[1] > 0.5
    sizes = emptied(found.probabilities, share).sum((1, 2, 3))
    assert sizes[1] == 0 < sizes[2]
