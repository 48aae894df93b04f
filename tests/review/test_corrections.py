"""The command ``review``: what people do with labels is taken, and what does not fit is refused and kept."""

import json
import logging
import shutil
import sys
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from semisam_o1.cli import main
from semisam_o1.job.reopen import cohort_of
from semisam_o1.job.results import hand_out
from semisam_o1.job.review import review, why
from semisam_o1.lock import lock_folder
from semisam_o1.review.corrections import Corrections, mark, telling_names
from semisam_o1.review.ranking import Known
from semisam_o1.reviewed import Reviewed
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import DatasetError, UserError
from tests.jobs import cohort_of as cohort_of_cases
from tests.jobs import labels


@pytest.fixture
def mine(run, tmp_path):
    """A finished run of the pool phantom_01 and phantom_02 that may be written to."""
    return RunFolder(shutil.copytree(run, tmp_path / "run"))


def entries(run):
    return Reviewed(run.reviewed).entries()


def truth_of(data, name, path, change=lambda array: array):
    """The true label of a case in another file."""
    stored = nibabel.load(data / "labels" / f"{name}.nii.gz")
    array = change(np.asarray(stored.dataobj).copy())
    nibabel.save(
        nibabel.Nifti1Image(array, stored.affine, stored.header if array.shape == stored.shape else None), path
    )
    return path


def test_an_accepted_label_is_kept_as_it_is(mine):
    text, whole = review(mine.path, accept=["phantom_01"])
    assert whole and "phantom_01" in text and "accepted" in text and "next: phantom_02" in text
    (entry,) = entries(mine).values()
    assert (entry.what, entry.round, entry.voxels_changed, entry.dice) == ("accepted", 2, 0, 1.0)
    found = labels(mine.reviewed)["phantom_01.nii.gz"]
    np.testing.assert_array_equal(found, labels(mine.pseudo_labels)["phantom_01.nii.gz"])


def test_a_label_from_elsewhere_is_found_by_its_name_or_by_as(mine, phantom_dir, tmp_path):
    named = truth_of(phantom_dir, "phantom_01", tmp_path / "phantom_01.nii.gz")
    assert main(["review", str(mine.path), "--take", str(named)]) == 0
    other = truth_of(phantom_dir, "phantom_02", tmp_path / "mine.nii")
    assert main(["review", str(mine.path), "--take", str(other)]) == 1  # no case of that name
    assert main(["review", str(mine.path), "--take", str(other), "--as", "phantom_02"]) == 0
    for name in ("phantom_01", "phantom_02"):
        found = labels(mine.reviewed)[f"{name}.nii.gz"]
        np.testing.assert_array_equal(found, labels(phantom_dir / "labels")[f"{name}.nii.gz"])
        before = labels(mine.pseudo_labels)[f"{name}.nii.gz"]
        assert entries(mine)[name].voxels_changed == (found != before).sum()


def test_names_of_segments_tell_nothing_where_there_is_one_class(tmp_path):
    """Whoever outlined it may have called it otherwise."""
    path = tmp_path / "labels" / "final" / "a.nii.gz"
    final = {"ext": ".nii.gz", "info": {"label_info": [{"name": "left atrium", "idx": 1}]}}
    (tmp_path / "datastore_v2.json").write_text(json.dumps({"objects": {"a": {"labels": {"final": final}}}}))
    two, three = (cohort_of_cases([], classes=count) for count in (2, 3))
    assert telling_names(two, path) == telling_names(replace(three, binary=True), path) == {}
    assert telling_names(replace(two, named={1: "heart"}), path) == telling_names(three, path) == {1: "left atrium"}


def test_a_label_saved_in_place_is_taken(mine, phantom_dir):
    truth_of(phantom_dir, "phantom_02", mine.pseudo_label("phantom_02"))
    text, whole = review(mine.path)
    assert whole and entries(mine)["phantom_02"].what == "corrected" and "new for the next start of the run: 1" in text
    review(mine.path)
    assert len(list(mine.reviewed.glob("*.nii.gz"))) == 1  # taken once


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda array: array[:-1], "is refused: .*grid|is refused"),
        (lambda array: np.where(array > 0, 9, 0).astype(array.dtype), "holds class 9"),
        (lambda array: np.zeros_like(array), "is refused"),
    ],
)
def test_a_label_that_does_not_fit_is_refused_and_kept(mine, phantom_dir, tmp_path, caplog, change, said):
    odd = truth_of(phantom_dir, "phantom_01", tmp_path / "phantom_01.nii.gz", change)
    kept = odd.read_bytes()
    text, whole = review(mine.path, take=[odd], accept=["phantom_02"])
    assert not whole and odd.read_bytes() == kept
    assert "case phantom_01: phantom_01.nii.gz is refused" in caplog.text
    assert list(entries(mine)) == ["phantom_02"]  # the other step was taken


def test_a_scan_is_rejected_and_taken_back(mine):
    text, whole = review(mine.path, reject=["phantom_02"])
    assert whole and "rejected" in text
    assert mine.pseudo_label("phantom_02").is_file()  # until the run goes on
    text, whole = review(mine.path, undo=["phantom_02"])
    assert whole and entries(mine) == {}


def test_a_label_saved_in_place_that_is_taken_back_stays_back(mine, phantom_dir):
    handed_out = labels(mine.pseudo_labels)["phantom_02.nii.gz"]
    saved = truth_of(phantom_dir, "phantom_02", mine.pseudo_label("phantom_02")).read_bytes()
    review(mine.path)
    for _ in range(2):
        review(mine.path, undo=["phantom_02"])
        assert entries(mine) == {}
        np.testing.assert_array_equal(labels(mine.pseudo_labels)["phantom_02.nii.gz"], handed_out)
    assert saved in [path.read_bytes() for path in mine.reviewed.glob("*.nii.gz")]  # and is not lost


def test_cases_that_are_none_of_the_pool_are_refused(mine, caplog):
    _, whole = review(mine.path, accept=["phantom_00", "nobody"], reject=["phantom_03"], undo=["phantom_01"])
    assert not whole and entries(mine) == {}
    for said in (
        "phantom_00 is a template",
        "has no case 'nobody'; the nearest names: phantom_0",
        "--reject phantom_03",
        "--undo phantom_01",
    ):
        assert said in caplog.text


def test_a_label_in_a_file_of_another_name_is_refused_with_what_to_do(mine, tmp_path, caplog):
    file = shutil.copy(mine.pseudo_label("phantom_01"), tmp_path / "corrected.nii.gz")
    assert not review(mine.path, take=[file])[1]
    assert "has no case 'corrected'" in caplog.text and "Say whose it is: --as CASE; a new scan goes" in caplog.text
    caplog.clear()
    file = shutil.copy(mine.pseudo_label("phantom_01"), tmp_path / "phantom_00.nii.gz")
    assert not review(mine.path, take=[file])[1]
    assert "phantom_00 is a template" in caplog.text and "--as" not in caplog.text


def test_the_label_of_a_template_counts_already_and_another_one_is_refused(mine, phantom_dir, tmp_path, caplog):
    file = truth_of(phantom_dir, "phantom_00", tmp_path / "phantom_00.nii.gz")
    with caplog.at_level(logging.INFO):
        assert review(mine.path, take=[file])[1]
    assert "it counts already" in caplog.text and entries(mine) == {}
    wrong = shutil.copy(mine.pseudo_label("phantom_01"), file)
    assert not review(mine.path, take=[wrong])[1] and entries(mine) == {}


def test_a_label_saved_in_place_that_does_not_fit_is_said_by_the_status(mine, caplog):
    saved = mine.pseudo_label("phantom_02")
    saved.write_bytes(b"no image")
    assert not review(mine.path)[1]
    assert "stays where it is" in caplog.text and saved.read_bytes() == b"no image" and entries(mine) == {}


def test_a_label_that_was_taken_is_no_news(mine, phantom_dir, tmp_path, caplog):
    file = truth_of(phantom_dir, "phantom_01", tmp_path / "phantom_01.nii.gz")
    before = review(mine.path, take=[file])
    row = entries(mine)
    with caplog.at_level(logging.INFO):
        assert review(mine.path, take=[file]) == before
    assert entries(mine) == row and not Reviewed(mine.reviewed).earlier.exists()
    assert "case phantom_01: corrected" in caplog.text and "already" in caplog.text


def test_refusals_are_said_after_the_table(mine, capsys):
    logger = logging.getLogger("semisam_o1")
    logger.addHandler(handler := logging.StreamHandler(sys.stdout))
    try:
        assert main(["review", str(mine.path), "--accept", "nobody", "phantom_01"]) == 1
    finally:
        logger.removeHandler(handler)
    said = capsys.readouterr().out
    assert said.index("phantom_01: accepted") < said.index("reviewed; next:") < said.index("has no case 'nobody'")


@pytest.mark.parametrize(
    "steps, said",
    [
        ({"accept": ["phantom_01"], "reject": ["phantom_01"]}, "--accept phantom_01 and --reject phantom_01"),
        ({"reject": ["phantom_01"], "undo": ["phantom_01"]}, "--reject phantom_01 and --undo phantom_01"),
        ({"take": ["a/phantom_01.nii.gz"], "accept": ["phantom_01"]}, "--take a/phantom_01.nii.gz and --accept"),
        ({"take": ["mine.nii"], "case": "phantom_01", "undo": ["phantom_01"]}, "--take mine.nii and --undo phantom_01"),
        ({"take": ["a/phantom_01.nii", "b/phantom_01.nii"]}, "--take a/phantom_01.nii and --take b/phantom_01.nii"),
    ],
)
def test_steps_that_contradict_each_other_are_refused_before_anything_is_done(mine, steps, said):
    with pytest.raises(DatasetError, match=f"case phantom_01: {said}.*: expected one step a case. Nothing was done"):
        review(mine.path, **{"accept": ["phantom_02"]} | steps)
    assert not mine.reviewed.exists()


def test_a_label_from_monai_label_does_not_stand_in_the_way_of_a_rejection(mine, phantom_dir, tmp_path):
    submitted = truth_of(phantom_dir, "phantom_01", tmp_path / "phantom_01.nii.gz")
    _, whole = review(mine.path, reject=["phantom_01"], submitted=[submitted])
    assert whole and entries(mine)["phantom_01"].what == "rejected"


def test_one_step_given_twice_is_no_contradiction(mine):
    assert review(mine.path, accept=["phantom_01", "phantom_01"])[1] and list(entries(mine)) == ["phantom_01"]


@pytest.mark.parametrize("near, said", [(0, "no other scan"), (1, "1 other scan"), (2, "2 other scans")])
def test_the_reason_counts_the_scans_that_a_label_helps(near, said):
    distances = np.array([[0.0, 5, 5], [1 if near > 0 else 5, 0, 5], [1 if near > 1 else 5, 5, 0]])
    known = Known(distances, np.full(3, 2.0), np.zeros(3), np.zeros(3))
    assert why(known, 0) == f"helps {said}"


def test_a_run_that_is_at_work_is_left_alone(mine, capsys):
    with lock_folder(mine.path):
        assert main(["review", str(mine.path), "--accept", "phantom_01"]) == 2
    assert "being worked on" in capsys.readouterr().err and not mine.reviewed.exists()


def test_a_label_changed_in_the_folder_is_taken_anew_and_one_that_no_longer_fits_is_named(mine, phantom_dir, caplog):
    review(mine.path, accept=["phantom_01", "phantom_02"])
    truth_of(phantom_dir, "phantom_01", mine.reviewed / "phantom_01.nii.gz")
    truth_of(phantom_dir, "phantom_02", mine.reviewed / "phantom_02.nii.gz", lambda array: array[:-1])
    found = Corrections(mine, cohort_of(mine, check=False)).usable()
    assert list(found) == ["phantom_01"] and entries(mine)["phantom_01"].what == "corrected"
    assert "phantom_02" in caplog.text and "It is not used, and stays where it is." in caplog.text


def test_a_step_counts_after_a_label_that_was_saved_in_place(mine, phantom_dir, tmp_path):
    truth_of(phantom_dir, "phantom_01", mine.pseudo_label("phantom_01"))
    saved = truth_of(phantom_dir, "phantom_02", mine.pseudo_label("phantom_02")).read_bytes()
    for _ in range(2):
        review(mine.path, reject=["phantom_01"])
        assert entries(mine)["phantom_01"].what == "rejected"
    better = truth_of(phantom_dir, "phantom_02", tmp_path / "phantom_02.nii.gz", lambda array: np.roll(array, 1, 0))
    for steps in ({"take": [better]}, {}):
        review(mine.path, **steps)
        for path in (Reviewed(mine.reviewed).label("phantom_02"), mine.pseudo_label("phantom_02")):
            assert path.read_bytes() == better.read_bytes()
    assert saved in [path.read_bytes() for path in mine.reviewed.glob("phantom_02_*.nii.gz")]
    mine.pseudo_label("phantom_02").write_bytes(saved)  # saved in place once more, it is the last word
    review(mine.path)
    assert Reviewed(mine.reviewed).label("phantom_02").read_bytes() == saved


def test_a_label_saved_while_the_run_works_stays_for_the_next_start(mine, phantom_dir):
    """The run has taken the first version; the second came after it."""
    path, cohort = mine.pseudo_label("phantom_02"), cohort_of(mine, check=False)
    truth_of(phantom_dir, "phantom_02", path)
    corrections = Corrections(mine, cohort)
    corrections.take_saved()
    touched = cohort.with_reviewed(corrections.usable()).touched
    later = truth_of(phantom_dir, "phantom_02", path, lambda array: np.roll(array, 1, 0)).read_bytes()
    hand_out(mine.round(2), mine, [cohort.case("phantom_02")], touched)
    assert path.read_bytes() == later and corrections.saved_in_place() == ["phantom_02"]


def test_a_step_whose_label_was_removed_can_be_taken_back(mine):
    review(mine.path, accept=["phantom_01", "phantom_02"])
    (mine.reviewed / "phantom_01.nii.gz").unlink()
    with pytest.raises(UserError, match="--undo phantom_01"):
        review(mine.path)
    assert review(mine.path, undo=["phantom_01"])[1] and list(entries(mine)) == ["phantom_02"]


def test_labels_of_validation_scans_are_taken_where_they_are_handed_out(mine, phantom_dir):
    path = mine.pseudo_label("phantom_03")
    with mine.ledger.writing(path) as aside:
        shutil.copyfile(mine.round(2).prediction("phantom_03"), aside)
    truth_of(phantom_dir, "phantom_03", path)
    assert review(mine.path)[1] and list(entries(mine)) == ["phantom_03"]
    assert not review(mine.path, reject=["phantom_03"])[1] and entries(mine)["phantom_03"].what != "rejected"


def test_what_was_taken_from_another_run_and_taken_back_stays_back(mine, tmp_path):
    other = RunFolder(shutil.copytree(mine.path, tmp_path / "other"))
    review(other.path, accept=["phantom_01"], reject=["phantom_02"])
    corrections = Corrections(mine, cohort_of(mine, check=False))
    known = {entry.case: mark(entry) for entry in corrections.import_from(other.reviewed)}
    assert set(known) == {"phantom_01", "phantom_02"} and corrections.import_from(other.reviewed) == []
    corrections.undo("phantom_01")
    assert corrections.import_from(other.reviewed, known) == []
    assert [entry.case for entry in corrections.import_from(other.reviewed)] == ["phantom_01"]
