"""Positions, samples and rotations against scipy; known maps and displacements found again."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

from semisam_o1.data.phantoms import grid_affine, reorient
from semisam_o1.round_0 import alignment
from semisam_o1.round_0.alignment import (
    AffineMap,
    align,
    centred_points,
    deform,
    distances,
    frame_rotation,
    pooled,
    principal,
    register,
    rotation,
    sample,
    sharpen,
    smoothed,
    squeezed,
    turn_between,
)
from semisam_o1.round_0.quality import nonpositive_jacobian

STEP = 2.0
SIDES = (18, 17, 16)
IDENTITY = AffineMap(torch.eye(3), torch.zeros(3))


def smooth_volume(seed, shape=SIDES, channels=3, sigma=2.0):
    """(C, H, W, D) float32 of unit variance that varies over some ``sigma`` tokens."""
    noise = np.random.default_rng(seed).standard_normal((channels, *shape))
    smooth = np.stack([gaussian_filter(channel, sigma) for channel in noise])
    return torch.tensor(smooth / smooth.std((1, 2, 3), keepdims=True), dtype=torch.float32)


def seen_at(volume, points):
    """``volume`` at centred mm positions (H, W, D, 3) by scipy's linear interpolation, borders continued."""
    index = points / STEP + (np.array(volume.shape[1:]) - 1) / 2
    index = np.moveaxis(np.asarray(index, float), -1, 0)
    return torch.tensor(
        np.stack([map_coordinates(channel.numpy(), index, order=1, mode="nearest") for channel in volume])
    )


# Geometry


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


# Smaller volumes of descriptors


def test_pooled_keeps_the_middle():
    ramp = centred_points((9, 8, 7), 1.0).permute(3, 0, 1, 2)
    assert pooled(ramp, 1) is ramp
    for factor in (2, 3):
        found = pooled(ramp, factor)
        assert found.shape == (3, *(n // factor for n in (9, 8, 7)))
        np.testing.assert_allclose(found.diff(dim=1)[0], factor)
        # what is cut off is shared between both ends as far as whole tokens go
        assert found.mean((1, 2, 3)).abs().max() <= 0.5


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


# Known maps


def known_map(degrees, scale=1.08, shift=(3.0, -2.5, 1.5)):
    turn = Rotation.from_rotvec(np.deg2rad(degrees) * np.array([1, 2, 2]) / 3).as_matrix()
    return AffineMap(torch.tensor(scale * turn, dtype=torch.float32), torch.tensor(shift))


def furthest_in_the_middle(found, truth):
    """The largest distance (mm) between two maps over the middle half of the grid."""
    points = centred_points(SIDES, STEP / 2)
    return float((found(points) - truth(points)).norm(dim=-1).max())


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


# Known displacements


def test_smoothed_is_two_passes_of_a_cube():
    field = torch.zeros(1, 3, 9, 9, 9)
    field[0, 1, 4, 4, 4] = 1
    found = smoothed(field)
    line = np.convolve([1, 1, 1], [1, 1, 1]) / 9
    cube = np.einsum("i,j,k->ijk", line, line, line)
    np.testing.assert_allclose(found[0, 1, 2:7, 2:7, 2:7], cube, atol=1e-6)
    np.testing.assert_allclose(smoothed(torch.full((1, 3, 4, 5, 6), 2.5)), 2.5, atol=1e-6)


@pytest.mark.parametrize("matrix", [torch.eye(3), known_map(8).matrix], ids=["identity", "after a map"])
def test_deform_finds_a_known_displacement_again(matrix):
    template = smooth_volume(11)
    to_template = AffineMap(matrix, torch.zeros(3))
    points = centred_points(SIDES, STEP)
    extent = torch.tensor(SIDES) * STEP
    waves = torch.stack([torch.cos(2 * torch.pi * points[..., (axis + 1) % 3] / extent[0]) for axis in range(3)], -1)
    truth = torch.tensor([3.0, -2.0, 2.5]) * waves  # mm
    scan = seen_at(template, to_template(points) + truth)
    before = float((sample(template, to_template(points), STEP) - scan).square().mean())
    found, distance = deform(template, scan, STEP, to_template)
    assert found.shape == (*SIDES, 3)
    inside = ((to_template(points) + truth).abs() < extent / 2 - 2 * STEP).all(-1)
    error = (found - truth)[inside].norm(dim=-1)
    assert error.mean() < 0.35 * truth[inside].norm(dim=-1).mean()
    after = float((sample(template, to_template(points) + found, STEP) - scan).square().mean())
    assert after < 0.25 * before
    assert distance == pytest.approx(after, rel=0.2)


def test_deform_stays_where_nothing_is_to_gain():
    template = smooth_volume(12)
    found, distance = deform(template, template, STEP, IDENTITY)
    assert found.norm(dim=-1).mean() < 0.15 * STEP and distance < 0.02


def test_stiffness_holds_the_displacement_back():
    template, scan = smooth_volume(13, (12, 12, 12)), smooth_volume(14, (12, 12, 12))
    loose, stiff = (deform(template, scan, STEP, IDENTITY, stiffness=s)[0] for s in (0.05, 50.0))
    assert stiff.diff(dim=0).square().mean() < 0.1 * loose.diff(dim=0).square().mean()


def test_a_displacement_serves_the_places_of_weight_first():
    template = smooth_volume(15)
    points = centred_points(SIDES, STEP)
    half = (points[..., :1] > 0).float()  # the two halves ask for opposite displacements
    truth = torch.tensor([0.0, 3.0, 0.0]) * (2 * half - 1)  # mm
    scan = seen_at(template, points + truth)
    weight = torch.where(half[..., 0] > 0, 2.0, 0.05)
    errors = []
    for counts in (None, weight):
        found, _ = deform(template, scan, STEP, IDENTITY, stiffness=0.5, weight=counts)
        errors.append((found - truth)[half[..., 0] > 0].norm(dim=-1).mean())
    assert errors[1] < 0.8 * errors[0]


def test_a_grid_of_few_tokens_is_deformed_all_the_same():
    template = smooth_volume(16, (5, 6, 3))
    found, _ = deform(template, template, STEP, IDENTITY)
    assert found.shape == (5, 6, 3, 3) and found.isfinite().all()


@pytest.mark.parametrize("scale, cost", [(1.0, 0.0), (2.5, 0.0), (0.5, 0.0), (0.2, 0.2**2), (-1.0, 1.4**2)], ids=str)
def test_squeezed_by_hand(scale, cost):
    """A cell may keep 0.4 of its volume; a mirrored one has -1 times its volume."""
    along_x = torch.tensor([scale, 1.0, 1.0])
    points = centred_points((3, 4, 5), STEP)
    assert float(squeezed(points * along_x, IDENTITY, STEP)) == pytest.approx(cost, abs=1e-6)
    half = torch.where(points[..., :1] < 0, points * along_x, points)  # one of two cells along x
    assert float(squeezed(half, IDENTITY, STEP)) == pytest.approx(cost / 2, abs=1e-6)
    assert float(squeezed(points[:1], IDENTITY, STEP)) == 0  # one layer of places has no volume


def test_squeezed_is_relative_to_the_affine_map():
    shrunk = AffineMap(0.5 * rotation([0.3, 0.1, 0.2]), torch.tensor([5.0, 0.0, 1.0]))
    points = shrunk(centred_points((3, 4, 5), STEP))
    assert float(squeezed(points, shrunk, STEP)) == pytest.approx(0, abs=1e-6)
    assert float(squeezed(points, IDENTITY, STEP)) == pytest.approx((0.4 - 0.125) ** 2, abs=1e-5)


def test_displacements_do_not_fold_the_space(monkeypatch):
    """Two volumes that have nothing in common, and a field that is hardly stiff."""
    template, scan = smooth_volume(20), smooth_volume(21)
    points, everywhere = centred_points(SIDES, STEP), torch.ones(SIDES, dtype=torch.bool)

    def folds():
        coarse = points + deform(template, scan, STEP, IDENTITY, stiffness=0.002)[0]
        weights = torch.ones(SIDES)
        fine = sharpen(template, scan, STEP, IDENTITY, points, weights, everywhere, stiffness=0.002)
        return [nonpositive_jacobian(found, torch.ones(SIDES)) for found in (coarse, fine)]

    with_cost = folds()
    monkeypatch.setattr(alignment, "SQUEEZED_COST", 0.0)
    without = folds()
    for one, other in zip(with_cost, without, strict=True):
        assert one < 0.25 * other and other > 0.01


def fine_waves(points, mm=1.5):
    """A displacement too fine for half of the resolution: (H, W, D, 3) mm."""
    return mm * torch.stack([torch.sin(2 * torch.pi * points[..., (axis + 1) % 3] / 16) for axis in range(3)], -1)


def test_sharpen_finds_a_fine_displacement_where_the_detail_matters():
    template, points = smooth_volume(17), centred_points(SIDES, STEP)
    truth = fine_waves(points)
    scan = seen_at(template, points + truth)
    near = torch.zeros(SIDES, dtype=torch.bool)
    near[:6] = True
    found = sharpen(template, scan, STEP, IDENTITY, points, torch.ones(SIDES), near)
    inner = (slice(1, 5), slice(3, -3), slice(3, -3))
    error, before = ((field - points - truth)[inner].norm(dim=-1).mean() for field in (found, points))
    assert error < 0.75 * before
    np.testing.assert_array_equal(found[12:], points[12:])  # 4 tokens around what is near, and no more
    np.testing.assert_array_equal(
        sharpen(template, scan, STEP, IDENTITY, points, torch.ones(SIDES), near & False), points
    )


def test_sharpen_adds_to_what_was_found():
    """A scan moved by 3 mm, of which the points know: a stiff field leaves them as they are."""
    template, points = smooth_volume(18), centred_points(SIDES, STEP) + torch.tensor([3.0, 0, 0])
    scan = seen_at(template, points)
    everywhere = torch.ones(SIDES, dtype=torch.bool)
    found = sharpen(template, scan, STEP, IDENTITY, points, torch.ones(SIDES), everywhere)
    inner = (slice(2, -4), slice(2, -2), slice(2, -2))
    assert (found - points)[inner].norm(dim=-1).mean() < 0.15 * STEP
    stiff, loose = (
        sharpen(template, smooth_volume(19), STEP, IDENTITY, points, torch.ones(SIDES), everywhere, stiffness=stiffness)
        - points
        for stiffness in (100.0, 0.01)
    )
    assert stiff.diff(dim=0).square().mean() < 0.1 * loose.diff(dim=0).square().mean()
