"""Lists and folders that contradict themselves or one another."""

import nibabel
import pytest

from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.findings import NOTE, STOPS, CohortError
from semisam_o1.types import DatasetError
from tests.data.studies import halve, image_of, label_of, names, organ, study, voxels, write_nifti


def test_the_same_case_in_two_lists(root):
    (root / "test.txt").write_text("z\na\n")
    with pytest.raises(DatasetError, match=r"(?m)^a +stops the run.*train.txt"):
        open_cohort(root)


def test_the_template_in_another_list_too(root):
    (root / "val.txt").write_text("t\n")
    with pytest.raises(DatasetError, match=r"(?m)^t +stops the run"):
        open_cohort(root)


def test_a_case_twice_in_one_list_counts_once(root):
    (root / "train.txt").write_text("t\na\nb\na\n")
    cohort = open_cohort(root)
    assert names(cohort.pool) == ["a", "b"] and cohort.problems[0].severity == NOTE


BAD_NAMES = ["../a", "/etc/passwd", "sub/a", "..", "sub\\a", "C:a", "a\0b", "../images/a.nii.gz"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_leave_the_data_folder(root, name):
    with pytest.raises(DatasetError, match="leaves the"):
        open_cohort(root, template=name)
    (root / "train.txt").write_text(f"t\na\n{name}\n")
    with pytest.raises(DatasetError, match="leaves the"):
        open_cohort(root)


def test_lists_that_cannot_be_read(root):
    (root / "val.txt").write_bytes(b"\xff\xfea\0b\0")
    with pytest.raises(DatasetError, match="val.txt"):
        open_cohort(root)
    (root / "val.txt").unlink()
    (root / "val.txt").mkdir()
    with pytest.raises(DatasetError, match="val.txt"):
        open_cohort(root)


def test_an_empty_list(root):
    (root / "train.txt").write_text("\n\n")
    with pytest.raises(DatasetError, match="an empty list"):
        open_cohort(root)


def test_no_template(tmp_path):
    study(tmp_path, "ab")
    with pytest.raises(DatasetError, match="no template"):
        open_cohort(tmp_path)
    with pytest.raises(DatasetError, match="labeled_num is 0"):
        open_cohort(study(tmp_path / "listed", "ab", "a", train="a\nb"), labeled_num=0)
    with pytest.raises(DatasetError, match=r"(?m)^nobody +stops the run"):
        open_cohort(tmp_path, template="nobody")


def test_the_first_listed_case_has_no_label(root):
    label_of(root, "t").unlink()
    with pytest.raises(DatasetError, match="(?s)without a.*label"):
        open_cohort(root)


def test_an_empty_pool(root):
    for name in "ab":
        halve(image_of(root, name))
    with pytest.raises(DatasetError, match="no usable case"):
        open_cohort(root)
    assert set(open_cohort(root, need_pool=False).set_aside) == {"a", "b"}


@pytest.mark.parametrize(
    "spoil", [halve, lambda path: write_nifti(path, organ()[:-1]), lambda path: path.write_bytes(b"")]
)
def test_a_bad_label_without_a_list_says_why_its_scan_is_a_template(tmp_path, spoil):
    study(tmp_path, "abc", "ab")
    spoil(label_of(tmp_path, "b"))
    with pytest.raises(CohortError) as stopped:
        open_cohort(tmp_path)
    (problem,) = [problem for problem in stopped.value.problems if problem.severity == STOPS]
    assert problem.case == "b" and problem.found.endswith("the scan counts as a template because it has a label")
    assert problem.remedy.endswith(", or name the templates: --template, or train.txt")
    assert names(open_cohort(tmp_path, template="a").pool) == ["b", "c"]
    with pytest.raises(CohortError) as stopped:  # where a list or a name made it one, there is nothing to explain
        open_cohort(tmp_path, template=["a", "b"])
    assert "because" not in str(stopped.value)


def test_all_cases_labelled_and_no_list_leaves_no_pool(tmp_path):
    with pytest.raises(DatasetError, match="(?s)pool is empty.*--template"):
        open_cohort(study(tmp_path, "ab", "ab"))


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_no_data_set(tmp_path, kind):
    path = tmp_path / "here"
    if kind == "file":
        path.touch()
    if kind == "empty":
        path.mkdir()
    with pytest.raises(DatasetError, match="stops the run"):
        open_cohort(path)


def test_two_files_of_one_case(root):
    nibabel.save(nibabel.load(image_of(root)), root / "images" / "a.nii")
    nibabel.save(nibabel.load(label_of(root, "b")), root / "labels" / "b.nii")
    cohort = open_cohort(root)
    assert "2 images: a.nii, a.nii.gz" in cohort.set_aside["a"]
    assert cohort.case("b").label is None


def test_files_that_no_case_uses_are_named_once(root):
    for name in "uvwx":
        write_nifti(image_of(root, name), voxels())
    write_nifti(label_of(root, "q"), organ())
    found = [problem.found for problem in open_cohort(root).problems]
    assert found == ["4 images in no list: u, v, w ...", "1 label without an image: q"]
