"""Thick slices: the working spacing, strides and patch by hand, poses in the plane; many classes part by part."""

import nibabel
import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from monai.transforms import RandAffined

from semisam_o1.data.grids import (
    Grid,
    choose_patch,
    choose_spacing,
    choose_strides,
    choose_train_spacing,
    frame_of,
    in_plane,
    slabs,
    straightened,
    tilt,
    to_grid,
    working_shape,
)
from semisam_o1.data.phantoms import grid_affine
from semisam_o1.data.transforms import image_chain, label_chain, random_poses
from semisam_o1.networks import UNet3D
from semisam_o1.types import Case
from tests.jobs import cohort_of

HEART = (1.5, 1.5, 10.0), (216, 256, 10)  # 324 x 384 x 100 mm
STRIDES = [[2, 2, 1], [2, 2, 1], [2, 2, 2]]


def grid(sizes, shape, axcodes="RAS", turn=(0, 0, 0)):
    return Grid(grid_affine(shape, sizes, axcodes, turn), shape)


@pytest.mark.parametrize(
    ("sizes", "shape", "voxels", "spacing", "patch"),
    [
        (1.0, (183, 140, 88), 200_000, 2.2422, [88, 64, 40]),  # left atrium
        (1.0, (183, 140, 88), 2_000_000, 1.0407, [104, 104, 88]),
        (1.0, (35, 50, 30), 200_000, 1.0, [40, 56, 32]),  # hippocampus
        ((1.25, 1.25, 7.7), (256, 251, 36), 200_000, 5.182, [64, 64, 56]),  # abdomen: 7.7 is 1.49 times 5.182
        (0.15, (75, 123, 50), 200_000, 0.19818, [64, 96, 40]),  # mouse brain
    ],
)
def test_scans_of_nearly_even_voxels_are_worked_on_as_before(sizes, shape, voxels, spacing, patch):
    grids = [grid(sizes, shape)]
    assert choose_train_spacing(grids, voxels) == choose_spacing(grids, voxels) == spacing
    assert choose_patch(grids, spacing, 260_000 if voxels == 200_000 else 1_000_000) == patch
    assert choose_strides(grids, spacing) == [2, 2, 2] and choose_strides(grids, None, 4) == [2] * 4


def test_slices_keep_their_thickness_and_the_plane_gets_the_voxels():
    """By hand: 200,000 voxels in slices of 10 mm have sqrt(12,441,600 / (200,000 x 10)) = 2.494 mm in the plane."""
    assert choose_train_spacing([grid(*HEART)], 200_000) == [2.4942, 2.4942, 10.0]
    assert choose_spacing([grid(*HEART)], 200_000) == 3.9623  # of the features


def test_no_axis_is_finer_than_stored():
    assert choose_train_spacing([grid(*HEART)], 10**8) == [1.5, 1.5, 10.0]
    assert choose_train_spacing([grid((1.0, 2.0, 10.0), (100, 50, 10))], 10**8) == [1.0, 2.0, 10.0]


def test_the_spacing_follows_ras_and_not_the_stored_axes():
    sagittal = grid((1.5, 10.0, 1.5), (216, 10, 256), "SLA")  # slices along R
    assert choose_train_spacing([sagittal], 200_000) == [10.0, 2.4942, 2.4942]
    assert choose_patch([sagittal], [10.0, 2.4942, 2.4942], 260_000) == [10, 160, 136]


def test_two_coarse_axes_are_kept():
    """8,000 voxels of 512,000 mm3 are 4 mm, and 8 mm is more than 1.5 times as much; 8 x 8 mm leave 1 mm."""
    assert choose_train_spacing([grid((1.0, 8.0, 8.0), (80, 10, 10))], 8_000) == [1.0, 8.0, 8.0]


def test_the_median_template_decides():
    grids = [grid(*HEART), grid(*HEART), grid(1.5, (216, 256, 66))]
    assert np.shape(choose_train_spacing(grids, 200_000)) == (3,)
    assert np.shape(choose_train_spacing([*grids[1:], grids[2]], 200_000)) == ()


def test_the_tilt_of_a_grid_by_hand():
    assert tilt(grid(1.0, (9, 9, 9), "SLA")) == tilt(grid((1, 2, 6), (9, 9, 9), turn=(90, 0, 0))) == 0
    assert tilt(grid((1, 2, 6), (9, 9, 9), "LSA", (20, 0, 0))) == pytest.approx(20)
    assert tilt(grid((1, 2, 6), (9, 9, 9), turn=(60, 0, 0))) == pytest.approx(30)  # nearest to the other axis


def test_a_straightened_grid_has_the_same_voxels():
    tilted, plain = grid((1, 2, 6), (9, 8, 7), "LSA", (20, 5, 0)), grid((1, 2, 6), (9, 8, 7), "LSA")
    np.testing.assert_allclose(straightened(tilted).affine[:3, :3], plain.affine[:3, :3], atol=1e-9)
    assert straightened(tilted).shape == (9, 8, 7)


def test_slices_that_lie_oblique_are_kept_along_their_own_axes():
    for angle in (5, 20):
        tilted = grid(*HEART, turn=(angle, 0, 0))
        spacing = choose_train_spacing([tilted], 200_000)
        assert spacing == [2.4942, 2.4942, 10.0] and frame_of(spacing) == "stored"
        assert choose_patch([tilted], spacing, 260_000) == [136, 160, 10]
    assert choose_train_spacing([grid(*HEART, turn=(45, 0, 0))], 200_000) == 3.9623
    assert choose_train_spacing([grid(*HEART), grid(*HEART, turn=(35, 0, 0))], 200_000) == 3.9623
    assert frame_of(3.9623) == frame_of(None) == "world"


def test_oblique_slices_go_through_the_chain_unmixed(tmp_path):
    """Each slice has one value. Along its own axes it keeps it, for image and label."""
    shape = (31, 27, 6)
    values = np.broadcast_to(np.arange(6), shape).astype(np.int16)
    for axcodes, name in (("RAS", "a"), ("PSL", "b")):
        stored = values if axcodes == "RAS" else values.transpose(1, 2, 0)[:, :, ::-1]  # slices along S
        sizes = (1.0, 1.0, 5.0) if axcodes == "RAS" else (1.0, 5.0, 1.0)
        own = grid(sizes, stored.shape, axcodes, (20, 5, 0))
        nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(stored), own.affine), tmp_path / f"{name}.nii")
        case = Case(name, tmp_path / f"{name}.nii", tmp_path / f"{name}.nii", "template")
        cohort = cohort_of([case], classes=6, find_no_data=False)
        image = image_chain([2.0, 2.0, 5.0], intensities=None, find_no_data=False)(case.item())["image"]
        label = label_chain([2.0, 2.0, 5.0], cohort)(case.item())["label"]
        assert image.shape[1:] == label.shape[1:] == tuple(working_shape(own, [2.0, 2.0, 5.0])) == (16, 14, 6)
        for volume in (image[0], label.argmax(0)):
            expected = torch.arange(6).float().expand(16, 14, 6)
            torch.testing.assert_close(volume.as_tensor().float(), expected, rtol=0, atol=1e-3)
        np.testing.assert_allclose(image.affine, label.affine, atol=1e-9)


def test_strides_and_patch_by_hand():
    """Voxels 2.49 and 10: 5 after one halving of the plane, then 9.98; then all are alike, and 10 slices give 5."""
    grids, spacing = [grid(*HEART)], [2.4942, 2.4942, 10.0]
    np.testing.assert_array_equal(working_shape(grids[0], spacing), (130, 154, 10))
    assert choose_strides(grids, spacing) == STRIDES
    assert choose_strides(grids, spacing, 4) == [*STRIDES, [2, 2, 1]]  # 5 slices would become 3
    assert choose_patch(grids, spacing, 260_000) == [136, 160, 10]  # multiples of 8, 8 and 2
    assert choose_patch(grids, spacing, 150_000) == [120, 120, 10]  # the longest side goes first


def test_a_short_side_is_not_halved_below_four():
    flat = [grid((1.0, 1.0, 3.0), (64, 64, 3))]
    assert choose_strides(flat, [1.0, 1.0, 3.0]) == [[2, 2, 1]] * 3
    assert choose_patch(flat, [1.0, 1.0, 3.0], 10**6) == [64, 64, 3]
    small = [grid((1.0, 1.0, 3.0), (9, 9, 2))]
    assert choose_strides(small, [1.0, 1.0, 3.0], 2) == [[2, 2, 1], [1, 1, 1]]  # 9, 5; 3 would be too few
    assert choose_patch(small, [1.0, 1.0, 3.0], 10**6, levels=2) == [32, 10, 2]  # one side as long as always


@pytest.mark.parametrize(
    "network",
    [
        lambda: UNet(3, 1, 3, [2, 4, 4, 4], STRIDES, num_res_units=2, norm="INSTANCE"),
        lambda: UNet3D(1, 3, (2, 3, 4, 4, 4), strides=[*STRIDES, [2, 2, 1]]),
    ],
)
def test_networks_take_thin_patches(network):
    with torch.no_grad():
        assert network()(torch.randn(1, 1, 40, 32, 10)).shape == (1, 3, 40, 32, 10)


def test_a_unet_that_pools_nothing_along_an_axis_takes_a_single_slice():
    network = UNet3D(1, 2, (2, 3, 4, 4, 4), strides=[[2, 2, 1]] * 4).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 1, 32, 16, 1)).shape == (1, 2, 32, 16, 1)
        with pytest.raises(ValueError, match="at least 16 x 16 x 1 voxels and one of at least 32 x 32 x 2"):
            network(torch.randn(1, 1, 31, 15, 3))


# Poses


def test_which_axes_turn_in_the_plane():
    assert in_plane(2.0) == in_plane(None) == in_plane([1.0, 1.2, 1.5]) == [True] * 3
    assert in_plane([1.0, 1.0, 4.0]) == [False, False, True]
    assert in_plane([1.0, 2.0, 4.0]) == [False] * 3


def test_poses_of_even_voxels_are_as_before():
    before = RandAffined(
        "image", prob=1.0, rotate_range=[0.3] * 3, shear_range=[0.05] * 6, scale_range=[0.2] * 3,
        translate_range=[5] * 3, mode=["bilinear"], padding_mode="border",
    ).set_random_state(3)  # fmt: skip
    now = random_poses("image", 2.0, prob=1.0, mode=["bilinear"]).set_random_state(3)
    image = torch.rand(1, 12, 13, 14, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        torch.testing.assert_close(now({"image": image})["image"], before({"image": image})["image"], rtol=0, atol=0)


def test_thick_slices_are_not_mixed():
    """Each slice has one value: turned and sheared in the plane, it keeps it."""
    image = torch.arange(6.0).expand(1, 20, 20, 6)
    poses = random_poses("image", [1.0, 1.0, 4.0], prob=1.0, scale=0, shift=0, mode=["bilinear"]).set_random_state(0)
    texture = torch.rand(1, 20, 20, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        torch.testing.assert_close(poses({"image": image})["image"].as_tensor(), image, rtol=0, atol=1e-4)
    assert (poses({"image": texture})["image"] - texture).abs().max() > 0.1
    even = random_poses("image", 1.0, prob=1.0, scale=0, shift=0, mode=["bilinear"]).set_random_state(0)
    assert (even({"image": image})["image"] - image).abs().max() > 1


def test_shifts_are_of_equal_length_in_mm():
    poses = random_poses("image", [2.0, 2.0, 10.0], shift=5, mode=["bilinear"])
    assert list(poses.rand_affine.rand_affine_grid.translate_range) == [5.0, 5.0, 1.0]


# Many classes


def test_parts_cover_a_grid_and_resample_alike():
    source, affine = torch.rand(3, 9, 8, 7, generator=torch.Generator().manual_seed(0)), grid_affine((9, 8, 7), 2.0)
    whole = grid((0.9, 1.1, 1.7), (21, 13, 9), "LAS", (8, -6, 15))
    ((rows, part),) = slabs(whole, 3)
    assert (rows.start, rows.stop, part.shape) == (0, 21, whole.shape)
    np.testing.assert_array_equal(part.affine, whole.affine)
    parts = list(slabs(whole, 2**24 // (13 * 9 * 4)))  # four planes at a time
    assert [(rows.start, rows.stop) for rows, _ in parts] == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 21)]
    found = torch.cat([to_grid(source, affine, part) for _, part in parts], 1)
    torch.testing.assert_close(found, to_grid(source, affine, whole), rtol=0, atol=1e-4)
    assert len(list(slabs(whole, 10**9))) == 21


def test_classes_are_resampled_a_few_at_a_time(tmp_path):
    """300 classes on 40 x 40 x 40 voxels, of which 262 fit at a time: each is what it is alone."""
    label = np.zeros((40, 40, 40), np.uint16)
    label[10:20, 10:20, 10:20], label[20:30, 10:20, 10:20] = 150, 299

    def shares(values, classes):
        for name in ("i", "l"):
            nibabel.save(nibabel.Nifti1Image(values.astype(np.uint16), np.eye(4)), tmp_path / f"{name}.nii")
        case = Case("a", tmp_path / "i.nii", tmp_path / "l.nii", "template")
        return label_chain(2.0, cohort_of([case], classes=classes, find_no_data=False))(case.item())["label"]

    found = shares(label, 300)
    assert found.shape == (300, 20, 20, 20) and found.affine.diagonal().tolist() == [2, 2, 2, 1]
    assert set(found.flatten(1).amax(1).nonzero()[:, 0].tolist()) == {0, 150, 299}
    for number in (150, 299):
        assert torch.equal(found[number].as_tensor(), shares(label == number, 2)[1].as_tensor())
    torch.testing.assert_close(found.sum(0).as_tensor(), torch.ones(20, 20, 20), rtol=0, atol=1e-5)
