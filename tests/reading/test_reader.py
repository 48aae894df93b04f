"""`ScanReader` on every format: the same voxels in the same place, for our transform and for MONAI's."""

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.transforms import LoadImaged

from semisam_o1.data import ScanReader
from semisam_o1.data.reader import LoadScand
from semisam_o1.types import DatasetError
from tests.data.test_transforms import OBLIQUE, SHAPE, SIZES, itk_image, save_nifti, scan  # noqa: F401 - a fixture


@pytest.mark.parametrize("spacing, diagonal", [(None, (1, 1, 1)), (0.625, (0.625,) * 3), ((1, 2, 3), (1, 2, 3))])
def test_hdf5_gets_its_affine_from_the_spacing(tmp_path, spacing, diagonal):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"], file["label"], file["other"] = array, array % 3, array + 100.0
    for dataset, expected in (("image", array), ("other", array + 100)):
        reader = ScanReader(dataset, spacing)
        found = LoadScand("image", reader)({"image": str(tmp_path / "a.h5")})["image"]
        assert found.dtype == torch.float32 and found.shape == (1, 2, 3, 4)
        np.testing.assert_array_equal(found[0], expected)
        np.testing.assert_array_equal(found.affine, np.diag([*diagonal, 1]))
        np.testing.assert_array_equal(reader.volume(tmp_path / "a.h5"), found)
    np.testing.assert_array_equal(reader.volume(tmp_path / "a.h5", label=True)[0], array % 3)
    grid = reader.grid(tmp_path / "a.h5", label=True)
    np.testing.assert_array_equal(grid.affine, np.diag([*diagonal, 1]))
    np.testing.assert_array_equal(grid.spacing, diagonal)
    assert grid.shape == (2, 3, 4)


def test_a_missing_hdf5_dataset_is_named_with_those_that_are_there(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"], file["label"] = np.zeros((2, 2, 2)), np.zeros((2, 2, 2))
    for read in (ScanReader("flair").volume, ScanReader("flair").grid):
        with pytest.raises(DatasetError, match=r"a\.h5: no dataset 'flair' in the file, which has image, label;"):
            read(tmp_path / "a.h5")


def test_monai_takes_the_reader(tmp_path, scan):
    path = save_nifti(tmp_path / "a.nii.gz", scan[0], OBLIQUE)
    found = LoadImaged("image", reader=ScanReader(), ensure_channel_first=True)({"image": path})["image"]
    np.testing.assert_array_equal(found, ScanReader().volume(path))
    np.testing.assert_array_equal(found.affine, ScanReader().volume(path).affine)
    assert not ScanReader().verify_suffix("a.dcm") and ScanReader().verify_suffix(["a.h5", "B.NRRD"])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_every_format_gives_the_same_voxels_in_the_same_place(tmp_path, scan, suffix):
    sitk.WriteImage(itk_image(scan[0], OBLIQUE), str(tmp_path / f"scan{suffix}"))
    nifti = nibabel.load(save_nifti(tmp_path / "same.nii.gz", scan[0], OBLIQUE))
    found = LoadScand("image")({"image": str(tmp_path / f"scan{suffix}")})["image"]
    np.testing.assert_array_equal(found[0], scan[0])
    np.testing.assert_allclose(found.affine, nifti.affine, atol=2e-5)
    grid = ScanReader().grid(tmp_path / f"scan{suffix}")
    np.testing.assert_allclose(grid.affine, nifti.affine, atol=2e-5)
    np.testing.assert_allclose(grid.spacing, SIZES, rtol=1e-5)
    assert grid.shape == SHAPE
    np.testing.assert_array_equal(ScanReader().volume(tmp_path / f"scan{suffix}")[0], scan[0])


def test_a_grid_tells_of_more_axes_than_three(tmp_path):
    save_nifti(tmp_path / "a.nii", np.zeros((3, 4, 5, 2), np.float32), np.eye(4))
    assert ScanReader().grid(tmp_path / "a.nii").shape == (3, 4, 5, 2)
