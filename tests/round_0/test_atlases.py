"""The second pass: scans of one phantom under known maps, fused by hand-worked weights."""

import math

import numpy as np
import pytest
import torch

from semisam_o1.data.phantoms import make_phantom
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.round_0.atlases import SHARPNESS, STRAIGHT, Atlas, Carried, carried_from, dissimilarity, fuse
from semisam_o1.round_0.places import AffineMap, centred_points, sample

SHAPE, STEP = (20, 19, 18), 2.4


@pytest.fixture(scope="module")
def phantom():
    """Descriptors (C, H, W, D) and fractional label (3, H, W, D) of one case, the template's space."""
    image, label = make_phantom(0, SHAPE, STEP)
    image = torch.from_numpy((image - image.mean()) / image.std())
    shares = torch.from_numpy(np.eye(3, dtype=np.float32)[label].transpose(3, 0, 1, 2).copy())
    return mind(dilations=(1,), boxes=(3, 5))(image[None, None])[0], shares


def moved(volume, place):
    """What stands in the template, seen from a scan whose place there is ``place``."""
    return sample(volume, place(centred_points(SHAPE, STEP)), STEP)


def shift(*mm):
    return AffineMap(torch.eye(3), torch.tensor(mm))


def test_a_label_comes_over_from_a_scan_that_lies_elsewhere(phantom):
    tokens, label = phantom
    here, there = shift(STEP, 0.0, -STEP), shift(-2 * STEP, STEP, 0.0)
    atlas = Atlas(moved(tokens, there), moved(label, there), there)
    carried, mismatch, inside = carried_from(atlas, moved(tokens, here), here, STEP)
    truth = moved(label, here).argmax(0)
    inner = (slice(3, -3),) * 3
    for number in (1, 2):
        found, known = (carried.argmax(0) == number)[inner], (truth == number)[inner]
        assert 2 * (found & known).sum() / (found.sum() + known.sum()) > 0.95
    np.testing.assert_allclose(carried.sum(0), 1, atol=1e-4)
    assert mismatch.shape == inside.shape == SHAPE and mismatch[inner].mean() < 0.02


def test_the_scan_most_like_it_is_the_one_that_shows_the_same(phantom):
    tokens, _ = phantom
    here = shift(0.0, 0.0, 0.0)
    image, _ = make_phantom(5, SHAPE, STEP)
    stranger = mind(dilations=(1,), boxes=(3, 5))(torch.from_numpy((image - image.mean()) / image.std())[None, None])[0]
    same, misplaced = shift(STEP, 0.0, 0.0), shift(0.0, 4 * STEP, 0.0)
    others = [(stranger, here), (moved(tokens, same), same), (moved(tokens, same), misplaced)]
    values = dissimilarity(tokens, here, others, STEP)
    assert values.argmin() == 1 and values[1] < 0.3 * values.median()
    assert len(dissimilarity(tokens, here, [], STEP)) == 0


def test_fused_by_hand():
    given, one, two = (torch.tensor([p, 1 - p]).reshape(2, 1, 1, 1).expand(2, 4, 4, 4) for p in (0.0, 0.9, 0.3))
    here, there, far = (torch.full((4, 4, 4), value) for value in (0.2, 0.1, 0.3))  # mean 0.2
    fused = fuse([whole(given, here)], [whole(one, there), whole(two, far)])
    a, b, c = STRAIGHT * math.exp(-SHARPNESS), math.exp(-SHARPNESS * 0.5), math.exp(-SHARPNESS * 1.5)
    np.testing.assert_allclose(fused[0], (0.9 * b + 0.3 * c) / (a + b + c), rtol=1e-5)
    np.testing.assert_allclose(fused.sum(0), 1, rtol=1e-5)


def test_a_label_of_a_person_outranks_one_that_matches_as_well():
    says_one, says_none = (torch.tensor(p).reshape(2, 1, 1, 1).expand(2, 4, 4, 4) for p in ([0.0, 1.0], [1.0, 0.0]))
    alike = torch.full((4, 4, 4), 0.1)
    fused = fuse([whole(says_one, alike)], [whole(says_none, alike)] * 5)
    np.testing.assert_allclose(fused[1], STRAIGHT / (STRAIGHT + 5), rtol=1e-5)
    fused = fuse([whole(says_one, alike), whole(says_none, alike)], [])
    np.testing.assert_allclose(fused, 0.5, rtol=1e-5)


def test_an_atlas_counts_where_it_matches():
    own = torch.tensor([0.5, 0.5]).reshape(2, 1, 1, 1).expand(2, 20, 4, 4)
    left, right = torch.full((20, 4, 4), 0.01), torch.full((20, 4, 4), 0.01)
    left[:10], right[10:] = 1.0, 1.0  # each is far off in one half
    says_one = torch.zeros(2, 20, 4, 4)
    says_one[1] = 1
    says_none = says_one.flip(0)
    fused = fuse([whole(own, torch.full((20, 4, 4), 0.6))], [whole(says_one, left), whole(says_none, right)])
    assert (fused.argmax(0)[:7] == 0).all() and (fused.argmax(0)[13:] == 1).all()


def test_an_atlas_has_no_say_beyond_its_field_of_view():
    """Five atlases that end in the middle match the first half as well as the scan's own label does."""
    own, none = (torch.tensor(p).reshape(2, 1, 1, 1).expand(2, 20, 4, 4) for p in ([0.0, 1.0], [1.0, 0.0]))
    alike, half = torch.full((20, 4, 4), 0.1), torch.ones(20, 4, 4, dtype=torch.bool)
    half[10:] = False
    fused = fuse([whole(own, alike)], [Carried(none, alike, half)] * 5)
    np.testing.assert_allclose(fused[1, :10], STRAIGHT / (STRAIGHT + 5), rtol=1e-5)
    np.testing.assert_allclose(fused[1, 10:], 1, rtol=1e-5)


def test_a_carried_label_says_where_its_atlas_reaches(phantom):
    tokens, label = phantom
    here = shift(0.0, 0.0, 0.0)
    carried = carried_from(Atlas(tokens[:, :12], label[:, :12], shift(-4 * STEP, 0.0, 0.0)), tokens, here, STEP)
    share = carried.inside.float().mean((1, 2))
    assert share[:10].min() > 0.95 and share[14:].max() < 0.05


def test_a_larger_field_of_view_is_dissimilar_only_by_its_cost(phantom):
    """Half of the scan lies outside of the atlas, the other half is the same."""
    tokens, _ = phantom
    half, place = tokens[:, :10], shift(5 * STEP, 0.0, 0.0)
    for cost, least, most in ((0.15, 0.07, 0.08), (0.0, 0.0, 1e-6)):
        (found,) = dissimilarity(tokens, place, [(half, shift(0.0, 0.0, 0.0))], STEP, outside_cost=cost)
        assert least <= found <= most


def whole(label, mismatch):
    return Carried(label, mismatch, torch.ones_like(mismatch, dtype=torch.bool))
