"""Known affine maps are found again; of several, the right one is taken."""

import numpy as np
import pytest
import torch

from semisam_o1.round_0 import alignment
from semisam_o1.round_0.alignment import MOST_PLACES, align, distances, middles, register
from semisam_o1.round_0.places import AffineMap, centred_points, rotation
from tests.round_0.volumes import IDENTITY, SIDES, STEP, furthest_in_the_middle, known_map, seen_at, smooth_volume


def test_distances_by_hand():
    fixed = torch.arange(5.0).reshape(1, 5, 1, 1)
    moving = fixed + 3
    shifts = torch.tensor([[0.0, 0, 0], [-2.0, 0, 0]])  # the second looks one token (2 mm) further left
    found = distances(moving, fixed, 2.0, torch.eye(3).repeat(2, 1, 1), shifts)
    np.testing.assert_allclose(found, [9, 4 + 0.15 / 5], rtol=1e-5)  # and at one place finds nothing there
    strained = distances(moving, fixed, 2.0, 2 * torch.eye(3)[None], shifts[:1], strain_cost=0.1)
    plain = distances(moving, fixed, 2.0, 2 * torch.eye(3)[None], shifts[:1])
    np.testing.assert_allclose(strained - plain, [0.1 * 27], rtol=1e-5)  # |4 - 1|^2 on each axis
    every = distances(moving, fixed, 2.0, torch.eye(3)[None], shifts[:1], every=2)
    np.testing.assert_allclose(every, [9], rtol=1e-5)


def test_align_finds_a_known_affine_map_again():
    template, truth = smooth_volume(7), known_map(8)
    scan = seen_at(template, truth(centred_points(SIDES, STEP)))
    (found, distance), *_ = align(template, scan, STEP)
    assert furthest_in_the_middle(IDENTITY, truth) > 2 * STEP
    assert furthest_in_the_middle(found, truth) < 0.5 * STEP
    assert distance < 0.1  # of descriptors of unit variance, two strangers lie 2 apart
    again, same = align(template, scan, STEP)[0]
    assert torch.equal(found.matrix, again.matrix) and torch.equal(found.shift, again.shift)
    assert distance == same
    other, _ = align(template, scan, STEP, seed=1)[0]
    assert not torch.equal(found.matrix, other.matrix)


def test_align_of_the_template_with_itself_is_the_identity():
    template = smooth_volume(8)
    (found, distance), *_ = align(template, template, STEP)
    assert furthest_in_the_middle(found, IDENTITY) < 0.25 * STEP
    assert distance < 0.05


@pytest.mark.parametrize("degrees", [25, 120])
def test_align_starts_from_the_turn_as_well(degrees):
    template, truth = smooth_volume(9), known_map(degrees, scale=1.0, shift=(2.0, 0.0, -1.0))
    scan = seen_at(template, truth(centred_points(SIDES, STEP)))
    (found, distance), *_ = align(template, scan, STEP, turn=truth.matrix)
    assert furthest_in_the_middle(found, truth) < 0.5 * STEP
    if degrees == 120:  # too far for the starts about the identity
        assert align(template, scan, STEP)[0][1] > 3 * distance


def test_a_turn_does_not_hide_what_stands_upright():
    template, truth = smooth_volume(10), known_map(4)
    scan = seen_at(template, truth(centred_points(SIDES, STEP)))
    (found, _), *_ = align(template, scan, STEP, turn=rotation(torch.tensor([0.0, 0, 0.8])))
    assert furthest_in_the_middle(found, truth) < 0.5 * STEP


def test_of_several_maps_that_is_registered_which_bends_least_there_and_back(monkeypatch):
    template, truth = smooth_volume(15), known_map(6)
    scan = seen_at(template, truth(centred_points(SIDES, STEP)))
    shrunk = AffineMap(0.5 * torch.eye(3), torch.tensor([4.0, 4.0, 0.0]))
    for order in ([(shrunk, 0.0), (truth, 9.0)], [(truth, 9.0), (shrunk, 0.0)]):
        monkeypatch.setattr(alignment, "align", lambda *args, order=order, **settings: order)
        found, displacement, distance = register(template, scan, STEP)
        assert found is truth and displacement.shape == (*SIDES, 3) and distance < 0.05


def test_of_maps_that_cost_about_the_same_the_one_that_fits_near_the_label_is_registered(monkeypatch):
    """A third of the scan, where the label lies, has moved by 12 mm relative to the rest."""
    template, points = smooth_volume(22), centred_points(SIDES, STEP)
    label = points[..., 0] > 6
    moved = AffineMap(torch.eye(3), torch.tensor([0.0, 12.0, 0.0]))
    scan = seen_at(template, torch.where(label[..., None], points, moved(points)))
    weight = torch.where(label, 1.5, 0.2)
    maps = [(IDENTITY, 0.0), (moved, 9.0)]
    monkeypatch.setattr(alignment, "align", lambda *args, **settings: maps)

    def registered(similar, weight):
        monkeypatch.setattr(alignment, "SIMILAR", similar)
        return register(template, scan, STEP, weight=weight, stiffness=1e4)[0]

    assert registered(100.0, weight) is IDENTITY  # fits the label
    assert registered(100.0, None) is moved and registered(1.0, weight) is moved  # fits most of the scan


def test_align_gives_maps_that_hardly_differ_once():
    template = smooth_volume(16)
    found = align(template, template, STEP)
    corners = centred_points((2, 2, 2), np.array(SIDES) * STEP)
    for number, (one, _) in enumerate(found):
        for other, _ in found[:number]:
            assert (one(corners) - other(corners)).abs().max() > STEP
    assert [value for _, value in found] == sorted(value for _, value in found)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_small_grid_is_found_anywhere_in_a_large_one(swapped):
    """A fifth of a long scan, near its end, as a tight crop about an organ."""
    large = smooth_volume(3, (16, 16, 60))
    small = large[:, :, :, 2:14]
    place = AffineMap(torch.eye(3), torch.tensor([0.0, 0.0, (29.5 - 7.5) * STEP]))
    template, scan, truth = (large, small, place.inverse()) if swapped else (small, large, place)
    (found, distance), *_ = align(template, scan, STEP)
    middle = torch.zeros(3) if swapped else torch.tensor([0.0, 0.0, -(29.5 - 7.5) * STEP])
    assert (found(middle) - truth(middle)).norm() < STEP


def test_the_middle_of_the_smaller_grid_is_tried_in_every_part_of_the_larger():
    assert middles(torch.tensor([10.0, 10, 14]), torch.tensor([10.0, 10, 10])) == []
    found = torch.stack(middles(torch.tensor([10.0, 12, 40]), torch.tensor([10.0, 10, 10])))
    assert found[:, :2].abs().max() == 0 and sorted(found[:, 2].tolist()) == [2.5 * n for n in range(-6, 7)]
    many = torch.stack(middles(torch.tensor([200.0, 200, 200]), torch.tensor([10.0, 10, 10])))
    assert len(many) <= MOST_PLACES and many.abs().max() > 60
