"""The whole job on a phantom cohort: what a run writes, and the ways to start it."""

import csv
import json
import shutil

import h5py
import nibabel
import numpy as np
import pytest
import torch

from semisam_o1.cli import main
from semisam_o1.errors import chain as chain_of
from semisam_o1.job import Job, record
from semisam_o1.lock import lock_folder
from semisam_o1.report.overlap import mean_dice
from semisam_o1.types import DatasetError
from tests.jobs import CONFIGS, SMALL, assert_same_labels, bundle, bundle_process, config_of, labels, small


def test_writes_what_the_readme_names(run, phantom_dir):
    pool = len((phantom_dir / "train.txt").read_text().split()) - 1
    assert len(labels(run / "pseudo_labels")) == pool
    assert len(labels(run / "round_0" / "labels")) == pool
    for number in (1, 2):
        folder = run / f"round_{number}"
        assert set(torch.load(folder / "model.pt", weights_only=True))
        assert len(labels(folder / "predictions")) == len(labels(folder / "uncertainty")) == pool + 2  # val, test
    assert len(labels(run / "round_1" / "labels")) == pool
    assert not (run / "round_2" / "labels").exists()  # the last round is not refined
    assert_same_labels(run / "pseudo_labels", run / "round_2" / "predictions", only=pool)
    assert "<html" in (run / "report.html").read_text().lower()
    assert not list(run.rglob("*partial*"))


def test_labels_lie_on_their_scans(run, phantom_dir):
    for path in (run / "pseudo_labels").glob("*.nii.gz"):
        label, scan = nibabel.load(path), nibabel.load(phantom_dir / "images" / path.name)
        assert label.get_data_dtype() == np.uint8 and label.shape == scan.shape
        for field in ("sform_code", "qform_code", "pixdim", "xyzt_units"):
            np.testing.assert_array_equal(label.header[field], scan.header[field], err_msg=field)
        np.testing.assert_array_equal(label.affine, scan.affine)


def test_tables(run):
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert list(rows[0]) == "case split round stage class dice jaccard hd95_mm asd_mm".split()
    assert {(r["split"], r["round"], r["stage"]) for r in rows} == {
        ("pool", "0", "copied"), ("pool", "0", "propagated"),
        ("pool", "1", "predicted"), ("pool", "1", "refined"), ("pool", "2", "predicted"),
        ("val", "1", "predicted"), ("val", "2", "predicted"), ("test", "1", "predicted"), ("test", "2", "predicted"),
    }  # fmt: skip
    review = list(csv.DictReader((run / "review.csv").open()))
    assert [list(row) for row in review] == [
        ["case", "uncertainty", "predicted_dice", "low", "high", "class", "class_dice"]
        + ["outside", "odd", "cannot_tell", "reviewed"]
    ] * 2
    assert not any(row["cannot_tell"] for row in review)
    assert 0 <= float(review[0]["predicted_dice"]) <= float(review[1]["predicted_dice"]) <= 1
    quality = list(csv.DictReader((run / "round_2" / "quality.csv").open()))
    assert [row["predicted_dice"] for row in quality] == [row["predicted_dice"] for row in review]
    assert {row["case"]: row["predicted_dice"] for row in quality} == {
        row["case"]: row["predicted_dice"] for row in review
    }


def test_run_json_holds_settings_stages_and_versions(run, phantom_dir):
    record = json.loads((run / "run.json").read_text())
    settings = record["settings"]
    assert settings["max_iterations"] == 4 and settings["preset"] == "quick" and settings["seed"] == 1337
    assert settings["dataset_dir"] == str(phantom_dir) and settings["train_spacing"] > 0
    assert record["template"] and record["set_aside"] == {} and record["versions"]["torch"] == torch.__version__
    stages = [stage["stage"] for stage in record["stages"]]
    assert stages[:4] == ["features", "propagation", "label fusion", "copies of the template"]
    assert stages[4:6] == ["round 0: quality", "round 1: training"]
    assert stages[-2:] == ["round 2: quality", "evaluation"]
    assert all(stage["seconds"] >= 0 and stage["peak_memory_mib"] > 0 for stage in record["stages"])


def test_trained_bundle_names_the_classes(run):
    metadata = json.loads((run / "bundle" / "configs" / "metadata.json").read_text())
    output = metadata["network_data_format"]["outputs"]["pred"]
    assert output["num_channels"] == len(output["channel_def"]) == 3
    assert output["channel_def"]["0"] == "background"


@pytest.mark.slow
def test_bundle_writes_the_same_labels_as_the_command_line(run, begun, phantom_dir):
    """As a user types it, from round 1 on; the next test begins with round 0."""
    ids = {"dataset_dir": phantom_dir, "output_dir": begun, "device": "cpu"} | SMALL
    done = bundle_process("training", CONFIGS / "train.json", **ids)
    assert done.returncode == 0, done.stderr
    assert_same_labels(run / "pseudo_labels", begun / "pseudo_labels")


@pytest.mark.slow
def test_run_is_round_0_and_one_trainer(run, phantom_dir, tmp_path):
    ids = {"dataset_dir": str(phantom_dir), "output_dir": str(tmp_path), "device": "cpu"} | SMALL
    bundle("run", CONFIGS / "train.json", **ids)
    assert (tmp_path / "round_1" / "model.pt").is_file()
    assert_same_labels(run / "round_0" / "labels", tmp_path / "round_0" / "labels")
    assert not (tmp_path / "round_1" / "predictions").exists()


@pytest.mark.slow
def test_a_stage_can_be_run_again_alone(run, phantom_dir, tmp_path):
    """As a user types it: by "::", as Fire takes what follows a "#" for a comment."""
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    shutil.rmtree(copied / "round_2" / "predictions")
    kept = [copied / "round_0" / "quality.csv", copied / "round_2" / "model.pt", copied / "report.html"]
    before = [path.stat().st_mtime_ns for path in kept]
    ids = {"dataset_dir": str(phantom_dir), "output_dir": str(copied), "device": "cpu", "round": 2} | SMALL
    done = bundle_process("stage::prediction", CONFIGS / "train.json", **ids)
    assert done.returncode == 0, done.stderr
    assert_same_labels(run / "round_2" / "predictions", copied / "round_2" / "predictions")
    assert before == [path.stat().st_mtime_ns for path in kept]  # no other stage ran
    stages = [stage["stage"] for stage in json.loads((copied / "run.json").read_text())["stages"]]
    assert stages.count("round 2: prediction") == 1 and "propagation" in stages


def test_a_stage_alone_holds_the_lock_too(run, phantom_dir, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    with lock_folder(copied), pytest.raises(DatasetError, match="is being worked on by process"):
        Job(config_of(phantom_dir, copied)).alone("prediction", 2)


@pytest.mark.slow
def test_another_seed_writes_other_labels(run, phantom_dir, tmp_path):
    assert main(["run", str(phantom_dir), "--output", str(tmp_path), "--seed", "7", *small(num_rounds=1)]) == 0
    ours, theirs = labels(run / "round_1" / "predictions"), labels(tmp_path / "round_1" / "predictions")
    assert any((ours[name] != theirs[name]).any() for name in ours)


@pytest.mark.slow
def test_hdf5_layout_by_the_command_line(phantom_h5_dir, tmp_path):
    extra = small(num_rounds=1, spacing=1.0)
    assert main(["run", str(phantom_h5_dir), "--output", str(tmp_path), *extra]) == 0
    carried = json.loads((tmp_path / "bundle" / "configs" / "inference.json").read_text())
    assert carried["spacing"] == 1.0  # what HDF5 files of new scans have, where nothing else is said
    for name, label in labels(tmp_path / "pseudo_labels").items():
        with h5py.File(phantom_h5_dir / "data" / name.replace(".nii.gz", ".h5")) as file:
            assert label.shape == file["image"].shape


@pytest.mark.slow
def test_binary_label_merges_all_foreground_classes(phantom_dir, tmp_path):
    extra = small(binary_label=True, num_rounds=1, refine_last=True, guard=False)
    assert main(["run", str(phantom_dir), "--output", str(tmp_path), "--refinement", "volume", *extra]) == 0
    for stage in ("round_0/labels", "round_0/copied", "round_1/predictions", "round_1/labels", "pseudo_labels"):
        assert {number for label in labels(tmp_path / stage).values() for number in np.unique(label)} <= {0, 1}
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert {row["class"] for row in rows} == {"1", "mean"}
    copied, truth = labels(tmp_path / "round_0" / "copied"), labels(phantom_dir / "labels")
    for row in (row for row in rows if row["stage"] == "copied" and row["class"] == "1"):
        one, other = (torch.tensor(found[f"{row['case']}.nii.gz"] > 0) for found in (copied, truth))
        assert float(row["dice"]) == pytest.approx(mean_dice(one, other, 2), abs=1e-4)


def test_evaluate_predicts_what_is_missing(run, phantom_dir, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    test_case = (phantom_dir / "test.txt").read_text().split()[0]
    (copied / "round_2" / "predictions" / f"{test_case}.nii.gz").unlink()
    with lock_folder(copied):
        assert main(["evaluate", str(copied), str(phantom_dir), "--split", "test"]) == 2
    assert "being worked on" in capsys.readouterr().err
    assert main(["evaluate", str(copied), str(phantom_dir), "--split", "test"]) == 0
    assert "test" in capsys.readouterr().out
    assert_same_labels(run / "round_2" / "predictions", copied / "round_2" / "predictions")


def test_evaluate_counts_each_scan_of_the_pool_once(run, phantom_dir, tmp_path):
    """As touched or as untouched, whichever it is now; and not at all if the run set it aside."""
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    names = sorted(path.name.split(".")[0] for path in (run / "pseudo_labels").iterdir())

    def splits():
        assert main(["evaluate", str(copied), str(phantom_dir), "--split", "pool"]) == 0
        rows = [row for row in csv.DictReader((copied / "metrics.csv").open()) if row["class"] == "mean"]
        return {row["case"]: row["split"] for row in rows if row["split"] in ("pool", "touched")}, len(rows)

    before = splits()
    assert main(["review", str(copied), "--accept", names[0], "--data", str(phantom_dir)]) == 0
    assert splits() == (before[0] | {names[0]: "touched"}, before[1])
    assert main(["review", str(copied), "--undo", names[0], "--data", str(phantom_dir)]) == 0
    assert splits() == before
    record = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps(record | {"failed": {names[1]: "torn"}}))
    assert names[1] not in splits()[0]


def test_validate_says_what_a_run_will_take(phantom_dir, capsys):
    assert main(["validate", str(phantom_dir), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "pool" in said and "A run (preset quick, 6 rounds of training) will take" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "standard"], "(preset standard, 3 rounds of training)"),
        (["--rounds", "1"], "(preset quick, 1 round of training)"),
        (["--rounds", "auto", "--set", "most_rounds=4"], "(preset quick, at most 4 rounds)"),
        (["--set", "num_rounds=0"], "(preset quick, no rounds of training)"),
    ],
)
def test_validate_estimates_the_run_that_is_meant(phantom_dir, capsys, options, said):
    assert main(["validate", str(phantom_dir), "--device", "cpu", *options]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"A run {said} will take" in text and ("training " in text.partition("cores (")[2]) == ("no r" not in said)


def test_propagate_leaves_a_trained_run_alone(run, phantom_dir, capsys):
    assert main(["propagate", str(phantom_dir), "--output", str(run), *small()]) == 2
    assert "another folder" in capsys.readouterr().err and (run / "bundle" / "models" / "model.pt").is_file()


class FailsOn:
    """A transform that cannot read the label of one case."""

    def __init__(self, name, chain):
        self.name, self.chain = name, chain

    def __call__(self, item):
        if item["case"] == self.name:
            raise OSError("the label cannot be read")
        return self.chain(item)


@pytest.mark.parametrize("name", ["phantom_01", "phantom_00"])
def test_a_scan_on_which_training_fails_costs_one_scan(phantom_dir, tmp_path, name):
    """The template stops the run."""
    config = config_of(phantom_dir, tmp_path / "run")
    chain = config["label_preprocessing"]
    config["label_preprocessing"] = [{"_target_": f"{FailsOn.__module__}.FailsOn", "name": name, "chain": chain}]
    job = Job(config)
    if name == "phantom_00":
        with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - MONAI wraps some errors
            job.run()
        assert any("case phantom_00 cannot be prepared" in str(part) for part in chain_of(caught.value))
        return
    job.run()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert list(record["set_aside"]) == [name] and "training failed: case phantom_01" in record["set_aside"][name]
    assert [path.name for path in (tmp_path / "run" / "pseudo_labels").iterdir()] == ["phantom_02.nii.gz"]


def test_a_scan_that_is_damaged_meanwhile_costs_one_scan(phantom_dir, tmp_path, capfd):
    """After the checks, before its features; the template stops the run."""
    for name, status in (("phantom_01", None), ("phantom_00", "truncated or damaged")):
        data = shutil.copytree(phantom_dir, tmp_path / f"data_{name}")
        job = Job(config_of(data, tmp_path / name))
        assert job.cohort.pool
        (data / "images" / f"{name}.nii.gz").write_bytes((data / "images" / f"{name}.nii.gz").read_bytes()[:999])
        if status is None:
            job.run()
            record = json.loads((tmp_path / name / "run.json").read_text())
            assert list(record["set_aside"]) == [name] and "features failed" in record["set_aside"][name]
            assert [path.name for path in (tmp_path / name / "pseudo_labels").iterdir()] == ["phantom_02.nii.gz"]
        else:
            with pytest.raises(Exception, match="cannot be prepared|damaged"):
                job.run()


@pytest.mark.slow
def test_warnings_of_the_data_set_stay_with_the_run(phantom_dir, tmp_path):
    """Two forms that differ: said in problems.csv, run.json and the report, not in the terminal alone."""
    data = shutil.copytree(phantom_dir, tmp_path / "data")
    path = data / "images" / "phantom_01.nii.gz"
    image = nibabel.load(path)
    moved = image.affine.copy()
    moved[0, 3] += 5
    image.set_sform(image.affine, 1)
    image.set_qform(moved, 1)
    image.to_filename(path)
    assert main(["propagate", str(data), "--output", str(tmp_path / "run"), "--device", "cpu", *small()]) == 0
    (found,) = json.loads((tmp_path / "run" / "run.json").read_text())["warnings"]
    assert found.startswith("case phantom_01: sform and qform differ")
    assert "phantom_01" in (tmp_path / "run" / "problems.csv").read_text()
    assert "sform and qform differ" in (tmp_path / "run" / "report.html").read_text()


def test_versions_are_those_of_the_installed_packages(monkeypatch):
    monkeypatch.setattr(record, "PACKAGES", ("torch", "a-package-that-is-not-installed"))
    record.versions.cache_clear()
    assert set(record.versions()) == {"semisam-o1", "torch"}
    record.versions.cache_clear()
