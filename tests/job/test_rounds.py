"""How many rounds there are, how long, what they learn from, and what is said of labels that got worse."""

import csv
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from semisam_o1.cli import main
from semisam_o1.data.datasets import open_cohort
from semisam_o1.job.job import Job
from semisam_o1.job.review import review
from semisam_o1.job.selection import mean_predicted_dice
from semisam_o1.job.training_data import training_items
from semisam_o1.report.overlap import mean_dice
from semisam_o1.round_0.quality import Quality
from semisam_o1.runfolder import RoundFolder, RunFolder
from tests.jobs import assert_same_labels, config_of, labels, small


def test_labels_judged_poor_are_left_out_of_training(run, phantom_dir, tmp_path):
    cohort, folder = open_cohort(phantom_dir), tmp_path / "round_0"
    shutil.copytree(run / "round_0" / "labels", folder / "labels")
    names = [case.name for case in cohort.pool]
    values = {name: Quality(0.9, 0.8, 1, 1, 1, 0, 0, 0, 0) for name in names}

    def learnt(least: float) -> list[str]:
        RoundFolder(folder).quality.write({name: value.row([0]) for name, value in values.items()})
        return [item["case"] for item in training_items(cohort, tmp_path, 1, least) if not item["labelled"]]

    assert learnt(0.6) == names
    values[names[0]] = values[names[0]]._replace(predicted_dice=0.59)
    assert learnt(0.6) == names[1:] and learnt(0.5) == names
    assert learnt(0.95) == names  # nothing would be left
    values[names[0]] = values[names[0]]._replace(predicted_dice=0.9, doubt="unlike the others")
    assert learnt(0.6) == names[1:] and learnt(0) == names  # 0 leaves no label out
    values = {name: value._replace(doubt="unlike the others") for name, value in values.items()}
    assert learnt(0.6) == names


@pytest.mark.parametrize(("worth", "warned"), [(0.76, True), (0.77, False)])
def test_labels_judged_worse_than_round_0_are_not_handed_out_without_a_word(run, phantom_dir, tmp_path, worth, warned):
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    for folder, value in (("round_0", 0.8), ("round_2", worth)):
        quality = RoundFolder(copied / folder).quality
        quality.write({name: found | {"predicted_dice": value} for name, found in quality.read().items()})
    Job(config_of(phantom_dir, copied)).finish()
    assert ("judged to be worse" in (copied / "report.html").read_text()) == warned
    assert len(json.loads((copied / "run.json").read_text())["warnings"]) == warned


@pytest.mark.parametrize(
    "least", [pytest.param(0, marks=pytest.mark.slow), pytest.param(0.6, marks=pytest.mark.slow), 1]
)
def test_automatic_rounds_end_when_the_labels_settle(phantom_dir, begun, least):
    """Three rounds change the labels by about 0.7, 0.5 and 0.35."""
    extra = small(num_rounds="auto", most_rounds=3, least_change=least)
    assert main(["run", str(phantom_dir), "--output", str(begun), *extra]) == 0
    folders = [begun / "round_0", *sorted(begun.glob("round_[1-9]"))]
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
    record = json.loads((begun / "run.json").read_text())
    assert (record["rounds"], record["best_round"]) == (rounds, best)
    assert_same_labels(begun / "pseudo_labels", begun / f"round_{best}" / "labels")
    model = (begun / f"round_{best}" / "model.pt").read_bytes()
    assert (begun / "bundle" / "models" / "model.pt").read_bytes() == model


@pytest.mark.parametrize("warm, expected", [(True, [12, 4, 4]), (False, [12, 12, 12])])
def test_rounds_that_begin_from_nothing_are_longer(phantom_dir, tmp_path, warm, expected):
    parser = ConfigParser(config_of(phantom_dir, tmp_path, warm_start=warm, first_round_factor=3))
    for number, steps in enumerate(expected, 1):
        parser["round"] = number
        assert parser.get_parsed_content("iterations") == steps
        assert parser.get_parsed_content("train#trainer#max_epochs") * 2 == steps


def test_the_network_labels_copies_too_and_a_failed_training_hands_out_round_0(
    phantom_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(phantom_dir.parent)
    phantom_dir = phantom_dir.relative_to(phantom_dir.parent)
    Job(config_of(phantom_dir, tmp_path, template_copies=2, num_rounds=1)).run()
    first, last = RunFolder(tmp_path).round(0), RunFolder(tmp_path).round(1)
    for name in ("copy_1", "copy_2"):
        image, label = (nibabel.load(folder.copy(name)) for folder in (first, last))
        assert image.shape == label.shape and np.allclose(image.affine, label.affine, atol=1e-5)
    assert first.calibration.is_file() and last.calibration.is_file()
    worth = mean_predicted_dice([first, last])
    assert worth[1] < worth[0] - 0.1  # after four iterations
    assert_same_labels(tmp_path / "pseudo_labels", tmp_path / "round_0" / "labels")
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["best_round"], record["labels_round"]) == (1, 0)
    assert "Handed out are the labels of round 0" in record["warnings"][0]
    assert not any("copy" in row for row in (last.uncertainty.read(), last.quality.read()))
    image = phantom_dir / "images" / "phantom_03.nii.gz"
    command = ["predict", image, "--run", tmp_path, "--output", tmp_path / "out", "--device", "cpu"]
    assert main(list(map(str, command))) == 0
    assert "its network, of round 1, are expected to be worse than those of round 0" in capsys.readouterr().err
    record["best_round"] = 2  # as while another round is under way
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert main(list(map(str, command))) == 0
    assert "its network, of round 1," in capsys.readouterr().err
    monkeypatch.chdir("/")  # the data set was named relative to the folder of before
    assert "phantom_01" in review(tmp_path)[0]
