"""From file to working space and back: readers, chains, paddings and sizes, against SimpleITK and scipy."""

from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.transforms import Invertd
from scipy.ndimage import gaussian_filter

from semisam_o1.data import ScanReader
from semisam_o1.data.grids import Grid, choose_patch, choose_spacing, to_grid, working_shape
from semisam_o1.data.phantoms import grid_affine, make_phantom, reorient
from semisam_o1.data.transforms import (
    AntiAliasd,
    PublishedPadd,
    chain,
    image_chain,
    keep_largest,
    label_chain,
    largest_component_classes,
)
from semisam_o1.types import Case
from tests.jobs import cohort_of

SHAPE, SIZES, TURN = (18, 20, 12), (2.0, 1.5, 3.0), (8, -6, 15)
OBLIQUE = grid_affine(SHAPE, SIZES, "LPS", TURN)
FLIP = np.diag([-1.0, -1, 1, 1])  # between RAS and ITK's LPS


def save_nifti(path, array, affine):
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return str(path)


def itk_image(array, affine):
    """A SimpleITK image of an array (H, W, D) and its RAS affine."""
    lps = FLIP @ affine
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.asarray(array).transpose(2, 1, 0)))
    image.SetSpacing(sizes.tolist())
    image.SetDirection((lps[:3, :3] / sizes).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def itk_resample(array, affine, grid, outside=np.nan):
    """Linear interpolation of (H, W, D) by SimpleITK on another grid; ``outside`` where there is nothing."""
    reference = itk_image(np.zeros(grid.shape, np.float32), grid.affine)
    moved = sitk.Resample(
        itk_image(np.asarray(array, np.float32), affine),
        reference,
        sitk.Transform(),
        sitk.sitkLinear,
        outside,
    )
    return sitk.GetArrayFromImage(moved).transpose(2, 1, 0)


def chains_of(spacing, reader=None, intensities="percentiles"):
    """item -> item after both chains, for a label of three classes."""

    def work(item):
        case = Case("a", Path(item["image"]), Path(item["label"]), "template")
        parts = [
            image_chain(spacing, reader, intensities),
            label_chain(spacing, cohort_of([case], classes=3, reader=reader)),
        ]
        return chain(parts)(item | {"case": "a"})

    return work


def labels_of(spacing):
    """label file -> what the label chain makes of it, on its own grid."""

    def work(path):
        case = Case("a", Path(path), Path(path), "template")
        return label_chain(spacing, cohort_of([case], classes=3))(case.item())["label"]

    return work


@pytest.fixture(scope="module")
def scan():
    """An oblique, anisotropic scan stored as LPS: image and label (H, W, D)."""
    return make_phantom(4, SHAPE, affine=OBLIQUE)


# To the working space


@pytest.mark.parametrize("axcodes", ["LAS", "LPS", "PSR", "ILA"])
def test_a_flipped_or_permuted_copy_gives_the_same_working_array(tmp_path, scan, axcodes):
    work = chains_of(2.0)
    found = []
    for name, code in (("plain", "RAS"), ("stored", axcodes)):
        item = {}
        for key, array in zip(("image", "label"), scan):
            item[key] = save_nifti(tmp_path / f"{name}_{key}.nii.gz", *reorient(array, OBLIQUE, code))
        found.append(work(item))
    for key in ("image", "label"):
        np.testing.assert_allclose(found[0][key], found[1][key], atol=2e-4)
        np.testing.assert_allclose(found[0][key].affine, found[1][key].affine, atol=1e-4)
        # upright: no axis of the working space leans
        np.testing.assert_allclose(found[1][key].affine[:3, :3], 2 * np.eye(3), atol=1e-6)


def test_spacing_none_keeps_the_stored_grid(tmp_path, scan):
    item = {"image": save_nifti(tmp_path / "i.nii", scan[0], OBLIQUE)}
    item["label"] = save_nifti(tmp_path / "l.nii", scan[1], OBLIQUE)
    found = chains_of(None, intensities=None)(item)
    np.testing.assert_array_equal(found["image"][0], scan[0])
    np.testing.assert_array_equal(found["label"], np.eye(3)[scan[1]].transpose(3, 0, 1, 2))
    for key in item:
        assert found[key].dtype == torch.float32
        np.testing.assert_allclose(found[key].affine, OBLIQUE, atol=1e-5)


def test_the_working_array_is_linear_interpolation(tmp_path, scan):
    item = {"image": save_nifti(tmp_path / "i.nii", scan[0], OBLIQUE)}
    found = image_chain(1.5, intensities=None)(item)["image"]  # no axis coarser: nothing is smoothed
    expected = itk_resample(scan[0], OBLIQUE, Grid(found.affine.numpy(), tuple(found.shape[1:])))
    inside = np.isfinite(expected)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(found[0].numpy()[inside], expected[inside], atol=2e-4 * scan[0].max())


def test_intensities_are_normalised_on_the_stored_voxels(tmp_path, scan):
    image = scan[0].astype(float)
    image[image < 60] = 0
    item = {"image": save_nifti(tmp_path / "i.nii", image.astype(np.float32), OBLIQUE)}
    assert image.min() == 0 < np.percentile(image, 99)

    clipped = np.clip(image, *np.percentile(image, (1, 99.5)))
    expected = (clipped - clipped.mean()) / clipped.std()
    found = image_chain(None, find_no_data=False)(item)["image"][0]
    np.testing.assert_allclose(found, expected, atol=1e-4)

    above = image[image > 0]
    found = image_chain(None, intensities="foreground", find_no_data=False)(item)["image"][0]
    np.testing.assert_allclose(found, (image - above.mean()) / above.std(ddof=1), atol=1e-4)

    np.testing.assert_array_equal(
        image_chain(None, intensities=None, find_no_data=False)(item)["image"][0], image.astype(np.float32)
    )
    with pytest.raises(ValueError, match="intensities 'robust': expected one of percentiles, foreground, None"):
        image_chain(None, intensities="robust")


def test_the_hdf5_key_and_spacing_reach_the_chains(tmp_path):
    image, label = make_phantom(2, (16, 16, 12), 3.0)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"], file["label"], file["t2"] = image, label, image + 1
    item = {"image": str(tmp_path / "a.h5"), "label": str(tmp_path / "a.h5")}
    found = chains_of(3.0, ScanReader("t2", 3.0), None)(item)
    np.testing.assert_allclose(found["image"][0], image + 1, rtol=1e-5)
    np.testing.assert_allclose(found["label"].argmax(0), label)
    np.testing.assert_allclose(found["image"].affine, np.diag([3, 3, 3, 1]))


@pytest.mark.parametrize("spacing", [0.75, 1.35])
@pytest.mark.parametrize("stored", [{}, {"spacing": (0.5, 0.5, 1)}, {"axcodes": "PSR", "turn": TURN}])
def test_labels_sum_to_one_and_keep_their_volumes(tmp_path, spacing, stored):
    sizes = np.broadcast_to(stored.get("spacing", 0.5), 3)
    shape = tuple(int(n) for n in np.array((46, 44, 42)) // sizes)
    affine = grid_affine(shape, sizes, stored.get("axcodes", "RAS"), stored.get("turn", (0, 0, 0)))
    label = make_phantom(1, shape, affine=affine)[1]
    found = labels_of(spacing)(save_nifti(tmp_path / "l.nii", label, affine))
    assert found.shape[0] == 3
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)
    assert found.min() >= 0
    for number in (1, 2):
        volume = float(found[number].sum()) * spacing**3
        assert volume == pytest.approx((label == number).sum() * sizes.prod(), rel=0.01)


# Back to the stored grid


def test_a_result_returns_by_its_affine(tmp_path, scan):
    path = save_nifti(tmp_path / "l.nii", scan[1], OBLIQUE)
    working = labels_of(1.5)(path)
    grid = ScanReader().grid(path)
    found = to_grid(working, working.affine, grid)
    assert type(found) is torch.Tensor and found.shape == (3, *SHAPE)
    for number in range(3):
        expected = itk_resample(working[number], working.affine.numpy(), grid)
        inside = np.isfinite(expected)
        assert inside.mean() > 0.9
        np.testing.assert_allclose(found[number].numpy()[inside], expected[inside], atol=2e-4)
    mistaken = found.argmax(0).numpy() != scan[1]
    assert mistaken.mean() < 0.03  # of two interpolations


def test_a_result_returns_the_same_from_a_plain_tensor_and_by_nearest(scan):
    coarse = grid_affine((12, 12, 12), 3.0)
    volume = torch.rand(2, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    grid = Grid(OBLIQUE, SHAPE)
    plain = to_grid(volume, coarse, grid)
    # whatever affine the volume itself claims, the one given counts
    np.testing.assert_array_equal(to_grid(MetaTensor(volume, affine=np.eye(4)), coarse, grid), plain)
    assert set(to_grid(volume, coarse, grid, "nearest", "border").unique().tolist()) <= set(volume.unique().tolist())
    np.testing.assert_allclose(to_grid(volume, coarse, Grid(coarse, (12, 12, 12))), volume, atol=1e-5)


# Smoothing, padding and sizes


def test_antialiasing_has_the_stated_width():
    image = torch.zeros(1, 31, 31, 31)
    image[0, 15, 15, 15] = 1
    item = {"image": MetaTensor(image, affine=np.diag([1.0, 2, 4, 1]))}
    found = AntiAliasd("image", 4.0)(item)["image"]
    assert image.sum() == 1 and torch.equal(item["image"].as_tensor(), image)  # the item itself is left alone
    # ratios 4, 2 and 1: deviations 1.5, 0.5 and none
    np.testing.assert_allclose(found[0], gaussian_filter(image[0].numpy(), (1.5, 0.5, 0), truncate=3), atol=1e-7)
    np.testing.assert_allclose(found.affine, np.diag([1.0, 2, 4, 1]))
    place = np.arange(31) - 15.0
    widths = [float((found[0].sum(axes).numpy() * place**2).sum()) ** 0.5 for axes in ((1, 2), (0, 2), (0, 1))]
    np.testing.assert_allclose(widths, (1.5, 0.5, 0), atol=0.05)


@pytest.mark.parametrize("spacing", [1.0, 0.5])
def test_antialiasing_leaves_what_is_not_made_coarser(spacing):
    image = MetaTensor(torch.rand(2, 6, 6, 6), affine=np.eye(4))
    np.testing.assert_array_equal(AntiAliasd("image", spacing)({"image": image})["image"], image)


@pytest.mark.parametrize(
    "sides, pads",
    [
        ((16, 20, 30), (3, 1, 0)),  # 0 div 2 + 3, -4 div 2 + 3, -14 div 2 + 3 < 0
        ((11, 17, 16), (5, 2, 3)),  # 5 div 2 + 3, -1 div 2 + 3 (the floor, as Python divides), 3
        ((4, 4, 40), (9, 9, 0)),
        ((17, 20, 30), (0, 0, 0)),  # no side at most 16
    ],
)
def test_published_padding(sides, pads):
    generator = torch.Generator().manual_seed(0)
    item = {"image": torch.rand(1, *sides, generator=generator) + 1, "label": torch.ones(3, *sides)}
    found = PublishedPadd(["image", "label"], (16, 16, 16))(item)
    for key in item:
        expected = np.pad(item[key].numpy(), [(0, 0), *((n, n) for n in pads)])
        np.testing.assert_array_equal(found[key], expected)


def test_working_shape_is_what_the_chain_gives(tmp_path):
    for shape, affine in (
        (SHAPE, OBLIQUE),
        ((20, 17, 9), grid_affine((20, 17, 9), (1, 2, 3), "PSR")),
        ((16, 16, 12), grid_affine((16, 16, 12), 2.0, "ILA", (3, 20, -10))),
    ):
        path = save_nifti(tmp_path / "i.nii", np.zeros(shape, np.float32), affine)
        for spacing in (1.7, 2.6):
            found = image_chain(spacing, intensities=None)({"image": path})["image"]
            np.testing.assert_array_equal(working_shape(ScanReader().grid(path), spacing), found.shape[1:])


def test_the_patch_is_the_median_scan_shortened_until_it_fits():
    grids = [Grid(grid_affine(s, 1.0), s) for s in ((100, 80, 60), (98, 79, 58), (400, 90, 61))]
    assert choose_patch(grids, 1.0, 10**6) == [104, 80, 64]
    # 104 80 64 -> 96 .. -> 72 80 64 -> 72 72 64 -> 64 72 64, the first of 294,912 voxels or fewer
    assert choose_patch(grids, 1.0, 300_000) == [64, 72, 64]
    assert choose_patch(grids, 1.0, 300_000, levels=4) == [64, 64, 64]
    assert choose_patch(grids, 2.0, 10**6) == [56, 40, 32]


def test_the_patch_follows_ras_and_not_the_stored_axes():
    shape = (60, 100, 80)  # stored A S R
    assert choose_patch([Grid(grid_affine(shape, 1.0, "ASR"), shape)], 1.0, 10**6) == [80, 64, 104]


def test_the_working_spacing_by_hand():
    grids = [Grid(np.diag([*s, 1.0]), n) for s, n in (((1, 1, 2), (80, 100, 50)), ((1, 1, 1), (200, 200, 200)))]
    grids.append(Grid(np.diag([0.5, 0.5, 1, 1]), (40, 40, 40)))
    # fields of view 800,000, 8,000,000 and 16,000 mm3: the median over 100,000 voxels is 8 mm3 each
    assert choose_spacing(grids, 100_000) == pytest.approx(2.0)
    assert choose_spacing(grids, 10**9) == pytest.approx(1.0)  # the median of the finest sides


@pytest.mark.parametrize("unit", [0.05, 1.0, 1000.0])
def test_the_working_spacing_scales_with_the_unit_of_spacing(unit):
    grids = [Grid(np.diag([0.9 * unit, 0.9 * unit, 2.3 * unit, 1]), (200, 190, 60))]
    chosen = choose_spacing(grids, 100_000) / unit
    assert chosen == pytest.approx((0.9 * 0.9 * 2.3 * 200 * 190 * 60 / 100_000) ** (1 / 3), rel=1e-3)
    # so the same voxels are worked on
    one = Grid(np.diag([0.9, 0.9, 2.3, 1]), (200, 190, 60))
    same = working_shape(one, choose_spacing([one], 100_000))
    np.testing.assert_allclose(working_shape(grids[0], chosen * unit), same, atol=1)


def test_the_working_spacing_of_scans_in_metres():
    grid = Grid(np.diag([0.00045, 0.00045, 0.00045, 1]), (200, 190, 60))
    assert choose_spacing([grid], 10**9) == pytest.approx(0.00045, rel=0.01)


def test_the_network_takes_any_patch_that_is_chosen():
    from semisam_o1.networks.unet3d import UNet3D

    patch = choose_patch([Grid(np.eye(4), (15, 15, 15))], 1.0, 10**6)
    with torch.no_grad():
        UNet3D(1, 2, features=(2,) * 5)(torch.zeros(1, 1, *patch))


def test_published_padding_moves_the_affine():
    image = MetaTensor(torch.ones(1, 10, 16, 16), affine=np.diag([2.0, 1, 1, 1]))
    found = PublishedPadd("image", (16, 16, 16))({"image": image})["image"]
    np.testing.assert_allclose(found.affine[:3, 3], (-2.0 * 6, -3, -3))


def test_the_largest_piece_of_a_class_is_kept():
    label = torch.zeros(1, 9, 4, 4)
    label[0, :4, :2], label[0, 6:8, :2], label[0, 5:, 3] = 1, 1, 2
    kept = label.clone()
    kept[0, 6:8, :2] = 0
    before = label.clone()
    assert keep_largest(label, [1, 2]).equal(kept) and keep_largest(label, [2]).equal(before)
    assert label.equal(before)
    assert keep_largest(label, []) is label


def test_which_classes_are_one_piece():
    whole, torn = torch.zeros(1, 9, 4, 4), torch.zeros(1, 9, 4, 4)
    whole[0, :4, :2], whole[0, 5:, 3] = 1, 2
    torn[0, :4, :2], torn[0, 6:8, :2] = 1, 1
    assert largest_component_classes([whole], 4) == [1, 2]  # the third class is nowhere
    assert largest_component_classes([whole, torn], 4) == [2]


@pytest.mark.parametrize("intensities", ["percentiles", "foreground", None])
@pytest.mark.parametrize("beside", [{}, {"image_path": "scan.nii"}])
def test_the_chain_can_be_inverted_where_it_has_smoothed(tmp_path, intensities, beside):
    """As MONAI Label does it: `Invertd` over an item that carries a text beside the image."""
    affine = np.diag([0.8, 1.0, 2.2, 1.0])
    image = np.random.default_rng(0).normal(size=(20, 18, 12)).astype(np.float32)
    path = save_nifti(tmp_path / "scan.nii", image, affine)
    preprocessing = image_chain(2.0, intensities=intensities)
    item = preprocessing({"image": path, **beside})
    assert all(item[key] == value for key, value in beside.items())
    item["pred"] = MetaTensor(torch.ones_like(item["image"].as_tensor()), meta=item["image"].meta)
    found = Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False)(item)["pred"]
    assert found.shape == (1, 20, 18, 12)
    np.testing.assert_allclose(found.affine, affine, atol=1e-6)
    np.testing.assert_allclose(found, 1, atol=1e-5)
