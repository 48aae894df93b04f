"""What is done again leaves nothing of before, and what did not change stays: restarts and changed plans of rounds."""

import json
import shutil

import pytest

from semisam_o1.cli import main
from semisam_o1.job import Job
from semisam_o1.job import job as job_module
from semisam_o1.job.stages import refine
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import DatasetError
from tests.jobs import assert_same_labels, config_of, labels, small

ROUND_0 = {"num_rounds": 0}


def go(data, run: RunFolder, *options: str, **settings) -> int:
    return main(["run", str(data), "--output", str(run.path), "--device", "cpu", *options, *small(**settings)])


@pytest.fixture
def copied(run, tmp_path) -> RunFolder:
    """A finished run of two rounds, to be changed."""
    return RunFolder(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture(scope="module")
def with_copies(run, phantom_dir, made_once):
    """Round 0 of a run, with three copies of the template; not to be written to."""

    def make(folder):
        assert go(phantom_dir, RunFolder(folder / "run"), **ROUND_0, template_copies=3) == 0

    return made_once("with_copies", make) / "run"


def test_labels_are_those_of_the_first_pass_again_without_label_fusion(run, phantom_dir, tmp_path):
    fused = RunFolder(tmp_path / "fused")
    assert go(phantom_dir, fused, **ROUND_0) == 0
    assert fused.round(0).work("fused").names()
    theirs = fused.round(0).labels / "mine.nii.gz"
    theirs.write_text("mine")
    features = {path: path.stat().st_mtime_ns for path in fused.features.rglob("*.h5")}
    assert go(phantom_dir, fused, "--restart-from", "propagation/fusion", **ROUND_0, label_fusion=False) == 0
    assert not fused.round(0).work("fused").names() and theirs.read_text() == "mine"
    assert features == {path: path.stat().st_mtime_ns for path in fused.features.rglob("*.h5")}
    theirs.unlink()
    new = RunFolder(tmp_path / "new")
    assert go(phantom_dir, new, **ROUND_0, label_fusion=False) == 0
    before, after = (labels(one.round(0).labels) for one in (RunFolder(run), new))
    assert any((before[name] != after[name]).any() for name in before)
    assert_same_labels(fused.round(0).labels, new.round(0).labels)
    assert fused.round(0).quality.read() == new.round(0).quality.read()


def killed(*arguments, **more):
    raise KeyboardInterrupt


def test_copies_that_are_made_again_replace_all_of_before(with_copies, phantom_dir, tmp_path):
    found, new = RunFolder(shutil.copytree(with_copies, tmp_path / "run")), RunFolder(tmp_path / "new")
    first = {path.name: path.stat().st_mtime_ns for path in found.round(0).work("first").folder.iterdir()}
    again = ("--restart-from", "propagation/copies")
    assert go(phantom_dir, found, *again, **ROUND_0, template_copies=1) == 0
    assert go(phantom_dir, new, **ROUND_0, template_copies=1) == 0
    assert found.round(0).work("copies").names() == ["copy_1"]
    assert found.round(0).calibration.read_bytes() == new.round(0).calibration.read_bytes()
    assert found.round(0).quality.read() == new.round(0).quality.read()
    assert first == {path.name: path.stat().st_mtime_ns for path in found.round(0).work("first").folder.iterdir()}


@pytest.mark.parametrize("place", ["remove_stale", "_work"])
def test_a_kill_leaves_no_copies_of_other_settings(with_copies, phantom_dir, tmp_path, monkeypatch, place):
    """Inside the stage and before the change, or after the change and before anything was removed."""
    found = RunFolder(shutil.copytree(with_copies, tmp_path / "run"))
    journal = json.loads(found.journal.read_text())
    journal["done"] = journal["done"][: journal["done"].index("propagation/copies")]
    found.journal.write_text(json.dumps(journal))
    if place == "remove_stale":
        with monkeypatch.context() as patched:
            patched.setattr(job_module, "remove_stale", killed)
            assert go(phantom_dir, found, **ROUND_0, template_copies=1) != 0
    assert go(phantom_dir, found, **ROUND_0, template_copies=1) == 0
    assert found.round(0).work("copies").names() == ["copy_1"]


def test_predictions_that_are_made_again_are_judged_anew(copied, phantom_dir):
    folder, calibration = copied.round(1), copied.round(0).calibration
    shutil.copy(calibration, folder.calibration)
    before = [(path, path.read_bytes(), path.stat().st_mtime_ns) for path in (folder.model, calibration)]
    assert go(phantom_dir, copied, "--restart-from", "round_1/prediction", num_rounds=1) == 0
    assert not folder.calibration.exists()  # its network labelled no copies
    assert before == [(path, path.read_bytes(), path.stat().st_mtime_ns) for path, *_ in before]
    assert not folder.labels.exists() and folder.refined is None  # the last round is not refined


# Another number of rounds


def assert_as_planned(found: RunFolder, new: RunFolder, number: int) -> None:
    """``number``: the last round."""
    assert_same_labels(found.pseudo_labels, new.pseudo_labels)
    assert (found.review.read_bytes(), found.metrics.read_bytes()) == (
        new.review.read_bytes(),
        new.metrics.read_bytes(),
    )
    assert found.round(number).quality.read() == new.round(number).quality.read()


def test_fewer_and_more_rounds_give_what_a_run_of_so_many_gives(run, copied, phantom_dir, tmp_path):
    new, last = RunFolder(tmp_path / "new"), copied.round(2).model
    kept = last.stat().st_mtime_ns
    shutil.copytree(copied.path, new.path)
    assert go(phantom_dir, new, "--restart-from", "round_1/prediction", num_rounds=1) == 0
    assert not new.round(1).labels.exists() and not new.round(2).path.exists()
    for _ in range(2):
        assert go(phantom_dir, copied, num_rounds=1) == 0
        assert_as_planned(copied, new, 1)
    assert_same_labels(copied.pseudo_labels, copied.round(1).predictions, only=2)
    assert go(phantom_dir, copied) == 0  # two again
    assert_as_planned(copied, RunFolder(run), 2)
    assert copied.round(1).quality.read() == RunFolder(run).round(1).quality.read()
    assert last.stat().st_mtime_ns == kept  # no training was repeated
    assert go(phantom_dir, new, num_rounds=2) == 0
    assert_as_planned(new, RunFolder(run), 2)
    assert new.round(1).quality.read() == RunFolder(run).round(1).quality.read()  # of the refined labels
    done = json.loads(new.journal.read_text())["done"]
    assert done == json.loads((run / "progress.json").read_text())["done"]


def test_a_run_of_no_rounds_hands_out_no_bundle(copied, phantom_dir):
    theirs = copied.bundle / "mine.txt"
    theirs.write_text("mine")
    assert go(phantom_dir, copied, num_rounds=0) == 0
    assert_same_labels(copied.pseudo_labels, copied.round(0).labels)
    assert [path for path in copied.bundle.rglob("*") if path.is_file()] == [theirs]
    assert copied.round(2).model.is_file()


def test_a_single_stage_keeps_the_rounds_of_the_run(copied, phantom_dir):
    Job(config_of(phantom_dir, copied.path, num_rounds=6)).alone("quality", 2)
    record = copied.read_record()
    assert (record["rounds"], record["best_round"]) == (2, 2)


def test_a_refinement_without_a_scan_says_why(copied, phantom_dir):
    job = Job(config_of(phantom_dir, copied.path))
    job.record.fail({case.name: "training failed" for case in job.cohort.pool})
    with pytest.raises(DatasetError, match=r"No usable scan is left \(phantom_01: training failed"):
        refine(job, 1)
