"""Images at any path become cases, or the reason is said."""

import pytest

from semisam_o1.data.images import cases_of, image_files, readable_cases
from semisam_o1.types import DatasetError
from tests.data.studies import organ, write_nifti


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize("inside", ["images", "data", "."])
def test_the_images_of_a_folder(tmp_path, inside):
    made = [touch(tmp_path / inside / name) for name in ("b.nii.gz", "a.mha", "notes.txt")]
    assert image_files(tmp_path) == [made[1], made[0]]


def test_cases_are_named_after_their_files(tmp_path):
    cases = cases_of([touch(tmp_path / "b.nii.gz"), touch(tmp_path / "a.nrrd")])
    assert [(case.name, case.split, case.label) for case in cases] == [("b", "new", None), ("a", "new", None)]


@pytest.mark.parametrize(
    ("names", "found"),
    [(["a.jpg"], "unknown format"), (["a.nii", "other/a.mha"], "also called 'a'"), (["a\n.nii"], "control characters")],
)
def test_files_that_cannot_be_cases(tmp_path, names, found):
    with pytest.raises(DatasetError, match=found):
        cases_of([touch(tmp_path / name) for name in names])


def test_a_missing_file(tmp_path):
    with pytest.raises(DatasetError, match="no such file"):
        cases_of(tmp_path / "a.nii")


def test_unreadable_images_are_left_out(tmp_path, caplog):
    good = tmp_path / "good.nii.gz"
    write_nifti(good, organ())
    assert [case.name for case in readable_cases([good, touch(tmp_path / "bad.nii.gz")])] == ["good"]
    assert "bad" in caplog.text
    heading, first = caplog.records[-1].getMessage().splitlines()[:2]  # a log's prefix does not shift the columns
    assert heading == "problems found in the images:" and first.startswith("case  effect")
    with pytest.raises(DatasetError):
        readable_cases(tmp_path / "bad.nii.gz")
