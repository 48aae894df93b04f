"""Positions, samples, rotations and pooled descriptors, by hand and against scipy."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

from semisam_o1.data.phantoms import grid_affine, reorient
from semisam_o1.round_0.places import (
    AffineMap,
    centred_points,
    frame_rotation,
    pooled,
    principal,
    rotation,
    sample,
    turn_between,
)
from tests.round_0.volumes import STEP, known_map, seen_at, smooth_volume


def test_centred_points_by_hand():
    points = centred_points((2, 3, 1), (1.0, 2.0, 5.0))
    assert points.shape == (2, 3, 1, 3)
    assert points[:, 0, 0].tolist() == [[-0.5, -2, 0], [0.5, -2, 0]]
    assert points[1, :, 0].tolist() == [[0.5, -2, 0], [0.5, 0, 0], [0.5, 2, 0]]
    assert centred_points((2, 2, 3), 4.0)[1, 0, 2].tolist() == [2, -2, 4]
    np.testing.assert_allclose(centred_points((5, 4, 3), 1.3).mean((0, 1, 2)), 0, atol=1e-6)


def test_sample_is_trilinear_at_centred_positions():
    volume = smooth_volume(0, (7, 9, 5), channels=2, sigma=0.5)
    points = np.random.default_rng(1).uniform(-1.3, 1.3, (4, 3, 6, 3)) * (7, 9, 5)  # in mm, some outside
    found = sample(volume, torch.tensor(points, dtype=torch.float32), STEP)
    assert found.shape == (2, 4, 3, 6)
    np.testing.assert_allclose(found, seen_at(volume, points), atol=1e-4)


def test_sample_at_the_tokens_gives_the_tokens():
    volume = smooth_volume(2, (5, 6, 7))
    points = centred_points((5, 6, 7), (1.0, 2.0, 3.0))
    np.testing.assert_allclose(sample(volume, points, (1.0, 2.0, 3.0)), volume, atol=1e-5)
    far = torch.full((1, 1, 1, 3), 1e3)
    np.testing.assert_allclose(sample(volume, far, 1.0)[:, 0, 0, 0], volume[:, -1, -1, -1], atol=1e-5)
    assert sample(volume, far, 1.0, padding="zeros").eq(0).all()


@pytest.mark.parametrize("vector", [(0, 0, 0), (0.3, 0, 0), (0, -1.2, 0), (0.4, -0.7, 2.1)])
def test_rotation_is_scipys(vector):
    expected = Rotation.from_rotvec(vector).as_matrix()
    np.testing.assert_allclose(rotation(torch.tensor(vector)), expected, atol=1e-5)


@pytest.mark.parametrize("turn", [(0, 0, 0), (25, 0, 0), (8, -6, 15), (-20, 12, 30)])
@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "PSR", "ILA"])
def test_frame_rotation_is_the_turn_however_the_axes_are_stored(turn, axcodes):
    affine = grid_affine((10, 12, 14), (1, 2, 3), axcodes, turn)
    found = frame_rotation(affine)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, Rotation.from_euler("xyz", turn, degrees=True).as_matrix(), atol=1e-6)


def test_frame_rotation_of_a_reoriented_scan_is_the_same():
    affine = grid_affine((10, 12, 14), (1, 2, 3), "RAS", (10, 20, -15))
    stored = reorient(np.zeros((10, 12, 14)), affine, "ASL")[1]
    np.testing.assert_allclose(frame_rotation(stored), frame_rotation(affine), atol=1e-6)


def test_turn_between_brings_both_scans_into_one_pose():
    turns = {"scan": (10, 20, -15), "template": (-25, 5, 8)}
    affines = [
        grid_affine((10, 12, 14), 1.0, "LPS", turns["scan"]),
        grid_affine((9, 9, 9), 2.0, "PSR", turns["template"]),
    ]
    found = turn_between(*affines).double()
    scan, template = (Rotation.from_euler("xyz", turn, degrees=True).as_matrix() for turn in turns.values())
    for direction in np.eye(3):  # of the upright body: seen by the scan, then by the template
        np.testing.assert_allclose(found @ (scan @ direction), template @ direction, atol=1e-6)


def test_frame_rotation_of_a_sheared_affine_is_still_a_rotation():
    affine = grid_affine((10, 12, 14), 1.0, "RAS", (5, 10, 0))
    affine[0, 1] += 0.1
    found = frame_rotation(affine).double()
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-6)
    assert torch.linalg.det(found) == pytest.approx(1)


def test_an_affine_map_by_hand():
    quarter = AffineMap(torch.tensor([[0.0, -2, 0], [1, 0, 0], [0, 0, 1]]), torch.tensor([1.0, 0, -1]))
    assert quarter(torch.tensor([[[3.0, 4, 5]]])).tolist() == [[[-7, 3, 4]]]


def test_pooled_keeps_the_middle():
    """Positions in mm are pooled to the positions of the pooled grid, whatever remains of each axis."""
    ramp = centred_points((9, 8, 7), 1.0).permute(3, 0, 1, 2)
    assert pooled(ramp, 1) is ramp
    for factor in (2, 3, 4, 8):
        shape = [max(1, n // factor) for n in (9, 8, 7)]
        there = centred_points(shape, factor).permute(3, 0, 1, 2)
        found = pooled(ramp, factor)
        assert found.shape == (3, *shape)
        np.testing.assert_allclose(found, there, atol=1e-5)
        np.testing.assert_allclose(found.diff(dim=1)[0], factor)


def test_principal_keeps_distances():
    rng = np.random.default_rng(3)
    basis, _ = np.linalg.qr(rng.standard_normal((20, 4)))
    template, scan = (
        torch.tensor(basis @ rng.standard_normal((4, n)) + 3, dtype=torch.float32).reshape(20, *shape)
        for n, shape in ((60, (3, 4, 5)), (24, (2, 3, 4)))
    )
    basis = principal(template, 4)
    found = basis(template), basis(scan)
    assert [x.shape for x in found] == [(4, 3, 4, 5), (4, 2, 3, 4)]
    before = cdist(template.flatten(1).T, scan.flatten(1).T)
    np.testing.assert_allclose(cdist(found[0].flatten(1).T, found[1].flatten(1).T), before, atol=1e-4)


def test_principal_takes_the_directions_of_largest_variance():
    template = smooth_volume(4, (6, 6, 6), channels=6)
    template *= torch.tensor([1.0, 5, 0.1, 3, 0.2, 0.3])[:, None, None, None]
    found = principal(template, 2)(template)
    flat = template.flatten(1).numpy()
    spectrum = np.linalg.svd(flat - flat.mean(1, keepdims=True), compute_uv=False)
    norms = np.linalg.norm(found.flatten(1).numpy(), axis=1)
    np.testing.assert_allclose(sorted(norms), sorted(spectrum[:2]), rtol=1e-4)


def test_principal_leaves_few_channels_as_they_are_but_for_the_mean():
    template, scan = smooth_volume(5), smooth_volume(6)
    mean = template.mean((1, 2, 3), keepdim=True)
    np.testing.assert_allclose(principal(template, 3)(scan), scan - mean, atol=1e-6)


def test_through_the_template_from_one_scan_to_another():
    one, other = known_map(8), known_map(-20, scale=0.9, shift=(1.0, 2.0, -4.0))
    points = centred_points((2, 3, 4), 7.0)
    np.testing.assert_allclose(other(one.then_back(other)(points)), one(points), atol=1e-4)
