"""Results lie on their scans, header field by header field, and files are whole or absent."""

import itertools
import json
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import nn

from semisam_o1.data import ScanReader
from semisam_o1.data.export import write_label, write_share, write_weights
from semisam_o1.data.phantoms import grid_affine
from semisam_o1.errors import WriteError
from semisam_o1.files import atomic_write, partial_path, write_json, write_text

FULL = Path("/dev/full")  # Linux's device that has no room, ever
needs_full_device = pytest.mark.skipif(not FULL.exists(), reason=f"no {FULL}")
SHAPE = (5, 6, 7)
LABEL = np.random.default_rng(0).integers(0, 3, SHAPE)
FIELDS = ("srow_x", "srow_y", "srow_z", "qoffset_x", "qoffset_y", "qoffset_z", "pixdim")
SFORM = grid_affine(SHAPE, (1.1, 0.7, 2.5), "LPS", (8, -6, 15))
QFORM = grid_affine(SHAPE, (1.1, 0.7, 2.5), "LPS", (7, -6, 14))


def write_scan(path, sform_code, qform_code, units=("mm", "sec"), sform=SFORM, qform=QFORM):
    image = nibabel.Nifti1Image(np.zeros(SHAPE, np.int16), None)
    image.header.set_zooms((1.1, 0.7, 2.5))
    if qform_code:
        image.header.set_qform(qform, qform_code)
    if sform_code:
        image.header.set_sform(sform, sform_code)
    image.header.set_xyzt_units(*units)
    nibabel.save(image, path)
    return path


def assert_same_place(result, scan):
    """Every field of the header that says where voxels lie."""
    found, expected = nibabel.load(result).header, nibabel.load(scan).header
    for code in ("sform_code", "qform_code", "xyzt_units"):
        assert int(found[code]) == int(expected[code]), code
    for field in FIELDS:
        np.testing.assert_allclose(found[field], expected[field], rtol=1e-6, atol=1e-6, err_msg=field)
    for field in ("quatern_b", "quatern_c", "quatern_d"):
        np.testing.assert_allclose(found[field], expected[field], atol=2e-6, err_msg=field)
    np.testing.assert_allclose(nibabel.load(result).affine, nibabel.load(scan).affine, atol=1e-5)


@pytest.mark.parametrize("units", [("mm", "sec"), ("micron", "msec"), ("unknown", "unknown"), ("meter", "unknown")])
@pytest.mark.parametrize("sform_code, qform_code", [(1, 0), (0, 1), (2, 1), (1, 3), (0, 0), (4, 4)])
def test_a_label_lies_on_its_scan(tmp_path, sform_code, qform_code, units):
    scan = write_scan(tmp_path / "scan.nii.gz", sform_code, qform_code, units)
    write_label(tmp_path / "label.nii.gz", LABEL, scan, ScanReader().grid(scan))
    assert_same_place(tmp_path / "label.nii.gz", scan)
    found = nibabel.load(tmp_path / "label.nii.gz")
    assert found.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(found.dataobj), LABEL)


@pytest.mark.parametrize("axcodes", ["RAS", "LAS", "PSR", "ILA"])
@pytest.mark.parametrize("turn", [(0, 0, 0), (0, 0, 180), (30, -20, 10)])
def test_any_orientation_by_either_form(tmp_path, axcodes, turn):
    affine = grid_affine(SHAPE, (1.1, 0.7, 2.5), axcodes, turn)
    for codes in ((1, 0), (0, 1), (1, 1)):
        scan = write_scan(tmp_path / "scan.nii", *codes, sform=affine, qform=affine)
        write_label(tmp_path / "label.nii", LABEL, scan, ScanReader().grid(scan))
        assert_same_place(tmp_path / "label.nii", scan)


def test_maps_lie_on_their_scan_as_well(tmp_path):
    scan = write_scan(tmp_path / "scan.nii.gz", 0, 1, ("micron", "unknown"))
    write_share(tmp_path / "c.nii.gz", np.full(SHAPE, 0.5), scan, ScanReader().grid(scan))
    write_share(tmp_path / "e.nii.gz", np.full(SHAPE, 0.25), scan, ScanReader().grid(scan))
    for name in "ce":
        assert_same_place(tmp_path / f"{name}.nii.gz", scan)


def test_an_unused_broken_qform_does_not_matter(tmp_path):
    """Code 0 says that the quaternion is not to be used; some programs leave anything in it."""
    image = nibabel.load(write_scan(tmp_path / "scan.nii", 1, 0))
    image.header["quatern_b"] = 2
    nibabel.save(image, tmp_path / "broken.nii")
    scan = tmp_path / "broken.nii"
    np.testing.assert_allclose(ScanReader().grid(scan).affine, SFORM, atol=1e-5)
    write_label(tmp_path / "label.nii", LABEL, scan, ScanReader().grid(scan))
    np.testing.assert_allclose(nibabel.load(tmp_path / "label.nii").affine, SFORM, atol=1e-5)


def test_a_label_of_an_hdf5_scan(tmp_path):
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["image"] = np.zeros(SHAPE)
    grid = ScanReader(spacing=(1.0, 2.0, 0.5)).grid(tmp_path / "scan.h5")
    write_label(tmp_path / "label.nii.gz", LABEL, tmp_path / "scan.h5", grid)
    found = nibabel.load(tmp_path / "label.nii.gz")
    np.testing.assert_allclose(found.affine, np.diag([1, 2, 0.5, 1]))
    assert found.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(np.asarray(found.dataobj), LABEL)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_a_label_of_an_itk_scan_lies_where_itk_has_it(tmp_path, suffix):
    scan = sitk.Image(SHAPE, sitk.sitkInt16)
    scan.SetSpacing((1.1, 0.7, 2.5))
    scan.SetOrigin((10, -20, 30))
    scan.SetDirection((0, -1, 0, 0.6, 0, -0.8, 0.8, 0, 0.6))
    sitk.WriteImage(scan, str(tmp_path / f"scan{suffix}"))
    grid = ScanReader().grid(tmp_path / f"scan{suffix}")
    write_label(tmp_path / "label.nii.gz", LABEL, tmp_path / f"scan{suffix}", grid)
    found = sitk.ReadImage(str(tmp_path / "label.nii.gz"))
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(found, name)(), getattr(scan, name)(), atol=1e-5)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found).transpose(2, 1, 0), LABEL)


def test_many_classes_take_two_bytes(tmp_path):
    scan = write_scan(tmp_path / "scan.nii", 1, 1)
    for largest, dtype in ((255, np.uint8), (256, np.uint16)):
        label = LABEL.copy()
        label[0, 0, 0] = largest
        write_label(tmp_path / "label.nii", label, scan, ScanReader().grid(scan))
        found = nibabel.load(tmp_path / "label.nii")
        assert found.get_data_dtype() == dtype
        np.testing.assert_array_equal(np.asarray(found.dataobj), label)


def test_another_shape_is_refused_and_nothing_is_written(tmp_path):
    scan = write_scan(tmp_path / "scan.nii", 1, 1)
    with pytest.raises(ValueError, match=r"label.nii: result of shape \(5, 6, 8\) for a scan of shape \(5, 6, 7\)"):
        write_label(tmp_path / "out" / "label.nii", np.zeros((5, 6, 8), int), scan, ScanReader().grid(scan))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# Eight bits


def test_a_map_of_shares_is_off_by_less_than_half_a_step(tmp_path):
    scan = write_scan(tmp_path / "scan.nii", 1, 1)
    confidence = np.random.default_rng(2).uniform(0, 1, SHAPE)
    confidence[0, 0, :3] = 0, 1, 1 + 1e-6  # a resampled probability may pass 1 by a rounding error
    write_share(tmp_path / "c.nii.gz", confidence, scan, ScanReader().grid(scan))
    found = nibabel.load(tmp_path / "c.nii.gz")
    assert found.get_data_dtype() == np.uint8
    assert np.abs(found.get_fdata() - confidence).max() <= 0.5 / 255 * 1.0001
    np.testing.assert_allclose(found.get_fdata()[0, 0, :3], (0, 1, 1), atol=1e-6)


# Whole or not at all


def test_whole_gives_the_name_at_the_end_alone(tmp_path):
    target = tmp_path / "new" / "a.nii.gz"
    with atomic_write(target) as aside:
        assert aside.parent == target.parent and aside.name.endswith("a.nii.gz")  # nibabel goes by the suffix
        aside.write_text("text")
        assert not target.exists()
    assert [p.name for p in target.parent.iterdir()] == ["a.nii.gz"]
    assert target.read_text() == "text"


@pytest.mark.parametrize("before, written", itertools.product([None, "old"], [True, False]))
def test_whole_leaves_what_was_there_on_failure(tmp_path, before, written):
    target = tmp_path / "a.txt"
    if before:
        target.write_text(before)
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(target) as aside:
            if written:
                aside.write_text("half of the te")
            raise KeyboardInterrupt
    assert [p.read_text() for p in tmp_path.iterdir()] == ([before] if before else [])


@needs_full_device
def test_an_image_cut_short_never_takes_the_name(tmp_path):
    scan = write_scan(tmp_path / "scan.nii", 1, 1)
    write_label(tmp_path / "out" / "label.nii", LABEL, scan, ScanReader().grid(scan))
    before = (tmp_path / "out" / "label.nii").read_bytes()

    partial_path(tmp_path / "out" / "label.nii").symlink_to(FULL)
    with pytest.raises(WriteError, match=r"label\.nii cannot be written: the disk is full"):
        write_label(tmp_path / "out" / "label.nii", 1 - LABEL, scan, ScanReader().grid(scan))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["label.nii"]
    assert (tmp_path / "out" / "label.nii").read_bytes() == before


def test_text_and_json(tmp_path):
    write_text(tmp_path / "deep" / "a.txt", "Größe\n")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == "Größe\n".encode()
    write_json(tmp_path / "a.json", {"path": tmp_path, "sides": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"path": str(tmp_path), "sides": [1, 2]}


def test_weights_are_a_plain_state_dict(tmp_path):
    network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2))
    write_weights(tmp_path / "models" / "model.pt", network.state_dict())
    found = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert type(found) is dict
    assert found.keys() == network.state_dict().keys()
    for key, tensor in network.state_dict().items():
        assert torch.equal(found[key], tensor) and found[key].device.type == "cpu"
        assert not found[key].requires_grad
    parameters = dict(network.named_parameters())  # these carry gradients, the file does not
    write_weights(tmp_path / "models" / "model.pt", parameters)
    found = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert not any(tensor.requires_grad for tensor in found.values())
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["model.pt"]
