"""A scan or label that cannot be used is set aside, or stops the run where it is the template's, and is explained."""

import gzip

import h5py
import itk
import nibabel
import numpy as np
import pytest

from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.findings import LABEL_NOT_USED, NOTE, SET_ASIDE, WARNING
from semisam_o1.types import DatasetError
from tests.data.studies import (
    SHAPE,
    flattened,
    halve,
    image_of,
    label_of,
    moved,
    names,
    organ,
    study,
    voxels,
    with_value,
    write_nifti,
)

BROKEN_IMAGES = {
    "truncated": (lambda path: halve(path), "truncated or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "not an image": (lambda path: path.write_bytes(b"hello"), "it begins with text"),
    "missing": (lambda path: path.unlink(), "no image of that name"),
    "NaN alone": (lambda path: write_nifti(path, np.full(SHAPE, np.nan)), "no finite voxel"),
    "constant": (lambda path: write_nifti(path, np.full(SHAPE, 7.0)), "a constant image"),
    "nearly constant": (lambda path: write_nifti(path, flattened(voxels())), "constant but for a few"),
    "2D": (lambda path: write_nifti(path, voxels()[..., 0]), "a 2D image, 6 x 7"),
    "one slice": (lambda path: write_nifti(path, voxels()[..., :1]), "single slice"),
    "4D": (lambda path: write_nifti(path, np.stack([voxels()] * 2, -1)), "a 4D image, 6 x 7 x 8 x 2"),
    "zero-sized": (lambda path: write_nifti(path, voxels()[:, :0]), "no voxels in the image, 6 x 0 x 8"),
    "complex": (lambda path: write_nifti(path, voxels().astype(np.complex64)), "complex numbers"),
}


@pytest.mark.parametrize("kind", BROKEN_IMAGES)
def test_a_broken_image_sets_the_case_aside(root, kind):
    spoil, found = BROKEN_IMAGES[kind]
    spoil(image_of(root))
    cohort = open_cohort(root)
    assert found in cohort.set_aside["a"]
    assert list(cohort.set_aside) == ["a"] and names(cohort.pool) == ["b"]
    (problem,) = [problem for problem in cohort.problems if problem.severity == SET_ASIDE]
    assert problem.case == "a" and problem.expected and problem.remedy
    with pytest.raises(DatasetError, match="set aside"):
        cohort.case("a")


@pytest.mark.parametrize("kind", BROKEN_IMAGES)
def test_a_broken_template_stops_the_run(root, kind):
    spoil, _ = BROKEN_IMAGES[kind]
    spoil(image_of(root, "t"))
    with pytest.raises(DatasetError, match=r"(?m)^t +stops the run"):
        open_cohort(root)


def test_a_broken_test_case_is_set_aside(root):
    halve(image_of(root, "z"))
    cohort = open_cohort(root)
    assert cohort.test == () and "z" in cohort.set_aside


BROKEN_LABELS = {
    "truncated": (lambda path: halve(path), "truncated or damaged"),
    "shape": (lambda path: write_nifti(path, organ()[:-1]), "label 5 x 7 x 8"),
    "2D": (lambda path: write_nifti(path, organ()[..., 3]), "a 2D label"),
    "affine": (lambda path: write_nifti(path, organ(), moved(0.5)), "grid lies 0.5 voxels from"),
    "spacing": (lambda path: write_nifti(path, organ(), np.diag([1, 1, 1.1, 1])), "grid lies"),
    "fractions": (lambda path: write_nifti(path, with_value(0.5, organ())), "not whole numbers"),
    "NaN": (lambda path: write_nifti(path, with_value(np.nan, organ())), "not whole numbers"),
    "negative": (lambda path: write_nifti(path, with_value(-1, organ())), "holds class -1"),
}


@pytest.mark.parametrize("kind", BROKEN_LABELS)
def test_a_broken_label_is_not_used_and_the_case_stays(root, kind):
    spoil, found = BROKEN_LABELS[kind]
    spoil(label_of(root))
    cohort = open_cohort(root)
    assert cohort.case("a").label is None and cohort.case("b").label is not None
    (problem,) = cohort.problems
    assert (problem.case, problem.severity) == ("a", LABEL_NOT_USED) and found in problem.found


@pytest.mark.parametrize("kind", BROKEN_LABELS)
def test_a_broken_template_label_stops_the_run(root, kind):
    spoil, _ = BROKEN_LABELS[kind]
    spoil(label_of(root, "t"))
    with pytest.raises(DatasetError, match=r"(?m)^t +stops the run"):
        open_cohort(root)


def test_classes_that_the_template_lacks(root):
    write_nifti(label_of(root), with_value(7, organ()))
    cohort = open_cohort(root)
    assert cohort.num_classes == 3 and cohort.case("a").label is None
    assert "class 7" in cohort.problems[0].found
    assert open_cohort(root, num_classes=8).case("a").label is not None


def test_rounded_affines_are_the_same(root):
    write_nifti(label_of(root), organ(), moved(0.01))
    assert open_cohort(root).problems == ()


def test_a_template_without_foreground(root):
    write_nifti(label_of(root, "t"), np.zeros(SHAPE, np.uint8))
    with pytest.raises(DatasetError, match="no foreground"):
        open_cohort(root)


def test_an_empty_label_elsewhere_is_worth_a_note(root):
    write_nifti(label_of(root), np.zeros(SHAPE, np.uint8))
    cohort = open_cohort(root)
    assert [problem.severity for problem in cohort.problems] == [NOTE] and cohort.case("a").label is not None


def test_class_numbers_are_any(root):
    for name in "tabz":
        write_nifti(label_of(root, name), (organ(2) * 53).astype(np.uint16))
    cohort = open_cohort(root)
    assert list(cohort.classes) == cohort.class_numbers == [0, 53] and cohort.problems == ()
    assert set(cohort.label(cohort.case("a")).unique().tolist()) == {0, 1}
    assert open_cohort(root, renumber=False).num_classes == 54


def test_a_class_number_that_is_none_costs_no_memory(root):
    write_nifti(label_of(root, "t"), organ(2).astype(np.uint32) * 4_294_967_295)
    with pytest.raises(DatasetError, match="4294967296"):
        open_cohort(root)


@pytest.mark.parametrize("num_classes", [0, 1, 2, 1000])
def test_num_classes_that_cannot_be(root, num_classes):
    with pytest.raises(DatasetError, match=f"num_classes is {num_classes}"):
        open_cohort(root, num_classes=num_classes)


def test_a_class_that_no_template_holds_is_worth_a_note(root):
    for name in "tabz":
        write_nifti(label_of(root, name), organ(2) * 2)
    assert open_cohort(root).problems == ()
    cohort = open_cohort(root, num_classes=3)
    assert [(problem.severity, problem.found) for problem in cohort.problems] == [(NOTE, "no voxel of class 1")]
    (root / "classes.json").write_text('{"1": "head", "2": "body"}')
    (problem,) = open_cohort(root).problems
    assert problem.severity == WARNING and problem.found == "no template holds class 1 (head)"


def write_h5(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


def test_hdf5_faults(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_h5(data / "t.h5", image=voxels(), label=organ())
    write_h5(data / "ok.h5", image=voxels(1).astype(np.float16))
    write_h5(data / "key.h5", scan=voxels(), label=organ())
    write_h5(data / "cut.h5", image=voxels(), label=organ())
    write_h5(data / "nothing.h5", image=voxels()[:0])
    write_h5(data / "shape.h5", image=voxels(), label=organ()[1:])
    halve(data / "cut.h5")
    (tmp_path / "train.txt").write_text("t\nok\nkey\ncut\nnothing\nshape\n")
    cohort = open_cohort(tmp_path)
    assert set(cohort.set_aside) == {"key", "cut", "nothing"}
    assert "which has label, scan" in cohort.set_aside["key"]
    assert cohort.case("shape").label is None and cohort.case("ok").label is None


def test_3d_slicer_faults(tmp_path):
    study(tmp_path, "ta", "t")
    folder = tmp_path / "images"
    turned = np.ascontiguousarray(voxels().transpose(2, 1, 0))
    itk.imwrite(itk.image_from_array(turned), str(folder / "cut.mha"))
    halve(folder / "cut.mha")
    itk.imwrite(itk.image_from_array(turned[0]), str(folder / "flat.nrrd"))
    itk.imwrite(itk.image_from_array(np.stack([turned] * 3, -1), is_vector=True), str(folder / "colour.nrrd"))
    itk.imwrite(itk.image_from_array(np.stack([turned] * 2)), str(folder / "film.mha"))
    aside = open_cohort(tmp_path).set_aside
    assert set(aside) == {"cut", "flat", "colour", "film"}
    assert "2D" in aside["flat"] and "4D" in aside["colour"] and "4D" in aside["film"]


def test_an_affine_without_inverse(root):
    path = root / "images" / "a.nii"
    nibabel.save(nibabel.load(image_of(root)), path)
    image_of(root).unlink()
    header = nibabel.load(path).header
    header["srow_z"], header["sform_code"] = 0, 1
    path.write_bytes(header.binaryblock + path.read_bytes()[len(header.binaryblock) :])
    assert "no inverse" in open_cohort(root).set_aside["a"]


def test_a_corrupt_gzip_stream_is_said_in_words(root):
    data = bytearray(image_of(root).read_bytes())
    data[60:70] = bytes(byte ^ 0xFF for byte in data[60:70])
    image_of(root).write_bytes(data)
    assert "truncated or damaged (its gzip stream is corrupt)" in open_cohort(root).set_aside["a"]


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.mha", "a.nrrd", "a.mgz"])
@pytest.mark.parametrize(
    "page", [b"\xef\xbb\xbf\n<!DOCTYPE html><title>Sign in</title>", b'<?xml version="1.0"?><Error/>']
)
def test_a_web_page_under_the_name_of_a_scan_is_no_image(root, name, page):
    image_of(root).unlink()
    (root / "images" / name).write_bytes(page)
    (problem,) = open_cohort(root).problems
    assert "no image: it begins with HTML or XML, e.g. a web page that was saved in place" in problem.found
    assert (problem.severity, problem.remedy) == (SET_ASIDE, "download or export it again")


@pytest.mark.parametrize(
    ("content", "found", "remedy"),
    [
        (b"404: not found", "it begins with text", "download or export it again"),
        (bytes(400), "it begins with neither gzip's first bytes nor the header", "download or export it again"),
        (None, "not compressed, but has another suffix", "rename it"),
    ],
)
def test_what_is_not_compressed_under_a_compressed_name(root, content, found, remedy):
    if content is None:
        content = gzip.decompress(image_of(root).read_bytes())
    image_of(root).write_bytes(content)
    (problem,) = open_cohort(root).problems
    assert found in problem.found and problem.remedy == remedy
