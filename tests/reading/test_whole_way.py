"""Phantoms with headers of every kind through `propagate` and `predict`: labels are those of plain files."""

import shutil

import itk
import nibabel
import numpy as np
import pytest

from semisam_o1.cli import main
from semisam_o1.data import ScanReader
from tests.jobs import labels
from tests.reading.headers import AsSaid

WRONG = np.array([[0.0, 7, 0, 90], [7, 0, 0, -50], [0, 0, -9, 4], [0, 0, 0, 1]])


def other_form(path, image):
    """The sform is wrong and has code 2: ITK's rule takes the qform."""
    header = image.header.copy()
    header.set_qform(image.affine, 1)
    header.set_sform(WRONG, 2)
    AsSaid(np.asarray(image.dataobj), None, header).to_filename(path)


def microns(path, image):
    header = image.header.copy()
    affine = np.diag([1000.0, 1000, 1000, 1]) @ image.affine
    header["qform_code"] = 0
    header.set_sform(affine, 1)
    header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    header.set_xyzt_units("micron")
    AsSaid(np.asarray(image.dataobj), None, header).to_filename(path)


def trailing_axis(path, image):
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[..., None], image.affine), path)


def other_axes(path, image):
    nibabel.save(nibabel.as_closest_canonical(image), path)


def by_itk(path, image):
    grid = ScanReader().grid(image.get_filename())
    lps = np.diag([-1.0, -1, 1, 1]) @ grid.affine
    found = itk.image_from_array(np.ascontiguousarray(np.asarray(image.dataobj, np.float32).T))
    found.SetSpacing(grid.spacing.tolist())
    found.SetOrigin(lps[:3, 3].tolist())
    found.SetDirection(itk.matrix_from_array(np.ascontiguousarray(lps[:3, :3] / grid.spacing)))
    itk.imwrite(found, str(path), compression=True)


FAMILIES = {
    "forms": (other_form, ".nii.gz"), "microns": (microns, ".nii"), "4D": (trailing_axis, ".nii.gz"),
    "axes": (other_axes, ".nii.gz"), "NRRD": (by_itk, ".nrrd"), "MHA": (by_itk, ".mha"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(made_once, phantom_dir):
    def make(folder):
        command = ["propagate", str(phantom_dir), "--output", str(folder / "run"), "--device", "cpu"]
        assert main([*command, "--set", "feature_voxels=3000"]) == 0

    return labels(made_once("plain", make) / "run" / "pseudo_labels")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_those_of_plain_files(run, plain, phantom_dir, tmp_path, family, monkeypatch):
    """With a broken pynrrd installed, which must change nothing."""
    (tmp_path / "nrrd.py").write_text("raise RuntimeError('pynrrd was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    data, (write, suffix) = shutil.copytree(phantom_dir, tmp_path / "data"), FAMILIES[family]
    for path in (data / "images").iterdir():
        image = nibabel.load(phantom_dir / "images" / path.name)
        path.unlink()
        write(path.with_name(path.name.replace(".nii.gz", suffix)), image)
    out, predicted = tmp_path / "out", tmp_path / "predicted"
    command = ["propagate", str(data), "--output", str(out), "--device", "cpu", "--set", "feature_voxels=3000"]
    assert main(command) == 0
    scans = [str(data / "images" / name.replace(".nii.gz", suffix)) for name in plain]
    assert main(["predict", *scans, "--run", str(run), "--output", str(predicted), "--device", "cpu"]) == 0
    expected = {out / "pseudo_labels": plain, predicted / "labels": labels(run / "round_2" / "predictions")}
    for folder, others in expected.items():
        for name, label in labels(folder).items():
            if family == "axes":
                scan = nibabel.load(phantom_dir / "images" / name)
                turn = nibabel.orientations.io_orientation(scan.affine)
                others[name] = nibabel.orientations.apply_orientation(others[name], turn)
            assert label.any() and (label == others[name]).mean() > 0.9995, f"{folder.name} {name}"


@pytest.mark.slow
def test_padding_changes_no_label(run, plain, phantom_dir, tmp_path):
    """Scans of the pool padded unevenly with a value far below their own, through `propagate` and `predict`."""
    widths, data = ((9, 2), (0, 5), (3, 0)), shutil.copytree(phantom_dir, tmp_path / "data")
    inside = tuple(slice(before, -after or None) for before, after in widths)
    for name in plain:
        image = nibabel.load(phantom_dir / "images" / name)
        affine = image.affine.copy()
        affine[:3, 3] -= affine[:3, :3] @ [before for before, _ in widths]
        scan = np.pad(np.asarray(image.dataobj), widths, constant_values=-9999)
        nibabel.save(nibabel.Nifti1Image(scan, affine), data / "images" / name)
        (data / "labels" / name).unlink()
    out, predicted = tmp_path / "out", tmp_path / "predicted"
    command = ["propagate", str(data), "--output", str(out), "--device", "cpu", "--set", "feature_voxels=3000"]
    assert main(command) == 0
    scans = [str(data / "images" / name) for name in plain]
    assert main(["predict", *scans, "--run", str(run), "--output", str(predicted), "--device", "cpu"]) == 0
    expected = {out / "pseudo_labels": plain, predicted / "labels": labels(run / "round_2" / "predictions")}
    for folder, others in expected.items():
        for name, label in labels(folder).items():
            assert (label[inside] != others[name]).mean() < 0.0005 and label.any(), f"{folder.name} {name}"
            label[tuple(slice(max(0, part.start - 1), part.stop and min(-1, part.stop + 1)) for part in inside)] = 0
            assert not label.any()  # but for the one voxel that a working voxel may reach beyond the data
