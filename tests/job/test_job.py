"""The whole job on a phantom cohort: every shipped config, the two ways to start it, and what it writes."""

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

import semisam_o1
from semisam_o1.cli import config_files, main, parser
from semisam_o1.data.datasets import open_cohort
from semisam_o1.job.job import Job
from semisam_o1.job.resume import lock_folder
from semisam_o1.job.training_data import training_items
from semisam_o1.networks.unet3d import UNet3D, UNet3DSDF
from semisam_o1.report.overlap import mean_dice
from semisam_o1.round_0.quality import Quality
from semisam_o1.runfolder import RoundFolder
from tests.job.conftest import SMALL, assert_same_labels, labels, small

CONFIGS = Path(semisam_o1.BUNDLE_ROOT) / "configs"
GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden files in {GOLDEN}")


def bundle(run_id: str, config: Path, **ids) -> subprocess.CompletedProcess:
    """``python -m monai.bundle run``, as a user types it."""
    said = [part for name, value in ids.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str(config), *said]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


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
    assert [list(row) for row in review] == [["case", "uncertainty", "predicted_dice"]] * 2
    assert 0 <= float(review[0]["predicted_dice"]) <= float(review[1]["predicted_dice"]) <= 1
    quality = list(csv.DictReader((run / "round_2" / "quality.csv").open()))
    assert [row["case"] for row in quality] == [row["case"] for row in review]


def test_run_json_holds_settings_stages_and_versions(run, phantom_dir):
    record = json.loads((run / "run.json").read_text())
    settings = record["settings"]
    assert settings["max_iterations"] == 4 and settings["preset"] == "quick" and settings["seed"] == 1337
    assert settings["dataset_dir"] == str(phantom_dir) and settings["train_spacing"] > 0
    assert record["template"] and record["set_aside"] == {} and record["versions"]["torch"] == torch.__version__
    stages = [stage["stage"] for stage in record["stages"]]
    assert stages[:4] == ["features", "propagation", "label fusion", "round 0: quality"]
    assert stages[4] == "round 1: training" and stages[-2:] == ["round 2: quality", "evaluation"]
    assert all(stage["seconds"] >= 0 and stage["peak_memory_mib"] > 0 for stage in record["stages"])


def test_bundle_writes_the_same_labels_as_the_command_line(run, phantom_dir, tmp_path):
    done = bundle(
        "training", CONFIGS / "train.json", dataset_dir=phantom_dir, output_dir=tmp_path / "run", device="cpu", **SMALL
    )
    assert done.returncode == 0, done.stderr
    assert_same_labels(run / "pseudo_labels", tmp_path / "run" / "pseudo_labels")


def test_another_seed_writes_other_labels(run, phantom_dir, tmp_path):
    assert main(["run", str(phantom_dir), "--output", str(tmp_path), "--seed", "7", *small(num_rounds=1)]) == 0
    ours, theirs = labels(run / "round_1" / "predictions"), labels(tmp_path / "round_1" / "predictions")
    assert any((ours[name] != theirs[name]).any() for name in ours)


def test_run_is_round_0_and_one_trainer(phantom_dir, tmp_path):
    done = bundle("run", CONFIGS / "train.json", dataset_dir=phantom_dir, output_dir=tmp_path, device="cpu", **SMALL)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "round_1" / "model.pt").is_file() and labels(tmp_path / "round_0" / "labels")
    assert not (tmp_path / "round_1" / "predictions").exists()


def test_trained_bundle_labels_a_new_scan_like_predict(run, phantom_dir, tmp_path):
    scan = next((phantom_dir / "images").glob("*"))
    new = tmp_path / "new" / scan.name
    new.parent.mkdir()
    shutil.copyfile(scan, new)
    trained = run / "bundle"
    done = bundle(
        "run", trained / "configs" / "inference.json",
        bundle_root=trained, dataset_dir=new.parent, output_dir=tmp_path / "by_bundle", device="cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert main(["predict", str(new), "--run", str(run), "--output", str(tmp_path / "by_command")]) == 0
    assert_same_labels(tmp_path / "by_bundle" / "labels", tmp_path / "by_command" / "labels")
    assert len(labels(tmp_path / "by_command" / "uncertainty")) == 1
    assert len((tmp_path / "by_command" / "uncertainty.csv").read_text().splitlines()) == 2


def test_trained_bundle_names_the_classes(run):
    metadata = json.loads((run / "bundle" / "configs" / "metadata.json").read_text())
    output = metadata["network_data_format"]["outputs"]["pred"]
    assert output["num_channels"] == len(output["channel_def"]) == 3
    assert output["channel_def"]["0"] == "background"


def test_hdf5_layout_by_the_command_line(phantom_h5_dir, tmp_path):
    assert main(["run", str(phantom_h5_dir), "--output", str(tmp_path), *small(num_rounds=1, spacing=1.0)]) == 0
    carried = json.loads((tmp_path / "bundle" / "configs" / "inference.json").read_text())
    assert carried["spacing"] == 1.0  # what HDF5 files of new scans have, where nothing else is said
    import h5py

    for name, label in labels(tmp_path / "pseudo_labels").items():
        with h5py.File(phantom_h5_dir / "data" / name.replace(".nii.gz", ".h5")) as file:
            assert label.shape == file["image"].shape


def test_features_are_not_computed_again(phantom_dir, tmp_path, caplog):
    arguments = ["propagate", str(phantom_dir), "--output", str(tmp_path), *small()]
    assert main(arguments) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
    assert main(arguments) == 0
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
    assert not (tmp_path / "round_1").exists() and not (tmp_path / "bundle").exists()
    assert labels(tmp_path / "pseudo_labels") and (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("split", ["val", "test"])
def test_propagate_to_another_split(phantom_dir, tmp_path, split):
    assert main(["propagate", str(phantom_dir), "--output", str(tmp_path), "--split", split, *small()]) == 0
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert {row["split"] for row in rows} == {split} and len(labels(tmp_path / "pseudo_labels")) == 1


def test_evaluate_predicts_what_is_missing(run, phantom_dir, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    test_case = (phantom_dir / "test.txt").read_text().split()[0]
    (copied / "round_2" / "predictions" / f"{test_case}.nii.gz").unlink()
    assert main(["evaluate", str(copied), str(phantom_dir), "--split", "test"]) == 0
    assert "test" in capsys.readouterr().out
    assert_same_labels(run / "round_2" / "predictions", copied / "round_2" / "predictions")


def test_validate_says_what_a_run_will_take(phantom_dir, capsys):
    assert main(["validate", str(phantom_dir)]) == 0
    assert "pool" in capsys.readouterr().out


def test_labels_judged_poor_are_left_out_of_training(run, phantom_dir, tmp_path):
    cohort, folder = open_cohort(phantom_dir), tmp_path / "round_0"
    shutil.copytree(run / "round_0" / "labels", folder / "labels")
    names = [case.name for case in cohort.pool]
    values = {name: Quality(0.9, 1, 1, 0, 0, 0, 0) for name in names}

    def learnt(least: float) -> list[str]:
        RoundFolder(folder).quality.write({name: value._asdict() for name, value in values.items()})
        return [item["case"] for item in training_items(cohort, tmp_path, 1, least) if not item["labelled"]]

    assert learnt(0.6) == names
    values[names[0]] = values[names[0]]._replace(predicted_dice=0.59)
    assert learnt(0.6) == names[1:] and learnt(0.5) == names
    assert learnt(0.95) == names  # nothing would be left


@pytest.mark.parametrize("method", ["copy", "prototype"])
def test_other_propagations_by_setting(phantom_dir, tmp_path, method):
    name = f"propagation#method#_target_=semisam_o1.round_0.{method}"
    assert main(["propagate", str(phantom_dir), "--output", str(tmp_path), *small(), "--set", name]) == 0
    quality = list(csv.DictReader((tmp_path / "round_0" / "quality.csv").open()))
    assert all(np.isfinite(float(value)) for row in quality for key, value in row.items() if key != "case")
    if method == "copy":  # judged all the same, though nothing was aligned
        assert max(float(row["predicted_dice"]) for row in quality) > 0


def test_standard_preset(phantom_dir, tmp_path):
    """The published network on patches as small as it takes."""
    extra = small(patch_size=[32, 32, 16], num_rounds=1, max_iterations=2)
    assert main(["run", str(phantom_dir), "--output", str(tmp_path), "--preset", "standard", *extra]) == 0


def test_sam_med3d_encoder(phantom_dir, tmp_path, sam_weights):
    extra = small(pretrained_ckpt=str(sam_weights), feature_spacing=0.4)  # at 1.5 mm no organ fills a token
    assert main(["propagate", str(phantom_dir), "--output", str(tmp_path), "--encoder", "sam_med3d", *extra]) == 0


def test_sam_med3d_without_weights_says_what_to_put_where(phantom_dir, tmp_path, capsys):
    extra = small(pretrained_ckpt=str(tmp_path / "sam_med3d_turbo.pth"))
    assert main(["propagate", str(phantom_dir), "--output", str(tmp_path), "--encoder", "sam_med3d", *extra]) == 2
    said = capsys.readouterr().err
    assert "sam_med3d_turbo.pth" in said and "mind" in said and "Traceback" not in said


def test_paper_preset(phantom_dir, tmp_path, sam_weights):
    files = [str(CONFIGS / "train.json"), str(CONFIGS / "presets" / "paper.json")]
    ids = {k: v for k, v in SMALL.items() if k not in ("train_voxels", "feature_voxels")}
    ids |= {"patch_size": [32, 32, 32], "num_rounds": 1, "validation_interval": 2}
    ids |= {"pretrained_ckpt": sam_weights, "device": "cpu"}
    done = bundle("training", str(files), dataset_dir=phantom_dir, output_dir=tmp_path, **ids)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "round_1" / "round1_best.pth").is_file()
    chosen = torch.load(tmp_path / "round_1" / "round1_best.pth", weights_only=True)
    chosen, kept = chosen.get("model", chosen), torch.load(tmp_path / "round_1" / "model.pt", weights_only=True)
    assert all(torch.equal(chosen[name], kept[name]) for name in kept)


def test_method_overlay_is_the_default(run, phantom_dir, tmp_path):
    assert main(["run", str(phantom_dir), "--output", str(tmp_path), "--method", "mean_teacher", *small()]) == 0
    assert_same_labels(run / "pseudo_labels", tmp_path / "pseudo_labels")


def test_the_bundle_of_a_two_headed_network_holds_both_heads(phantom_dir, tmp_path):
    command = ["run", str(phantom_dir), "--output", str(tmp_path), "--method", "dtc", "--device", "cpu"]
    assert main([*command, *small(num_rounds=1, quality_estimate=False, label_fusion=False)]) == 0
    weights = torch.load(tmp_path / "bundle" / "models" / "model.pt", weights_only=True)
    assert "final2.weight" in weights


@pytest.mark.parametrize(("published", "ours"), [("mt", "mean_teacher"), ("uamt", "ua_mt"), ("dan", "dan")])
def test_methods_have_their_published_names_too(published, ours):
    options = parser().parse_args(["run", "DIR", "--output", "RUN", "--method", published, "--preset", "quick"])
    assert config_files(options)[-1].name == f"{ours}.json"


@needs_golden
@pytest.mark.parametrize(("method", "network"), [("mt", UNet3D), ("dtc", UNet3DSDF)])
def test_predict_with_a_published_checkpoint(tmp_path, method, network):
    """Stored grid and intensities, windows of 128: what the network itself gives."""
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    model = network(1, 2).eval()
    weights.fill(model)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "round3_best.pth")
    image = weights.unet_input()
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["image"] = image[0, 0].numpy()
    command = ["predict", str(tmp_path / "scan.h5"), "--weights", str(tmp_path / "round3_best.pth")]
    assert main([*command, "--method", method, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    (found,) = labels(tmp_path / "out" / "labels").values()
    padded = torch.nn.functional.pad(image, (32, 32, 40, 40, 48, 48))
    with torch.no_grad():
        logits = model(padded)[1] if method == "dtc" else model(padded)
    np.testing.assert_array_equal(found, logits[0, :, 48:80, 40:88, 32:96].argmax(0))
    other = "dtc" if method == "mt" else "mt"
    assert main([*command, "--method", other, "--output", str(tmp_path / "o"), "--device", "cpu"]) == 2


def test_predict_leaves_out_what_cannot_be_read(run, phantom_dir, tmp_path, capsys):
    good, bad = next((phantom_dir / "images").iterdir()), tmp_path / "bad.nii.gz"
    bad.write_bytes(b"not an image")
    command = ["predict", "--run", str(run), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*command, str(bad), str(good)]) == 1
    assert list(labels(tmp_path / "out" / "labels")) == [good.name]
    said = capsys.readouterr()
    assert "case bad cannot be read and is left out" in said.err + said.out
    assert "left out, 1 of 2: bad" in said.err
    assert main([*command, str(bad)]) == 2 and "None of the 1 images can be read" in capsys.readouterr().err


def test_propagate_leaves_a_trained_run_alone(run, phantom_dir, capsys):
    assert main(["propagate", str(phantom_dir), "--output", str(run), *small()]) == 2
    assert "another folder" in capsys.readouterr().err and (run / "bundle" / "models" / "model.pt").is_file()


def test_volume_refinement_replaces_the_unsure_half(phantom_dir, tmp_path):
    command = ["run", str(phantom_dir), "--output", str(tmp_path), "--refinement", "volume", *small(guard=False)]
    assert main(command) == 0
    predicted, refined = (labels(tmp_path / "round_1" / stage) for stage in ("predictions", "labels"))
    assert sum((predicted[name] != refined[name]).any() for name in refined) == 1


def test_voxel_refinement_leaves_what_is_sure(phantom_dir, tmp_path):
    assert main(["run", str(phantom_dir), "--output", str(tmp_path), *small(guard=False, unsure=0.9)]) == 0
    predicted, refined, doubt = (labels(tmp_path / "round_1" / s) for s in ("predictions", "labels", "uncertainty"))
    changed = 0
    for name, label in refined.items():
        moved = label != predicted[name]
        changed += moved.sum()
        assert (doubt[name][moved] >= 0.89).all()
    assert changed


@pytest.mark.parametrize(("worth", "warned"), [(0.77, True), (0.79, False)])
def test_labels_judged_worse_than_round_0_are_not_handed_out_without_a_word(run, tmp_path, worth, warned):
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    for folder, value in (("round_0", 0.8), ("round_2", worth)):
        quality = RoundFolder(copied / folder).quality
        quality.write({name: found | {"predicted_dice": value} for name, found in quality.read().items()})
    Job(json.loads((run / "run.json").read_text())["config"] | {"output_dir": str(copied)}).finish()
    assert ("judged to be worse" in (copied / "report.html").read_text()) == warned
    assert len(json.loads((copied / "run.json").read_text())["warnings"]) == warned


def test_a_refinement_that_was_switched_off_stays_off(phantom_dir, tmp_path):
    """Round 1's proposals gain less than is asked; round 2, which would ask again, makes none."""
    assert (
        main(["run", str(phantom_dir), "--output", str(tmp_path), *small(num_rounds=3, unsure=0.9, least_gain=1)]) == 0
    )
    records = [json.loads((tmp_path / f"round_{n}" / "refinement.json").read_text()) for n in (1, 2)]
    assert [record["switched_off"] for record in records] == [True, False] and records[0]["gains"]
    assert not records[1]["gains"]
    predicted, kept = (labels(tmp_path / "round_2" / stage) for stage in ("predictions", "labels"))
    assert all((predicted[name] == kept[name]).all() for name in kept)
    assert "refined" not in (tmp_path / "metrics.csv").read_text()


@pytest.mark.parametrize("least", [0, 0.3, 1])
def test_automatic_rounds_end_when_the_labels_settle(phantom_dir, tmp_path, least):
    extra = small(num_rounds="auto", most_rounds=3, least_change=least)
    assert main(["run", str(phantom_dir), "--output", str(tmp_path), *extra]) == 0
    folders = [tmp_path / "round_0", *sorted(tmp_path.glob("round_[1-9]"))]
    found = [labels(folder / "labels") for folder in folders]
    pool = found[0].keys()
    changes = [
        1 - np.mean([mean_dice(torch.tensor(one[n]), torch.tensor(other[n]), 3) for n in pool])
        for one, other in zip(found, found[1:])
    ]
    worth = []
    for folder in folders[1:]:
        rows = list(csv.DictReader((folder / "quality.csv").open()))
        worth.append(sum(float(row["predicted_dice"]) for row in rows) / len(rows))
    rounds = len(changes)
    ends = [changes[n] < least or worth[n] < max(worth[: n + 1]) - 0.005 for n in range(rounds)]
    assert not any(ends[:-1]) and (ends[-1] or rounds == 3)
    assert rounds == 1 or least < 1
    best = max(n + 1 for n in range(rounds) if worth[n] >= max(worth) - 0.005)
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["rounds"], record["best_round"]) == (rounds, best)
    assert_same_labels(tmp_path / "pseudo_labels", tmp_path / f"round_{best}" / "labels")
    model = (tmp_path / f"round_{best}" / "model.pt").read_bytes()
    assert (tmp_path / "bundle" / "models" / "model.pt").read_bytes() == model


def test_a_stage_can_be_run_again_alone(run, phantom_dir, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    shutil.rmtree(copied / "round_2" / "predictions")
    ids = {"dataset_dir": phantom_dir, "output_dir": copied, "device": "cpu", "round": 2} | SMALL
    done = bundle("stage#prediction", CONFIGS / "train.json", **ids)
    assert done.returncode == 0, done.stderr
    assert_same_labels(run / "round_2" / "predictions", copied / "round_2" / "predictions")
    stages = [stage["stage"] for stage in json.loads((copied / "run.json").read_text())["stages"]]
    assert stages.count("round 2: prediction") == 1 and "propagation" in stages
    with lock_folder(copied):
        refused = bundle("stage#prediction", CONFIGS / "train.json", **ids)
    assert refused.returncode and "is being worked on by process" in refused.stderr


@pytest.mark.parametrize("warm, expected", [(True, [12, 4, 4]), (False, [12, 12, 12])])
def test_rounds_that_begin_from_nothing_are_longer(run, tmp_path, warm, expected):
    config = json.loads((run / "run.json").read_text())["config"]
    config |= {"output_dir": str(tmp_path), "warm_start": warm, "first_round_factor": 3}
    parser = ConfigParser(config)
    for number, steps in enumerate(expected, 1):
        parser["round"] = number
        assert parser.get_parsed_content("iterations") == steps
        assert parser.get_parsed_content("train#trainer#max_epochs") * 2 == steps


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
