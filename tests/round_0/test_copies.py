"""Copies of the template: by hand, and made by a run on phantoms."""

import numpy as np
import torch

from semisam_o1.data.phantoms import make_phantom
from semisam_o1.round_0.copies import Aligned, composed, make_copy, matched
from semisam_o1.round_0.copy_maker import plans
from semisam_o1.round_0.places import AffineMap, centred_points

SHAPE, STEP = (16, 15, 14), 3.0
STILL = AffineMap(torch.eye(3), torch.zeros(3))


def phantom(seed):
    image, label = make_phantom(seed, SHAPE, STEP)
    return torch.from_numpy(image)[None], torch.from_numpy(
        np.eye(3, dtype=np.float32)[label].transpose(3, 0, 1, 2).copy()
    )


def aligned(image, shift_mm=(0.0, 0.0, 0.0), place=STILL):
    points = place(centred_points(SHAPE, STEP)) + torch.tensor(shift_mm)
    return Aligned(image, torch.ones_like(image) > 0, points, place)


def test_displacements_add_up_and_the_pose_is_that_of_the_first():
    image = phantom(0)[0]
    turned = AffineMap(torch.eye(3), torch.tensor([6.0, 0.0, 0.0]))
    found = composed(aligned(image, (3.0, 0.0, 0.0)), aligned(image, (0.0, 1.5, 0.0), turned), STEP)
    moved = found - centred_points(SHAPE, STEP)
    assert torch.allclose(moved, torch.tensor([3.0, 1.5, 0.0]).expand_as(moved), atol=1e-5)


def test_a_copy_without_second_displacement_is_the_scan_itself():
    """What the template does not explain is added to it, so nothing of the scan is lost."""
    (template, label), (scan, _) = phantom(0), phantom(3)
    copy = make_copy(template, label, aligned(scan), aligned(scan), STEP)
    assert torch.allclose(copy.image, scan, atol=1e-4)
    assert torch.equal(copy.label.argmax(0), label.argmax(0))


def test_image_and_label_of_a_copy_move_together():
    template, label = phantom(0)
    copy = make_copy(template, label, aligned(template), aligned(template, (STEP, 0.0, 0.0)), STEP)
    assert torch.equal(copy.label.argmax(0)[:-1], label.argmax(0)[1:])
    assert torch.allclose(copy.image[0, :-1], template[0, 1:], atol=0.02 * float(template.max()))


def test_voxels_without_data_stay_as_they_are():
    (template, label), (scan, _) = phantom(0), phantom(3)
    one = aligned(scan)
    one.has_data[:, :4] = False
    copy = make_copy(template, label, one, aligned(scan, (STEP, 0.0, 0.0)), STEP)
    assert torch.equal(copy.image[:, :4], scan[:, :4]) and not copy.has_data[:, :4].any()
    assert not torch.equal(copy.image[:, 4:], scan[:, 4:])


def test_what_the_template_does_not_reach_is_as_in_the_scan():
    """The first four rows lie beyond the template, whose border would be repeated there."""
    (template, label), (scan, _) = phantom(0), phantom(3)
    ends = template[:, 4:]
    one = aligned(scan, (-2 * STEP, 0.0, 0.0))
    copy = make_copy(ends, label[:, 4:], one, aligned(scan, (-2 * STEP, STEP, 0.0)), STEP)
    assert torch.equal(copy.image[:, :4], scan[:, :4]) and not torch.equal(copy.image[:, 4:], scan[:, 4:])
    assert copy.label.argmax(0)[:4].max() == 0


def test_contrast_is_that_of_the_scan():
    values = np.random.RandomState(0).rand(5000)
    assert np.abs(matched(values, 3 * values + 7, values) - (3 * values + 7)).max() < 0.01
    assert np.isfinite(matched(np.zeros(10), np.ones(10), np.zeros(10))).all()


class Records:
    """The frames of aligned scans."""

    def __init__(self, frames):
        self.frames = frames

    def has(self, name, key):
        return self.frames[name] is not None

    def load(self, name, keys):
        return [self.frames[name]]


def test_copies_are_spread_over_scans_in_their_own_pose():
    frames = {f"s{i}": "world" for i in range(9)} | {"turned": "turned by 3", "failed": None, "oblique": "stored"}
    found = plans(Records(frames), list(frames), 4)
    assert [plan.name for plan in found] == ["copy_1", "copy_2", "copy_3", "copy_4"]
    assert [plan.one for plan in found] == ["s0", "s3", "s6", "oblique"]
    assert all(plan.one != plan.other for plan in found)
    assert len(plans(Records(frames), list(frames), 40)) == 10 and plans(Records({}), [], 4) == []
