"""Padding and air of one value: found, left out of intensities and features, and given to nobody as tissue."""

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Invertd, Orientation, Spacing
from scipy.ndimage import zoom

from semisam_o1.data.checks import find_problems
from semisam_o1.data.class_sizes import small_classes
from semisam_o1.data.grids import Grid, cropped, to_grid
from semisam_o1.data.no_data import data_box, no_data
from semisam_o1.data.transforms import image_chain, label_chain
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.features import TokenInferer, image_and_mask
from semisam_o1.types import Case, UserError
from tests.jobs import cohort_of

SHAPE, WIDTHS = (20, 18, 16), ((3, 0), (5, 2), (0, 4))
INSIDE = (slice(3, 23), slice(5, 23), slice(0, 16))  # of the padded scan
AFFINE = np.array([[-2.0, 0, 0, 30], [0, 1.5, 0, -9], [0, 0, 2.5, 4], [0, 0, 0, 1]])


def tissue(seed=0, shape=SHAPE, low=-1000):
    """Integers from ``low`` upwards, smooth in space with noise, as a CT has."""
    draw = np.random.default_rng(seed)
    smooth = zoom(draw.normal(size=(5, 5, 5)), np.array(shape) / 5, order=3, grid_mode=True, mode="nearest")
    return np.rint(low + 700 + 300 * smooth + draw.normal(size=shape) * 20).clip(low).astype(np.float32)


def padded(scan, value):
    return np.pad(scan, WIDTHS, constant_values=value)


def saved(path, array, affine=AFFINE):
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


@pytest.mark.parametrize("value", [-3000, -1000, 0], ids=["far below", "air", "amid the tissue"])
def test_a_constant_border_is_no_data_and_the_same_value_inside_is(value):
    scan = tissue()
    scan[9, 9, 8] = value if value > -3000 else -500
    mask = no_data(padded(scan, value))
    assert data_box(mask) == INSIDE
    expected = np.ones(mask.shape, bool)
    expected[INSIDE] = False
    wrong = mask != expected
    assert wrong[INSIDE].sum() <= (scan == value).sum() and not mask[INSIDE][9, 9, 8]
    wrong[INSIDE] = False
    assert not wrong.any()


@pytest.mark.parametrize("value", [-2000, -1000])
def test_the_outside_of_a_circular_field_of_view_is_no_data(value):
    scan = tissue(shape=(40, 40, 6)) + 1  # no voxel of the value of air inside
    x, y = np.meshgrid(np.arange(40) - 19.5, np.arange(40) - 19.5, indexing="ij")
    outside = np.broadcast_to((np.hypot(x, y) > 19)[..., None], scan.shape)
    mask = no_data(np.where(outside, value, scan))
    assert (mask & ~outside).sum() == 0 and (mask & outside).sum() > 0.9 * outside.sum()
    if value == -2000:
        np.testing.assert_array_equal(mask, outside)


def test_lungs_that_end_at_a_face_are_data():
    """A scan clipped to a window: lungs and the air around the body have its lowest value."""
    x, y, _ = np.indices((40, 40, 20))
    scan = np.random.default_rng(0).uniform(-190, 300, (40, 40, 20))
    air = np.hypot(x - 19.5, y - 19.5) > 18
    lungs = (np.hypot(x - 12, y - 20) < 5) | (np.hypot(x - 27, y - 20) < 5)
    lungs[:, :, :8] = False  # they reach the last slice
    scan[air | lungs] = -200
    found = no_data(scan)
    assert found[air].mean() > 0.95 and not found[lungs].any()


def test_two_values_of_padding_are_both_found():
    scan = np.pad(padded(tissue(), -2000), 2, constant_values=-3024)
    mask = no_data(scan)
    assert mask.sum() == scan.size - np.prod(SHAPE)


def test_slices_of_one_value_at_the_ends_are_no_data():
    scan = tissue()
    scan[:, :, -1] = scan[0] = 0
    assert data_box(no_data(scan)) == (slice(1, 20), slice(0, 18), slice(0, 15))


@pytest.mark.parametrize("name", ["noise", "few voxels", "saturated", "constant but for a spot"])
def test_scans_without_padding_have_none(name):
    scan = tissue()
    if name == "few voxels":
        scan[:2, :2, :2] = -3000
    if name == "saturated":
        scan[-4:] = scan.max()
    if name == "constant but for a spot":
        scan = np.zeros(SHAPE, np.float32)
        scan[5:7, 5:7, 5:7] = 1
    assert no_data(scan) is None
    assert data_box(None, SHAPE) == tuple(slice(0, n) for n in SHAPE)


@pytest.mark.parametrize("intensities", ["percentiles", "foreground", None])
@pytest.mark.parametrize("spacing", [None, 2.0])
def test_a_padded_scan_reaches_the_network_as_the_plain_one(tmp_path, intensities, spacing):
    plain, wide = saved(tmp_path / "a.nii.gz", tissue()), np.array(AFFINE)
    wide[:3, 3] -= AFFINE[:3, :3] @ [before for before, _ in WIDTHS]
    more = saved(tmp_path / "b.nii.gz", padded(tissue(), -3000), wide)
    one, other = (
        image_chain(spacing, intensities=intensities)({"image": str(path)})["image"] for path in (plain, more)
    )
    torch.testing.assert_close(one.as_tensor(), other.as_tensor(), rtol=0, atol=0)
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-5)
    kept = image_chain(spacing, intensities=intensities, find_no_data=False)({"image": str(more)})["image"]
    assert kept.shape != one.shape


def test_inside_the_box_it_gets_the_lowest_value_and_counts_for_no_percentile(tmp_path):
    scan = tissue(shape=(40, 40, 6))
    x, y = np.meshgrid(np.arange(40) - 19.5, np.arange(40) - 19.5, indexing="ij")
    held = np.broadcast_to((np.hypot(x, y) < 19.4)[..., None], scan.shape)
    path = saved(tmp_path / "a.nii.gz", np.where(held, scan, -3000))
    found = image_chain(None)({"image": str(path)})["image"][0].numpy()
    held, scan = held[1:39, 1:39], scan[1:39, 1:39]  # the box of the data
    low, high = np.percentile(scan[held], [1, 99.5])
    clipped = scan.clip(low, high)
    expected = (clipped - clipped[held].mean()) / clipped[held].std()
    np.testing.assert_allclose(found[held], expected[held], atol=1e-3)
    np.testing.assert_allclose(found[~held], found[held].min())


def test_a_window_replaces_the_percentiles(tmp_path):
    scan = tissue()
    path = saved(tmp_path / "a.nii.gz", scan)
    clipped = scan.clip(-400, -100)
    found = image_chain(None, window=(-400, -100))({"image": str(path)})["image"][0].numpy()
    np.testing.assert_allclose(found, (clipped - clipped.mean()) / clipped.std(), atol=1e-4)
    stored = image_chain(None, intensities=None, window=[-400, -100])({"image": str(path)})["image"][0].numpy()
    np.testing.assert_array_equal(stored, clipped)
    with pytest.raises(UserError, match=r"\[5, 5\]: expected the lowest intensity first"):
        image_chain(None, window=[5, 5])


def test_a_label_is_cropped_as_its_scan_is(tmp_path):
    image = saved(tmp_path / "a.nii.gz", padded(tissue(), -3000))
    label = np.zeros(SHAPE, np.uint8)
    label[4:12, 5:13, 6:11] = 1
    case = Case("a", image, saved(tmp_path / "l.nii.gz", padded(label, 0)), "template")
    cohort = cohort_of([case])
    scan = image_chain(2.0)(case.item())["image"]
    found = label_chain(2.0, cohort)(case.item())["label"]
    assert found.shape[1:] == scan.shape[1:] and torch.equal(found.affine, scan.affine)
    assert cohort.template_grids[0].shape == SHAPE
    whole = cohort_of([case], find_no_data=False)
    assert whole.template_grids[0].shape == padded(label, 0).shape


def test_results_are_background_where_there_is_no_data():
    grid = Grid(AFFINE, (23, 25, 20))
    inner = cropped(grid, INSIDE)
    shares = torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE)])
    label = to_grid(shares, inner.affine, grid).argmax(0).numpy()
    expected = np.zeros(grid.shape, int)
    expected[INSIDE] = 1
    np.testing.assert_array_equal(label, expected)


def test_the_voxels_at_the_border_of_a_coarser_volume_are_no_background():
    """Every spacing leaves voxels beyond the centres of the outermost working voxels."""
    for spacing in np.linspace(1.5, 9, 16):
        scan = MetaTensor(torch.ones(1, *SHAPE), affine=torch.as_tensor(AFFINE))
        coarse = Spacing(spacing, diagonal=True)(Orientation("RAS", labels=None)(scan))
        shares = torch.cat([torch.zeros_like(coarse), torch.ones_like(coarse)])
        assert to_grid(shares, np.asarray(coarse.affine), Grid(AFFINE, SHAPE)).argmax(0).all(), spacing


def test_invertd_returns_to_the_padded_scan(tmp_path):
    image = saved(tmp_path / "a.nii.gz", padded(tissue(), -3000))
    chain = image_chain(2.0)
    item = chain({"image": str(image)})
    item["pred"] = torch.ones_like(item["image"])
    found = Invertd("pred", chain, orig_keys="image", nearest_interp=False)(item)["pred"][0].numpy()
    np.testing.assert_allclose(found[INSIDE], 1, atol=1e-3)
    found[INSIDE] = 0
    assert found.shape == padded(tissue(), 0).shape and not found.any()


def test_the_scale_of_mind_is_that_of_the_tissue():
    """Tokens inside the data are those of a scan that ends there; half of this one has hardly any noise."""
    scan = torch.from_numpy(tissue(shape=(32, 32, 32)))[None, None] / 300
    scan[:, :, 16:] = 0.01 * scan[:, :, 16:]
    wide = torch.nn.functional.pad(scan, (16,) * 6, value=float(scan.min()))
    held = torch.nn.functional.pad(torch.ones_like(scan), (16,) * 6)
    inferer, encoder = TokenInferer(), mind(dilations=[1], boxes=[])
    expected, found, ignorant = (
        inferer(scan, encoder), inferer(wide, encoder, has_data=held)[..., 16:-16, 16:-16, 16:-16],
        inferer(wide, encoder)[..., 16:-16, 16:-16, 16:-16],
    )  # fmt: skip
    error, worse = ((tokens - expected)[..., 4:-4, 4:-4, 4:-4].abs().mean() for tokens in (found, ignorant))
    assert error < 0.2 * worse


def test_features_take_the_mask_of_the_data(tmp_path):
    image = saved(tmp_path / "a.nii.gz", padded(tissue(), -3000))
    batch = image_chain(2.0, keep_mask=True)({"image": str(image)})
    batch = {key: value[None] for key, value in batch.items()}
    scan, label, arguments, named = image_and_mask(batch)
    assert label is None and arguments == () and named["has_data"].shape == scan.shape and named["has_data"].all()


def test_it_is_said_in_how_many_scans_it_was_found(tmp_path):
    cases = [
        Case("t", saved(tmp_path / "t.nii.gz", padded(tissue(), -3000)), None, "pool"),
        Case("a", saved(tmp_path / "a.nii.gz", tissue(1)), None, "pool"),
    ]
    share = 1 - np.prod(SHAPE) / padded(tissue(), 0).size
    (note,) = find_problems(cases).problems
    assert (note.case, note.severity) == ("scans", "note")
    assert note.found == f"padding or air of one value in 1 of 2 scans (t): {share:.0%} of their voxels"
    assert find_problems(cases, find_no_data=False).problems == []


def test_an_outline_on_padding_is_a_warning(tmp_path):
    image = saved(tmp_path / "t.nii.gz", padded(tissue(), -3000))
    label = np.zeros(padded(tissue(), 0).shape, np.uint8)
    label[:, 10:20, 4:10] = 1  # three of 23 lie on padding
    case = Case("t", image, saved(tmp_path / "l.nii.gz", label), "template")
    found = {problem.found: problem.severity for problem in find_problems([case]).problems}
    assert found["label: 13% of the outline lies on padding or air of one value"] == "warning"


def test_a_class_smaller_than_a_token_is_said(tmp_path):
    label = np.zeros((24, 24, 24), np.uint8)
    label[4:20, 4:20, 4:20], label[12:14, 12:14, 12:14] = 1, 2
    image = saved(tmp_path / "t.nii.gz", tissue(shape=(24, 24, 24)), np.eye(4))
    case = Case("t", image, saved(tmp_path / "l.nii.gz", label, np.eye(4)), "template")
    cohort = cohort_of([case], classes={0: "background", 1: "large", 2: "small"})
    _, found = small_classes(cohort, 8.0)
    assert (found.case, found.severity) == ("t", "warning")
    assert found.found.startswith("label: small (8 voxels, 0.0") and found.found.endswith("fills no token of 8 mm")
    assert small_classes(cohort, 1.0) == []
