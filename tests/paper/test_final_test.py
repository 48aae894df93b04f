"""The published test: its numbers (section 17), and the command on a checkpoint and on a run."""

import csv
import json

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from semisam_o1.cli import main
from semisam_o1.data import ScanReader, read_label
from semisam_o1.data.datasets import listed_cases
from semisam_o1.data.transforms import keep_largest
from semisam_o1.job.final_test import score_cases, summary
from semisam_o1.ledger import Ledger
from semisam_o1.networks import UNet3D, UNet3DSDF
from semisam_o1.report.metrics import score
from tests.jobs import labels

MEASURES = ("dice", "jaccard", "hd95_mm", "asd_mm")


def test_the_measures(golden):
    found = golden("final_test")
    for prediction, truth, expected in zip(found["prediction"], found["truth"], found["measures"]):
        row = score((prediction > 0).astype(int), (truth > 0).astype(int), (1, 1, 1), 2, "paper")[0]
        np.testing.assert_allclose([row[name] for name in MEASURES], expected, atol=1e-6)


@pytest.fixture
def three_cases(golden, tmp_path):
    found, root = golden("final_test"), tmp_path / "study"
    (root / "data").mkdir(parents=True)
    for name in "abc":
        with h5py.File(root / "data" / f"{name}.h5", "w") as file:
            file["label"] = found[f"run/{name}/truth"]
            file["image"] = found[f"run/{name}/truth"].astype(np.float32)
    (root / "test.txt").write_text("a\nb\nc")
    return root


def test_a_whole_run(golden, three_cases, tmp_path):

    found = golden("final_test")
    cases = listed_cases(three_cases, "test.txt")
    rows = score_cases(
        lambda case: found[f"run/{case.name}/prediction"].astype(int),
        cases,
        [0, 1, 2],
        "given",
        tmp_path / "out",
        Ledger(tmp_path / "out", "test"),
        ScanReader(),
    )
    (tmp_path / "out" / "written.json").unlink()
    np.testing.assert_allclose([[row[name] for name in MEASURES] for row in rows], found["run/rows"], atol=1e-6)
    mean, deviation = summary(rows)
    np.testing.assert_allclose(mean, found["run/mean"], atol=1e-6)
    np.testing.assert_allclose(deviation, found["run/std"], atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(found["run/files"].tolist())
    image = sitk.ReadImage(str(tmp_path / "out" / "a_pred.nii.gz"))
    assert image.GetSize() == tuple(found["run/nifti_size"])
    assert image.GetSpacing() == (1, 1, 1) and image.GetOrigin() == (0, 0, 0)
    assert image.GetDirection() == tuple(found["run/nifti_direction"])
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), found["run/a/prediction"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mt", "dtc"])
def test_a_checkpoint(three_cases, tmp_path, capsys, method):
    torch.manual_seed(0)
    network = (UNet3DSDF if method == "dtc" else UNet3D)(1, 3)
    torch.save(network.state_dict(), tmp_path / "round3_best.pth")
    (three_cases / "one.txt").write_text("c\n")
    command = ["test", str(three_cases), "--weights", str(tmp_path / "round3_best.pth"), "--test-list", "one.txt"]
    command += ["--method", method]
    assert main([*command, "--save-pred", str(tmp_path / "out"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "mean ± standard deviation" in said and said.count("\nc ") == 2
    rows = list(csv.DictReader((tmp_path / "out" / "test.csv").open()))
    assert [(row["case"], row["class"]) for row in rows] == [("c", n) for n in "12"]
    other = "mt" if method == "dtc" else "dtc"
    assert main([*command[:-1], other, "--device", "cpu"]) == 2


def test_the_rounds_of_a_run(run, phantom_dir, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["test", str(phantom_dir), "--run", str(run), "--save-pred", str(out), "--device", "cpu"]
    assert main([*command, "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "round 1" in said and "round 2" in said
    kept = json.loads((run / "run.json").read_text())["settings"]["largest_component"]  # the test removes nothing
    name = (phantom_dir / "test.txt").read_text().split()[0]
    for number in (1, 2):
        found = nibabel.load(out / f"round_{number}" / f"{name}_pred.nii.gz")
        expected = labels(run / f"round_{number}" / "predictions")[f"{name}.nii.gz"]
        label = keep_largest(torch.as_tensor(np.asarray(found.dataobj).astype(int))[None], kept)[0]
        np.testing.assert_array_equal(label, expected)
        np.testing.assert_array_equal(found.affine, nibabel.load(phantom_dir / "images" / f"{name}.nii.gz").affine)


@pytest.mark.parametrize("binary", [False, True])
def test_a_truth_is_read_as_its_run_learned(three_cases, tmp_path, binary):
    """With one foreground class, a model that predicts the whole foreground has a Dice of 1; class 300 fits a file."""
    (case,) = (case for case in listed_cases(three_cases, "test.txt") if case.name == "a")
    truth = read_label(case.label, ScanReader(), None).values
    assert truth.max() > 1
    foreground, numbers = (truth > 0).astype(int), [0, 1 if binary else 300]
    (row,) = score_cases(
        lambda _: foreground, [case], numbers, "m", tmp_path, Ledger(tmp_path, "test"), ScanReader(), binary
    )
    assert (row["dice"] == 1) == binary and row["class"] == numbers[1]
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a_pred.nii.gz"))).max() == numbers[1]


def test_a_list_that_cannot_be_used(three_cases, tmp_path, capsys):
    torch.save(UNet3D(1, 3).state_dict(), tmp_path / "w.pth")
    command = ["test", str(three_cases), "--weights", str(tmp_path / "w.pth"), "--device", "cpu"]
    assert main([*command, "--test-list", "none.txt"]) == 2
    (three_cases / "other.txt").write_text("a\nz\n")
    assert main([*command, "--test-list", "other.txt"]) == 2
    said = capsys.readouterr().err
    assert "no such list" in said and "z" in said
