"""Phantoms: one anatomy on every grid, deterministic, and neither trivial nor hopeless to segment."""

import itertools
import json

import nibabel
import numpy as np
import pytest

from semisam_o1.data.phantoms import grid_affine, make_phantom, reorient, write_demo_data
from semisam_o1.types import DatasetError, UserError


def dice(one, other):
    return 2 * np.sum(one & other) / (one.sum() + other.sum())


def test_types_and_classes():
    image, label = make_phantom(3, (20, 22, 24), 2.0)
    assert image.shape == label.shape == (20, 22, 24)
    assert (image.dtype, label.dtype) == (np.float32, np.uint8)
    assert set(np.unique(label)) == {0, 1, 2}


def test_two_classes_are_the_first_organ_alone():
    three, two = (make_phantom(3, (24, 24, 20), 2.0, num_classes=n)[1] for n in (3, 2))
    np.testing.assert_array_equal(two, three == 1)
    with pytest.raises(ValueError, match="not 4"):
        make_phantom(3, num_classes=4)


def test_the_same_seed_gives_the_same_case_and_another_seed_another():
    first, again, other = (make_phantom(seed, (16, 16, 16), 3.0) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[1], other[1])


@pytest.mark.parametrize("axcodes", ["LAS", "LPS", "PSR", "ILA"])
def test_another_orientation_is_the_same_case_stored_otherwise(axcodes):
    shape, affine = (20, 16, 12), grid_affine((20, 16, 12), 2.5)
    image, label = make_phantom(5, shape, affine=affine, noise=0)
    flipped, flipped_affine = reorient(image, affine, axcodes)
    assert "".join(nibabel.aff2axcodes(flipped_affine)) == axcodes
    sampled, sampled_label = make_phantom(5, flipped.shape, affine=flipped_affine, noise=0)
    np.testing.assert_allclose(sampled, flipped, rtol=1e-5)
    np.testing.assert_array_equal(sampled_label, reorient(label, affine, axcodes)[0])


def test_grid_affine_is_centred_and_oriented():
    affine = grid_affine((10, 20, 30), (1, 2, 3), "PSR")
    assert nibabel.aff2axcodes(affine) == ("P", "S", "R")
    np.testing.assert_allclose(nibabel.affines.voxel_sizes(affine), (1, 2, 3))
    np.testing.assert_allclose(nibabel.affines.apply_affine(affine, (4.5, 9.5, 14.5)), 0, atol=1e-9)


@pytest.mark.parametrize("sizes, turn", [((1, 1, 3), (0, 0, 0)), ((1, 1, 1), (0, 0, 20)), ((2, 1, 1), (9, 5, -8))])
def test_an_organ_has_the_same_volume_and_place_on_every_grid(sizes, turn):
    def measure(shape, affine):
        label = make_phantom(4, shape, affine=affine)[1]
        voxels = np.argwhere(label == 1)
        volume = len(voxels) * abs(np.linalg.det(affine[:3, :3]))
        return volume, nibabel.affines.apply_affine(affine, voxels).mean(0)

    plain = measure((48, 48, 40), grid_affine((48, 48, 40)))
    shape = tuple(int(56 / size) for size in sizes)
    other = measure(shape, grid_affine(shape, sizes, turn=turn))
    assert other[0] == pytest.approx(plain[0], rel=0.05)
    np.testing.assert_allclose(other[1], plain[1], atol=0.3)


def test_copying_one_case_to_another_is_a_fair_start():
    labels = [make_phantom(seed)[1] for seed in range(8)]
    overlaps = [dice(a == k, b == k) for a, b in itertools.combinations(labels, 2) for k in (1, 2)]
    assert 0.6 < np.mean(overlaps) < 0.75


def test_no_threshold_finds_an_organ():
    image, label = make_phantom(0)
    levels = np.percentile(image, np.linspace(50, 100, 26))
    for k in (1, 2):
        bands = itertools.combinations(levels, 2)
        assert max(dice((image >= low) & (image <= high), label == k) for low, high in bands) < 0.6


def test_demo_data_on_disk(tmp_path):
    out = write_demo_data(tmp_path / "demo", cases=12, shape=(12, 12, 10), spacing=4.0)
    lists = {name: (out / f"{name}.txt").read_text().split() for name in ("train", "val", "test")}
    assert [len(names) for names in lists.values()] == [8, 1, 3]
    assert len(set(itertools.chain(*lists.values()))) == 12
    assert json.loads((out / "classes.json").read_text()).keys() == {"1", "2"}
    axcodes, oblique, thick = set(), 0, 0
    for name in itertools.chain(*lists.values()):
        image, label = (nibabel.load(out / folder / f"{name}.nii.gz") for folder in ("images", "labels"))
        assert image.shape == label.shape
        np.testing.assert_array_equal(image.affine, label.affine)
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
        assert image.header.get_xyzt_units()[0] == "mm"
        assert set(np.unique(label.dataobj)) <= {0, 1, 2}
        axcodes.add("".join(nibabel.aff2axcodes(image.affine)))
        oblique += nibabel.affines.obliquity(image.affine).max() > 0.05
        sizes = nibabel.affines.voxel_sizes(image.affine)
        thick += sizes.max() > 1.5 * sizes.min()
    assert {"RAS", "LAS", "LPS"} <= axcodes and oblique and thick


def test_demo_data_is_the_same_each_time_and_replaces_only_phantoms(tmp_path):
    def voxels():
        return np.stack([nibabel.load(p).get_fdata() for p in sorted((tmp_path / "images").iterdir())[:2]])

    write_demo_data(tmp_path, cases=4, shape=(12, 12, 10), spacing=4.0)
    first = voxels()
    write_demo_data(tmp_path, cases=3, shape=(12, 12, 10), spacing=4.0)
    np.testing.assert_array_equal(voxels(), first)
    assert len(list((tmp_path / "images").iterdir())) == 3
    (tmp_path / "images" / "mine.nii.gz").touch()
    with pytest.raises(UserError, match=r"demo-data would replace files that it did not write: .*mine\.nii\.gz"):
        write_demo_data(tmp_path, cases=3)


def test_too_few_demo_cases(tmp_path):
    with pytest.raises(DatasetError, match="at least 3"):
        write_demo_data(tmp_path, cases=2)
