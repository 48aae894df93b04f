"""What rounds are worth and how far labels moved, on folders made by hand."""

import nibabel
import numpy as np
import pytest
import torch

from semisam_o1.files import write_text
from semisam_o1.job.selection import best_round, change, doubts, expected_gain, labels_round, mean_predicted_dice
from semisam_o1.round_0.quality import Quality
from semisam_o1.round_0.quality_estimate import copies_compared
from semisam_o1.runfolder import RoundFolder, RunFolder
from semisam_o1.types import Case, DatasetError
from tests.jobs import cohort_of


def judged(folder, *values: float | None):
    """A round whose labels have these predicted Dice; None: nobody can tell."""
    rest = (0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    found = [Quality(value or 0.9, *rest, doubt="" if value else "unlike the others").row([0]) for value in values]
    RoundFolder(folder).quality.write({f"case_{i}": row for i, row in enumerate(found)})
    return RoundFolder(folder)


def label(path, *voxels: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.array(voxels, np.uint8).reshape(-1, 1, 1), np.eye(4)), path)


def test_the_quality_of_a_round_is_the_mean_of_its_labels(tmp_path):
    assert mean_predicted_dice([judged(tmp_path / "round_1", 0.5, 0.8)]) == pytest.approx([0.65])
    assert mean_predicted_dice([RoundFolder(tmp_path)]) == [0]


def test_rounds_are_compared_by_the_labels_that_each_can_tell(tmp_path):
    """A poor label that falls into doubt must not raise the mean of its round."""
    folders = [judged(tmp_path / "round_0", 0.4, 0.8, None), judged(tmp_path / "round_1", None, 0.7, 0.9)]
    assert mean_predicted_dice(folders) == pytest.approx([0.8, 0.7])
    assert doubts(RunFolder(tmp_path), 1, 1, None)
    assert mean_predicted_dice([judged(tmp_path / "round_2", None), folders[0]]) == [0, 0]


def pool_of(folder, *names):
    label(folder / "scan.nii.gz", 0, 0, 0, 1)
    return cohort_of([], [Case(name, folder / "scan.nii.gz", None, "pool") for name in names])


def test_change_compares_the_labels_that_rounds_end_with(tmp_path):
    before, after = tmp_path / "round_0", tmp_path / "round_1"
    label(before / "labels" / "a.nii.gz", 1, 1, 0, 0)
    label(before / "labels" / "b.nii.gz", 1, 1, 0, 0)
    label(after / "predictions" / "a.nii.gz", 1, 0, 0, 0)  # Dice 2/3
    label(after / "predictions" / "b.nii.gz", 1, 1, 0, 0)
    folders = RoundFolder(before), RoundFolder(after)
    assert change(*folders, pool_of(tmp_path, "a", "b", "not labelled")) == pytest.approx(1 - (2 / 3 + 1) / 2)
    label(after / "labels" / "a.nii.gz", 0, 0, 1, 1)  # refined: that is what counts now
    label(after / "labels" / "b.nii.gz", 1, 1, 0, 0)
    assert folders[1].final("a") == after / "labels" / "a.nii.gz"
    assert change(*folders, pool_of(tmp_path, "a", "b")) == pytest.approx(0.5)


def test_a_pool_without_a_label_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"No usable scan is left \(b: prediction failed\)"):
        change(RoundFolder(tmp_path), RoundFolder(tmp_path), pool_of(tmp_path, "a").without({"b": "prediction failed"}))


def test_the_last_round_within_the_tolerance_is_best():
    assert best_round({1: 0.80, 2: 0.81, 3: 0.806}, 0.005) == 3
    assert best_round({1: 0.80, 2: 0.81, 3: 0.804}, 0.005) == 2
    assert best_round({1: 0.82, 2: 0.81, 3: 0.80}, 0) == 1


@pytest.mark.parametrize("ended, said", [(0.71, False), (0.67, False), (0.66, True)])
def test_labels_judged_clearly_worse_than_round_0_are_doubted(tmp_path, ended, said):
    judged(tmp_path / "round_0", 0.7)
    judged(tmp_path / "round_2", ended)
    found = doubts(RunFolder(tmp_path), 2, 2, None)
    assert len(found) == said
    if said:
        assert "round 2" in found[0] and "0.660, 0.700" in found[0]


def test_nothing_is_doubted_that_was_not_judged(tmp_path):
    judged(tmp_path / "round_0", 0.7)
    write_text(tmp_path / "round_1" / "uncertainty.csv", "case,uncertainty\n")
    assert doubts(RunFolder(tmp_path), 1, 1, None) == []


def copy(run, number, truth, first, last):
    """A copy of the template with its truth, and its labels of round 0 and of round 2, of one class."""
    probabilities = torch.eye(2)[torch.tensor(first)].T.reshape(2, -1, 1, 1)
    truth = torch.tensor(truth, dtype=torch.int16).reshape(-1, 1, 1)
    run.round(0).work("copies").save(f"copy_{number}", {"probabilities": probabilities}, {"truth": truth})
    label(run.round(2).copy(f"copy_{number}"), *last)


def test_what_the_network_differs_more_on_copies_than_on_scans_is_no_loss(tmp_path):
    run, cohort = RunFolder(tmp_path), pool_of(tmp_path, "a", "not labelled")
    assert expected_gain(run, 0, cohort) == 0 and expected_gain(run, 2, cohort) is None
    copy(run, 1, [1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0])  # of round 0: 1; of the network: 2/3, and so with round 0
    assert expected_gain(run, 2, cohort) is None  # no scan has labels of both
    label(run.round(0).label("a"), 1, 1, 0, 0)
    label(run.round(2).prediction("a"), 1, 1, 0, 0)
    assert expected_gain(run, 2, cohort) == pytest.approx(2 / 3 - 1 + 1 - 2 / 3)
    label(run.round(2).prediction("a"), 0, 1, 1, 0)  # they agree by 0.5
    copy(run, 2, [0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0])  # of round 0: 0.5; of the network: 1; they agree by 0.5
    found = expected_gain(run, 2, cohort)
    assert found == pytest.approx((2 / 3 + 1) / 2 - 0.75 + 0.5 - (2 / 3 + 0.5) / 2)
    label(run.round(2).prediction("a"), 1, 1, 0, 0)  # they agree: neither can be better
    assert expected_gain(run, 2, cohort) == 0


def test_the_gain_of_a_finished_run_is_kept_without_its_work_files(tmp_path):
    """So that the same labels are handed out again; it goes with the predictions that it is of."""
    run, cohort = RunFolder(tmp_path), pool_of(tmp_path, "a")
    run.round(2).keep_gain(-0.25)
    assert expected_gain(run, 2, cohort) == -0.25 and expected_gain(run, 1, cohort) is None
    assert labels_round(2, expected_gain(run, 2, cohort)) == 0
    assert run.round(2).remove(["prediction"], ["a"]) == ["prediction"] and expected_gain(run, 2, cohort) is None


def test_a_small_class_that_the_network_never_gives_is_a_loss(tmp_path):
    """Class 2 has no voxel of the copy; round 0 gives it a Dice of 0.4 in finer ones."""
    run, truth = RunFolder(tmp_path), torch.tensor([1, 1, 0], dtype=torch.int16).reshape(-1, 1, 1)
    probabilities = torch.eye(3)[truth.flatten().long()].T.reshape(3, -1, 1, 1)
    small = {"truth": truth, "small_dice": np.array([np.nan, 0.4])}
    run.round(0).work("copies").save("copy_1", {"probabilities": probabilities}, small)
    label(run.round(1).copy("copy_1"), 1, 1, 0)
    assert copies_compared(run, 1) == [pytest.approx((0.5, 0.7, 0.5))]
    label(run.round(1).copy("copy_1"), 1, 1, 2)  # given somewhere: copies cannot tell how well
    assert copies_compared(run, 1) == [(1, 1, 1)]
    small["small_dice"] = np.array([0.8, 0.4])
    run.round(0).work("copies").save("copy_1", {"probabilities": probabilities}, small)
    label(run.round(1).copy("copy_1"), 1, 0, 2)
    assert copies_compared(run, 1) == [pytest.approx((2 / 3, 1, 2 / 3))]  # all are small: class 1 counts on tokens
    small["truth"] = torch.zeros_like(truth)
    run.round(0).work("copies").save("copy_1", {"probabilities": probabilities}, small)
    assert copies_compared(run, 1) == []  # no class can be compared


@pytest.mark.parametrize(("gain", "handed_out"), [(None, 2), (0.1, 2), (-0.009, 2), (-0.011, 0)])
def test_labels_of_round_0_are_handed_out_if_training_is_expected_to_lose(tmp_path, gain, handed_out):
    assert labels_round(2, gain) == handed_out
    said = doubts(RunFolder(tmp_path), 2, handed_out, gain)
    assert any("Handed out are the labels of round 0" in text for text in said) == (handed_out == 0)


def test_a_known_gain_silences_the_doubt_by_predicted_dice(tmp_path):
    judged(tmp_path / "round_0", 0.7)
    judged(tmp_path / "round_2", 0.6)
    assert doubts(RunFolder(tmp_path), 2, 2, None) and not doubts(RunFolder(tmp_path), 2, 2, 0.0)
