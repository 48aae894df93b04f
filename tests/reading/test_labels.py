"""One function reads every label: what it puts right with a note, and what it refuses by name."""

import h5py
import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from semisam_o1.data import ScanReader, read_label
from semisam_o1.data.findings import Fault
from semisam_o1.data.phantoms import grid_affine
from tests.reading.headers import PLAIN, SHAPE, TURNED, VOXELS, write_nifti, write_nrrd

LABEL = np.zeros(SHAPE, np.uint8)
LABEL[2:5, 3:6, 1:6], LABEL[5:7, 3:6, 1:6] = 1, 2
AFFINE = grid_affine(SHAPE, (2, 3, 4), "LPS", (5, -8, 12))
NAMES = {0: "background", 1: "Left Kidney", 2: "tumour"}


@pytest.fixture
def scan(tmp_path):
    nibabel.save(nibabel.Nifti1Image(VOXELS, AFFINE), tmp_path / "scan.nii.gz")
    return ScanReader().open(tmp_path / "scan.nii.gz")


def save(path, array, affine=AFFINE):
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def notes(label):
    return [finding.found for finding in label.findings]


def test_values_beside_whole_numbers_are_rounded(tmp_path, scan):
    label = read_label(save(tmp_path / "l.nii", LABEL * np.float32(1.0004)), ScanReader(), scan)
    np.testing.assert_array_equal(label.values, LABEL)
    assert notes(label) == ["values just beside whole numbers"]
    with pytest.raises(Fault, match="not whole numbers"):
        read_label(save(tmp_path / "l.nii", LABEL * np.float32(1.002)), ScanReader(), scan)


def test_a_trailing_axis_of_one_is_dropped(tmp_path, scan):
    label = read_label(save(tmp_path / "l.nii", LABEL[..., None]), ScanReader(), scan)
    np.testing.assert_array_equal(label.values, LABEL)
    assert notes(label) == ["4 axes, the last of length 1"]


@given(order=some.permutations(range(3)), flips=some.tuples(*[some.booleans()] * 3))
def test_another_order_of_axes_is_put_right(tmp_path_factory, order, flips):
    folder = tmp_path_factory.mktemp("orders")
    scan = ScanReader().open(save(folder / "scan.nii", VOXELS))
    change = nibabel.orientations.inv_ornt_aff(
        np.array([[axis, -1 if flip else 1] for axis, flip in zip(order, flips)]), SHAPE
    )
    moved = nibabel.orientations.apply_orientation(LABEL, [[axis, -1 if f else 1] for axis, f in zip(order, flips)])
    label = read_label(save(folder / "l.nii", moved, AFFINE @ change), ScanReader(), scan)
    np.testing.assert_array_equal(label.values, LABEL)
    same = list(order) == [0, 1, 2] and not any(flips)
    assert notes(label) == ([] if same else ["axes in another order than the scan's"])


def test_a_label_on_the_other_form_is_told_which(tmp_path):
    scan = ScanReader().open(write_nifti(tmp_path / "scan.nii", PLAIN, TURNED, (2, 1)))
    with pytest.raises(Fault, match="fits the scan's sform, which is not used.*nifti_form=sform"):
        read_label(save(tmp_path / "l.nii", LABEL, PLAIN), ScanReader(), scan)
    scan = ScanReader(nifti_form="sform").open(tmp_path / "scan.nii")
    assert read_label(tmp_path / "l.nii", ScanReader(nifti_form="sform"), scan).findings == ()


@pytest.mark.parametrize("value", [-1, 70000, np.nan, np.inf, 0.5])
def test_values_that_are_no_classes(tmp_path, scan, value):
    array = LABEL.astype(np.float32)
    array[0, 0, 0] = value
    with pytest.raises(Fault, match="not whole numbers|holds class"):
        read_label(save(tmp_path / "l.nii", array), ScanReader(), scan)


def seg_nrrd(path, array, start=(0, 0, 0), names=("Left_kidney", "Tumour"), values=(2, 1), shift=0.0):
    """A segmentation as 3D Slicer saves it: an extent, and the names of its segments."""
    affine = np.diag([-1.0, -1, 1, 1]) @ AFFINE
    axes = " ".join("(" + ",".join(f"{v:.9g}" for v in affine[:3, axis]) + ")" for axis in range(3))
    origin = affine[:3] @ [*(np.array(start) + shift), 1]
    fields = ["space: left-posterior-superior", f"space directions: {'none ' * (array.ndim - 3)}{axes}"]
    fields += ["kinds: list domain domain domain"] if array.ndim == 4 else []
    fields.append("space origin: (" + ",".join(f"{v:.9g}" for v in origin) + ")")
    for n, (name, value) in enumerate(zip(names, values)):
        fields += [f"Segment{n}_ID:=Segment_{n}", f"Segment{n}_LabelValue:={value}", f"Segment{n}_Name:={name}"]
    return write_nrrd(path, fields, array)


CUT = (slice(1, 8), slice(2, 7), slice(1, 6))
SLICER = np.array([0, 2, 1], np.uint8)[LABEL]  # the other way round


def test_a_segmentation_of_3d_slicer_is_placed_and_named(tmp_path, scan):
    path = seg_nrrd(tmp_path / "l.seg.nrrd", np.ascontiguousarray(SLICER[CUT]), (1, 2, 1))
    np.testing.assert_array_equal(read_label(path, ScanReader(), scan, NAMES).values, LABEL)
    by_value = read_label(path, ScanReader(), scan, None)
    np.testing.assert_array_equal(by_value.values, SLICER)
    assert notes(by_value) == ["named segments, but no classes.json"]


def test_names_of_segments_may_have_any_letters(tmp_path, scan):
    names = "Bauchspeicheldr\u00fcse", "Tumour"
    path = seg_nrrd(tmp_path / "l.seg.nrrd", SLICER, names=names)
    found = read_label(path, ScanReader(), scan, {0: "background", 1: names[0], 2: "tumour"})
    np.testing.assert_array_equal(found.values, LABEL)


def test_a_label_without_voxels_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"], file["label"] = np.zeros(SHAPE, np.float32), np.zeros((0, 8, 7), np.uint8)
    with pytest.raises(Fault, match="a label of 0 x 8 x 7 voxels"):
        read_label(tmp_path / "a.h5", ScanReader(), None)


def test_segments_that_cannot_be_taken_are_named(tmp_path, scan):
    path = seg_nrrd(tmp_path / "l.seg.nrrd", SLICER, names=("Left Kidney", "vessel"))
    with pytest.raises(Fault, match="segments unknown to the run: vessel"):
        read_label(path, ScanReader(), scan, NAMES)
    beyond = np.zeros((9, 8, 7), np.uint8)
    beyond[8] = 1
    with pytest.raises(Fault, match="beyond the scan"):
        read_label(seg_nrrd(path, beyond, (3, 0, 0)), ScanReader(), scan, NAMES)
    with pytest.raises(Fault, match="0.5 voxels|0.866 voxels|beside the scan's voxels"):
        read_label(seg_nrrd(path, SLICER[CUT].copy(), (1, 2, 1), shift=0.4), ScanReader(), scan, NAMES)
    with pytest.raises(Fault, match="overlapping segments"):
        read_label(seg_nrrd(path, np.stack([SLICER, SLICER])), ScanReader(), scan, NAMES)


def test_names_from_elsewhere_map_values(tmp_path, scan):
    """As MONAI Label sends them: numbers in the order of segments."""
    path = save(tmp_path / "l.nii.gz", SLICER)
    found = read_label(path, ScanReader(), scan, NAMES, segments={1: "tumour", 2: "left kidney"})
    np.testing.assert_array_equal(found.values, LABEL)
