"""Known displacements are found again, and none folds the space."""

import numpy as np
import pytest
import torch

from semisam_o1.round_0 import displacement
from semisam_o1.round_0.displacement import deform, sharpen, smoothed, squeezed
from semisam_o1.round_0.places import AffineMap, centred_points, rotation, sample
from semisam_o1.round_0.quality import nonpositive_jacobian
from tests.round_0.volumes import IDENTITY, SIDES, STEP, known_map, seen_at, smooth_volume


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
    monkeypatch.setattr(displacement, "SQUEEZED_COST", 0.0)
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
