"""A trained bundle in the server gives what `semisam-o1 predict` gives, voxel for voxel."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

import semisam_o1
from semisam_o1.cli import main
from tests.clinic.server import Refused, Server
from tests.dicom import write_series


@pytest.fixture(scope="module")
def server(run, phantom_dir, tmp_path_factory):
    """A server of the trained bundle of `run`; its studies are the images of the phantoms."""
    folder = tmp_path_factory.mktemp("clinic")
    studies = folder / "studies"
    studies.mkdir()
    for image in (phantom_dir / "images").iterdir():
        (studies / image.name).write_bytes(image.read_bytes())
    with Server(folder, studies, run / "bundle") as served:
        yield served


def predicted(run, image, out):
    assert main(["predict", str(image), "--run", str(run), "--output", str(out), "--device", "cpu"]) == 0
    (label,) = (out / "labels").glob("*.nii.gz")
    return label


def assert_same(found, expected):
    found, expected = sitk.ReadImage(str(found)), sitk.ReadImage(str(expected))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(expected))
    for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(found, geometry)(), getattr(expected, geometry)(), atol=1e-4)


@pytest.mark.parametrize("number", range(5), ids=["plain", "RAS", "3 mm slices", "LAS", "oblique"])
def test_a_nifti_image(server, run, tmp_path, number):
    name = f"phantom_{number:02d}"
    found = server.infer(name, tmp_path / "found.nii.gz")
    expected = predicted(run, server.studies / f"{name}.nii.gz", tmp_path / "out")
    assert_same(found, expected)
    assert np.asarray(nibabel.load(found).dataobj).any()


def test_an_nrrd_image(server, run, tmp_path):
    image = tmp_path / "a.nrrd"
    sitk.WriteImage(sitk.ReadImage(str(server.studies / "phantom_02.nii.gz")), str(image))
    found = server.infer(image, tmp_path / "found.nrrd", result_extension=".nrrd")
    assert_same(found, predicted(run, image, tmp_path / "out"))


def test_a_dicom_folder(server, run, tmp_path):
    """It is the label of the same voxels in NIfTI; `predict` reads no DICOM folder yet."""
    stored = sitk.ReadImage(str(server.studies / "phantom_00.nii.gz"), sitk.sitkFloat32)
    image = sitk.Cast(stored * 1000, sitk.sitkInt16)
    same = tmp_path / "same.nii.gz"
    sitk.WriteImage(image, str(same))
    write_series(image, tmp_path / "series")
    found = server.infer(tmp_path / "series", tmp_path / "found.nii.gz", result_extension=".nii.gz")
    assert_same(found, predicted(run, same, tmp_path / "out"))


def test_the_shipped_bundle_says_what_to_do(server, tmp_path):
    with Server(tmp_path, server.studies, semisam_o1.BUNDLE_ROOT) as shipped:
        with pytest.raises(Refused, match="submit the label of one scan and train"):
            shipped.infer("phantom_00", tmp_path / "found.nii.gz")
        (shipped.bundle / "models" / "model.pt").write_bytes(b"")
        (shipped.bundle / "configs" / "inference.json").write_text("{}")  # as after a training
        with pytest.raises(Refused, match="Restart the server to use it"):
            shipped.infer("phantom_00", tmp_path / "found.nii.gz")
