"""A trained bundle in the server gives what `semisam-o1 predict` gives, voxel for voxel."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from semisam_o1.cli import main
from tests.clinic.server import Server


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
