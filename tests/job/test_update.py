"""The same command after a correction: it is taken in, what it changes is done again, and one more round is trained."""

import copy
import json
import shutil

import nibabel
import numpy as np
import pytest

from semisam_o1.cli import main, parser
from semisam_o1.files import write_json
from semisam_o1.job import Job
from semisam_o1.job.review import review
from semisam_o1.report.metrics import read_csv
from semisam_o1.reviewed import Reviewed
from semisam_o1.round_0 import engines
from semisam_o1.round_0.passes import Fused
from semisam_o1.runfolder import RunFolder
from semisam_o1.workflows import config_files, overrides, workflow
from tests.jobs import assert_same_labels, labels, small


def command(data, run, *more, **settings):
    return main(["run", str(data), "--output", str(run.path), "--device", "cpu", *more, *small(**settings)])


def workflow_of(data, run, **settings):
    options = parser().parse_args(["run", str(data), "--output", str(run), "--device", "cpu", *small(**settings)])
    return workflow(config_files(options), options.run_id, overrides(options))


def correct(run, data, name):
    """Save the truth of a case in place of its pseudo-label, as a viewer does."""
    stored, path = nibabel.load(data / "labels" / f"{name}.nii.gz"), run.pseudo_label(name)
    array = np.asarray(stored.dataobj)
    nibabel.save(nibabel.Nifti1Image(array.astype(np.uint8), stored.affine, stored.header), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def corrected(run, phantom_dir, made_once):
    """A finished run that went on after phantom_01 was corrected; not to be written to."""

    def make(folder):
        found = RunFolder(shutil.copytree(run, folder / "run"))
        correct(found, phantom_dir, "phantom_01")
        assert command(phantom_dir, found) == 0

    return RunFolder(made_once("corrected", make) / "run")


def test_a_correction_counts_and_only_what_it_changes_is_done(corrected, run, phantom_dir):
    before = RunFolder(run)
    truth = labels(phantom_dir / "labels")["phantom_01.nii.gz"]
    np.testing.assert_array_equal(labels(corrected.pseudo_labels)["phantom_01.nii.gz"], truth)
    assert Reviewed(corrected.reviewed).entries()["phantom_01"].what == "corrected"
    for kept in ("features/phantom_01.h5", "round_0/work/first/phantom_02.h5", "round_1/model.pt", "round_2/model.pt"):
        assert (corrected.path / kept).read_bytes() == (before.path / kept).read_bytes()
    fused = corrected.round(0).work("fused")
    assert Fused.atlases_of(fused, "phantom_02") == (["phantom_01"], [])
    assert corrected.rounds() == [0, 1, 2, 3] and corrected.round(3).model.is_file()
    record = corrected.read_record()
    assert [sorted(batch["labels"]) for batch in record["corrections"]] == [["phantom_01"]]
    assert (record["rounds"], record["more_rounds"], record["corrections"][0]["after_round"]) == (3, 1, 2)
    splits = {(row["split"], row["case"]) for row in read_csv(corrected.metrics)}
    assert ("touched", "phantom_01") in splits and ("pool", "phantom_01") not in splits
    assert "phantom_01" not in corrected.round(3).quality.read()


def test_a_start_without_news_does_nothing(corrected, phantom_dir, tmp_path):
    again = RunFolder(shutil.copytree(corrected.path, tmp_path / "run"))
    assert command(phantom_dir, again) == 0
    assert again.rounds() == [0, 1, 2, 3] and len(again.read_record()["corrections"]) == 1
    assert_same_labels(again.pseudo_labels, corrected.pseudo_labels)


def test_a_repeat_from_round_0_is_a_new_run_with_the_same_labels(corrected, phantom_dir, tmp_path):
    again, new = RunFolder(shutil.copytree(corrected.path, tmp_path / "run")), RunFolder(tmp_path / "new")
    assert command(phantom_dir, again, "--restart-from", "propagation") == 0
    assert command(phantom_dir, new, "--reviewed", str(corrected.reviewed)) == 0
    assert again.rounds() == new.rounds() == [0, 1, 2]
    assert set(new.read_record()["imported"]) == {"phantom_01"}
    for stage in ("round_0/labels", "round_2/predictions", "pseudo_labels", "reviewed"):
        assert_same_labels(again.path / stage, new.path / stage)


def test_a_correction_is_learned_from_though_fewer_rounds_are_asked_for(corrected, phantom_dir, tmp_path):
    again = RunFolder(shutil.copytree(corrected.path, tmp_path / "run"))
    review(again.path, accept=["phantom_02"])
    assert command(phantom_dir, again, num_rounds=1) == 0
    assert again.rounds() == [0, 1, 2, 3, 4] and again.read_record()["rounds"] == 4
    assert command(phantom_dir, again, num_rounds=1) == 0  # nothing is new
    assert again.rounds() == [0, 1, 2, 3, 4] and again.read_record()["best_round"] == 4


def test_a_label_that_does_not_fit_stays_where_it_was_saved(run, phantom_dir, tmp_path, capfd):
    """It counts for nothing, and the run neither replaces nor moves it, also while it learns from another one."""
    found = RunFolder(shutil.copytree(run, tmp_path / "run"))
    correct(found, phantom_dir, "phantom_01")
    path = found.pseudo_label("phantom_02")
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4)), path)
    refused = path.read_bytes()
    for _ in range(2):
        assert command(phantom_dir, found) == 0
        said = capfd.readouterr().out
        assert path.read_bytes() == refused and "phantom_02.nii.gz is refused" in said and "yours, not taken" in said
        assert [file.name for file in found.reviewed.glob("*.nii.gz")] == ["phantom_01.nii.gz"]


@pytest.mark.slow
def test_a_killed_update_goes_on(run, corrected, phantom_dir, tmp_path, monkeypatch):
    found = RunFolder(shutil.copytree(run, tmp_path / "run"))
    correct(found, phantom_dir, "phantom_01")
    with monkeypatch.context() as patched:
        patched.setattr(Job, "_work", stops_at("label fusion", Job._work))
        with pytest.raises(KeyboardInterrupt):
            run_workflow(phantom_dir, found)
    assert command(phantom_dir, found) == 0
    for stage in ("round_0/labels", "round_3/predictions", "pseudo_labels"):
        assert_same_labels(found.path / stage, corrected.path / stage)
    assert len(found.read_record()["corrections"]) == 1


def stops_at(title, whole):
    """`Job._work` of a process that is killed at the start of a stage."""

    def work(self, stage, cases=None):
        if stage.title == title:
            raise KeyboardInterrupt
        whole(self, stage, cases)

    return work


def run_workflow(data, run):
    """What the command runs, without its handling of errors."""
    job = workflow_of(data, run.path)
    job.initialize()
    Job(copy.deepcopy(job.parser.get())).run()


def test_a_rejected_scan_is_no_longer_learned_from(run, phantom_dir, tmp_path):
    found = RunFolder(shutil.copytree(run, tmp_path / "run"))
    review(found.path, reject=["phantom_01"])
    assert command(phantom_dir, found) == 0
    assert Fused.atlases_of(found.round(0).work("fused"), "phantom_02") == ([], [])
    record = found.read_record()
    assert record["set_aside"]["phantom_01"] == "rejected in review" and record["rounds"] == 3
    assert "phantom_01" not in {row["case"] for row in read_csv(found.metrics) if row["round"] == 3}
    assert not found.pseudo_label("phantom_01").exists() and found.pseudo_label("phantom_02").is_file()


@pytest.mark.slow
def test_a_reviewed_test_case_is_truth_and_never_trains(run, phantom_dir, tmp_path):
    data = shutil.copytree(phantom_dir, tmp_path / "data")
    label = next((data / "labels").glob("phantom_04*")).rename(tmp_path / "phantom_04.nii.gz")
    found = RunFolder(shutil.copytree(run, tmp_path / "run"))
    review(found.path, take=[label], dataset_dir=data)
    assert command(data, found) == 0
    assert found.rounds() == [0, 1, 2] and json.loads(found.record.read_text())["corrections"] == []
    assert any(row["split"] == "test" for row in read_csv(found.metrics))


def test_round_0_alone_learns_without_a_round(phantom_dir, tmp_path):
    found = RunFolder(tmp_path / "run")
    start = ["propagate", str(phantom_dir), "--output", str(found.path), "--device", "cpu", *small()]
    assert main(start) == 0
    correct(found, phantom_dir, "phantom_01")
    for more in ([], ["--restart-from", "propagation"]):
        assert main([*start, *more]) == 0
        assert found.rounds() == [0] and found.read_record()["rounds"] == 0
        assert Fused.atlases_of(found.round(0).work("fused"), "phantom_02") == (["phantom_01"], [])


def test_another_label_of_a_corrected_scan_is_carried_to_the_scans_that_it_serves(corrected, phantom_dir, tmp_path):
    """Its atlases are the same; what they carry is not."""
    found = RunFolder(shutil.copytree(corrected.path, tmp_path / "run"))
    path = found.pseudo_label("phantom_01")
    stored = nibabel.load(path)
    half = np.asarray(stored.dataobj).copy()
    half[: half.shape[0] // 2] = 0
    nibabel.save(nibabel.Nifti1Image(half, stored.affine, stored.header), path)
    assert command(phantom_dir, found, num_rounds=0) == 0
    before, after = (labels(one.path / "round_0" / "labels")["phantom_02.nii.gz"] for one in (corrected, found))
    assert (after > 0).sum() < (before > 0).sum() and len(found.read_record()["corrections"]) == 2


def test_a_correction_after_the_last_training_gets_a_round(run, phantom_dir, tmp_path):
    """The run was stopped before it had judged its last labels."""
    found = RunFolder(shutil.copytree(run, tmp_path / "run"))
    journal = json.loads(found.journal.read_text())
    assert journal["done"][-1] == "round_2/quality"
    write_json(found.journal, journal | {"done": journal["done"][:-1]})
    found.round(2).quality.path.unlink()
    review(found.path, accept=["phantom_01"])
    assert command(phantom_dir, found) == 0
    assert found.rounds() == [0, 1, 2, 3] and found.read_record()["corrections"][0]["round"] == 3
    assert found.round(2).quality.path.is_file()


@pytest.mark.parametrize("step, kept", [(None, True), ("round_2", True), ("propagation", False), ("features", False)])
def test_a_restart_from_round_0_tries_scans_again_that_had_failed(run, phantom_dir, tmp_path, step, kept):
    found = RunFolder(shutil.copytree(run, tmp_path / "run"))
    write_json(found.record, found.read_record() | {"failed": {"phantom_02": "a fault"}})
    flow = workflow_of(phantom_dir, found.path, restart_from=step)
    flow.initialize()
    job = Job(copy.deepcopy(flow.parser.get()))
    job._begin()
    assert ("phantom_02" in job.record.failed) == kept


@pytest.mark.slow
def test_fused_labels_of_a_killed_update_are_made_again_as_a_whole(run, corrected, phantom_dir, tmp_path, monkeypatch):
    """What is decided over all of them needs each of them: here it was killed when each had been fused."""
    found = RunFolder(shutil.copytree(run, tmp_path / "run"))
    correct(found, phantom_dir, "phantom_01")

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engines, "learned_outlines", killed)
        with pytest.raises(KeyboardInterrupt):
            run_workflow(phantom_dir, found)
    assert found.read_record()["stale"] == ["phantom_02"]
    assert command(phantom_dir, found, num_rounds=2) == 0
    assert found.read_record()["stale"] == []
    rows = [one.round(0).uncertainty.read() for one in (found, corrected)]
    assert rows[0] == rows[1]
    assert_same_labels(found.path / "round_0" / "labels", corrected.path / "round_0" / "labels")
