"""From folders and lists to a Cohort: both layouts, the ways to write a list, and who the templates are."""

import json
import logging
import shutil

import h5py
import itk
import nibabel
import numpy as np
import pytest

from semisam_o1.data import ScanReader
from semisam_o1.data.datasets import open_cohort
from semisam_o1.types import DatasetError

SHAPE = (6, 7, 8)


def write_nifti(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def voxels(seed=0):
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def organ(classes=3):
    label = np.zeros(SHAPE, np.uint8)
    for k in range(1, classes):
        label[2:4, 2:4, 1 + k] = k
    return label


def study(root, images, labelled=(), **lists):
    """A NIfTI data set: `images` in all, of which `labelled` have a label; lists by their file's stem."""
    for number, name in enumerate(images):
        write_nifti(root / "images" / f"{name}.nii.gz", voxels(number))
    for name in labelled:
        write_nifti(root / "labels" / f"{name}.nii.gz", organ())
    for name, text in lists.items():
        text = text if isinstance(text, bytes) else text.encode()
        (root / f"{name}.txt").write_bytes(text)
    return root


def names(cases):
    return [case.name for case in cases]


def test_nifti_layout(phantom_dir):
    cohort = open_cohort(phantom_dir)
    assert names(cohort.templates) == ["phantom_00"] and cohort.templates[0].split == "template"
    assert names(cohort.split("pool")) == ["phantom_01", "phantom_02"]
    assert names(cohort.split("val")) == ["phantom_03"]
    assert names(cohort.split("test")) == ["phantom_04"]
    assert {case.split for case in cohort.pool} == {"pool"}
    assert cohort.num_classes == 3
    assert cohort.classes == {0: "background", 1: "bright organ", 2: "dim organ"}
    assert cohort.set_aside == {} and cohort.problems == ()
    case = cohort.case("phantom_02")
    assert case.image.is_file() and case.label.is_file()
    np.testing.assert_allclose(cohort.grid(case).spacing, (1.5, 1.5, 3))


def test_published_layout(phantom_h5_dir, caplog):
    with caplog.at_level(logging.INFO, "semisam_o1"):
        cohort = open_cohort(phantom_h5_dir)
    assert "1 mm along each axis is assumed" in caplog.text
    assert names(cohort.templates + cohort.pool) == ["phantom_00", "phantom_01", "phantom_02"]
    assert cohort.classes[1] == "class 1"
    case = cohort.templates[0]
    assert case.image == case.label and case.image.suffix == ".h5"
    assert cohort.grid(case).shape == (32, 32, 24)
    np.testing.assert_array_equal(cohort.grid(case).spacing, 1)


def test_said_spacing_reaches_the_grid(phantom_h5_dir, caplog):
    cohort = open_cohort(phantom_h5_dir, reader=ScanReader(spacing=[0.5, 0.5, 2]))
    np.testing.assert_array_equal(cohort.grid(cohort.pool[0]).spacing, (0.5, 0.5, 2))
    assert "1 mm along each axis is assumed" not in caplog.text
    cohort = open_cohort(phantom_h5_dir, reader=ScanReader(spacing=0.625))
    np.testing.assert_array_equal(cohort.grid(cohort.pool[0]).spacing, 0.625)


@pytest.mark.parametrize("spacing", [0, (1, 2), (1, -1, 1), "thin", float("nan")])
def test_impossible_spacing(spacing):
    with pytest.raises(DatasetError, match="spacing is .*: expected one or three positive numbers, mm"):
        ScanReader(spacing=spacing)


def test_another_image_key(tmp_path):
    (tmp_path / "data").mkdir()
    for number, name in enumerate("ab"):
        with h5py.File(tmp_path / "data" / f"{name}.h5", "w") as file:
            file["t1"] = voxels(number)
            if name == "a":
                file["label"] = organ(2)
    cohort = open_cohort(tmp_path, reader=ScanReader("t1"))
    assert names(cohort.templates) == ["a"]
    assert cohort.case("b").label is None and cohort.num_classes == 2


@pytest.mark.parametrize(
    "text",
    [
        "t\na\nb",
        "t,1,x\r\na , 2\r\nb\r\n",
        "\n t \n\n\na\nb\n\n",
        b"\xef\xbb\xbft\na\nb",
        "t.nii.gz\na.nii.gz\nb.NII",
    ],
    ids=["no last newline", "commas and CRLF", "blank lines", "byte order mark", "file names"],
)
def test_ways_to_write_a_list(tmp_path, text):
    cohort = open_cohort(study(tmp_path, "tab", "t", train=text))
    assert names(cohort.templates) == ["t"] and names(cohort.pool) == ["a", "b"]
    assert cohort.val == cohort.test == ()


def test_names_with_dots_and_blanks(tmp_path):
    cohort = open_cohort(study(tmp_path, ["scan 1.2", "b.v2"], ["scan 1.2"]))
    assert names(cohort.cases) == ["scan 1.2", "b.v2"]


def test_without_lists_the_labelled_cases_are_the_templates(tmp_path):
    cohort = open_cohort(study(tmp_path, "abcd", "bd"))
    assert names(cohort.templates) == ["b", "d"] and names(cohort.pool) == ["a", "c"]


def test_without_train_list_the_held_out_cases_stay_out(tmp_path):
    cohort = open_cohort(study(tmp_path, "abcd", "abcd", test="b\nc\n"), template="a")
    assert names(cohort.templates) == ["a"] and names(cohort.pool) == ["d"] and names(cohort.test) == ["b", "c"]


def test_labels_may_be_missing_everywhere_but_at_the_template(tmp_path):
    cohort = open_cohort(study(tmp_path, "tabc", "t", train="t\na\nb", test="c"))
    assert all(case.label is None for case in cohort.pool + cohort.test)


@pytest.mark.parametrize("template", ["b", ["b"], "b.nii.gz", ("b", "b")])
def test_a_named_template_leaves_its_list_and_frees_the_first(tmp_path, template):
    cohort = open_cohort(study(tmp_path, "tab", "tab", train="t\na\nb"), template=template)
    assert names(cohort.templates) == ["b"] and names(cohort.pool) == ["t", "a"]


def test_a_template_may_stand_in_another_list_or_in_none(tmp_path):
    study(tmp_path, "tabv", "tabv", train="t\na", val="v")
    cohort = open_cohort(tmp_path, template=["v", "b"])
    assert names(cohort.templates) == ["b", "v"] and names(cohort.pool) == ["t", "a"] and cohort.val == ()
    assert any(problem.case == "v" and problem.severity == "note" for problem in cohort.problems)


def test_several_templates_from_the_head_of_the_list(tmp_path):
    cohort = open_cohort(study(tmp_path, "tab", "tab", train="t\na\nb"), labeled_num=2)
    assert names(cohort.templates) == ["a", "t"] and names(cohort.pool) == ["b"]


def test_an_empty_pool_is_fine_where_none_is_needed(tmp_path):
    study(tmp_path, "ta", "ta", train="t", test="a")
    with pytest.raises(DatasetError, match="pool is empty"):
        open_cohort(tmp_path)
    assert names(open_cohort(tmp_path, need_pool=False).test) == ["a"]


def test_classes_are_those_of_all_templates_or_more(tmp_path):
    study(tmp_path, "tab", "ta", train="t\na\nb")
    write_nifti(tmp_path / "labels" / "t.nii.gz", organ(2))
    assert open_cohort(tmp_path).num_classes == 2
    assert open_cohort(tmp_path, labeled_num=2).num_classes == 3
    assert open_cohort(tmp_path, num_classes=5).classes[4] == "class 4"


def test_merged_classes_are_one_whatever_labels_hold(tmp_path):
    study(tmp_path, "tab", "tab", train="t\na\nb")
    write_nifti(tmp_path / "labels" / "a.nii.gz", organ(7))
    cohort = open_cohort(tmp_path, binary_label=True)
    assert cohort.classes == {0: "background", 1: "foreground"} and cohort.num_classes == 2
    assert [case.label is not None for case in cohort.pool] == [True, True]
    assert [case.label is not None for case in open_cohort(tmp_path).pool] == [False, True]


@pytest.mark.parametrize(
    "said, expected",
    [
        ({"1": "anterior"}, ["background", "anterior", "class 2"]),
        (["anterior", "posterior"], ["background", "anterior", "posterior"]),
        (["Background", "anterior", "posterior"], ["Background", "anterior", "posterior"]),
        ({"2": "posterior", "9": "far"}, ["background", "class 1", "posterior"]),
    ],
)
def test_names_of_classes(tmp_path, said, expected):
    study(tmp_path, "ta", "t")
    (tmp_path / "classes.json").write_text(json.dumps(said))
    assert open_cohort(tmp_path).classes == dict(enumerate(expected))


@pytest.mark.parametrize("text", ["{", "3", '{"one": "a"}', '{"1": 2}'])
def test_names_of_classes_that_cannot_be_read(tmp_path, text):
    study(tmp_path, "ta", "t")
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(DatasetError, match="classes.json"):
        open_cohort(tmp_path)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_formats_of_3d_slicer(tmp_path, suffix):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    arrays = {"images/t": voxels(), "images/a": voxels(1), "labels/t": organ()}
    for name, array in arrays.items():
        image = itk.image_from_array(np.ascontiguousarray(array.transpose(2, 1, 0)))
        image.SetSpacing((1.0, 1.0, 2.0))
        itk.imwrite(image, str(tmp_path / f"{name}{suffix}"))
    cohort = open_cohort(tmp_path)
    assert names(cohort.templates) == ["t"] and names(cohort.pool) == ["a"]
    assert cohort.grid(cohort.pool[0]).shape == SHAPE
    np.testing.assert_allclose(ScanReader().volume(cohort.pool[0].image)[0].numpy(), arrays["images/a"])


def test_hidden_and_foreign_files_are_no_cases(tmp_path):
    study(tmp_path, "ta", "t")
    (tmp_path / "images" / "._a.nii.gz").write_bytes(b"\0")
    (tmp_path / "images" / "notes.docx").write_bytes(b"\0")
    assert names(open_cohort(tmp_path).cases) == ["t", "a"]


def test_unknown_splits_and_cases(phantom_dir):
    cohort = open_cohort(phantom_dir, check=False)
    with pytest.raises(DatasetError, match="pool, val, test"):
        cohort.split("train")
    with pytest.raises(DatasetError, match="nobody"):
        cohort.case("nobody")


def test_without_checks_the_templates_alone_are_looked_into(tmp_path):
    study(tmp_path, "tab", "t", train="t\na\nb")
    write_nifti(tmp_path / "images" / "a.nii.gz", voxels() * np.nan)
    assert names(open_cohort(tmp_path, check=False).pool) == ["a", "b"]
    assert names(open_cohort(tmp_path).pool) == ["b"]
    shutil.rmtree(tmp_path / "labels")
    with pytest.raises(DatasetError, match="without a label"):
        open_cohort(tmp_path, check=False)


def test_two_layouts_in_one_folder(tmp_path, phantom_h5_dir):
    study(tmp_path, "ta", "t")
    shutil.copytree(phantom_h5_dir / "data", tmp_path / "data")
    with pytest.raises(DatasetError, match="images in data/ and in"):
        open_cohort(tmp_path)
