"""A folder belongs to whoever made it; a journal is not trusted over the disk."""

import csv
import json
import os
import shutil

import nibabel
import numpy as np
import pytest

from semisam_o1.cli import main
from tests.jobs import assert_same_labels, labels, small

ROUND_0 = {"num_rounds": 0, "label_fusion": False, "quality_estimate": False}


def start(data, run, **ids) -> int:
    return main(["run", str(data), "--output", str(run), "--device", "cpu", *small(**ids)])


@pytest.fixture
def copied(run, tmp_path):
    """A finished run, to be changed."""
    return shutil.copytree(run, tmp_path / "run")


def snapshot(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Whose a folder is


@pytest.mark.parametrize("name", ["round_1", "pseudo_labels", "bundle", "report.html", "run.json", "features"])
def test_a_folder_with_names_of_a_run_and_no_journal_is_refused(phantom_dir, tmp_path, capsys, name):
    theirs = tmp_path / "run" / name
    theirs.mkdir(parents=True) if "." not in name else theirs.parent.mkdir()
    (theirs / "mine.txt" if "." not in name else theirs).write_text("mine")
    before = snapshot(tmp_path)
    assert start(phantom_dir, tmp_path / "run", **ROUND_0) == 2
    said = capsys.readouterr().err
    assert name in said and snapshot(tmp_path) == before


def test_other_folders_of_a_user_stay(phantom_dir, tmp_path):
    theirs = tmp_path / "run" / "round_1_by_dr_x"
    theirs.mkdir(parents=True)
    (theirs / "mine.txt").write_text("mine")
    assert start(phantom_dir, tmp_path / "run", **ROUND_0) == 0
    assert (theirs / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["{data}", "{data}/images", "{data}/..", ".", "/"])
def test_a_folder_that_contains_the_data_or_the_working_directory_is_refused(
    phantom_dir, tmp_path, capsys, monkeypatch, place
):
    data = shutil.copytree(phantom_dir, tmp_path / "all" / "data")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = snapshot(tmp_path)
    assert start(data, place.format(data=data), **ROUND_0) == 2
    assert "contains" in capsys.readouterr().err and snapshot(tmp_path) == before


@pytest.mark.parametrize("command", ["run", "propagate"])
def test_an_empty_path_is_refused(phantom_dir, capsys, command):
    assert main([command, str(phantom_dir), "--output", ""]) == 2
    assert "output_dir is ''" in capsys.readouterr().err


def test_links_are_not_followed(phantom_dir, copied, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    shutil.move(copied / "round_2", theirs)
    (copied / "round_2").symlink_to(theirs)
    before = snapshot(theirs)
    assert start(phantom_dir, copied, max_iterations=8) == 2
    assert "symbolic links in place of round_2" in capsys.readouterr().err and snapshot(theirs) == before


# What a person changed


def corrected(path):
    image = nibabel.load(path)
    voxels = np.asarray(image.dataobj).copy()
    voxels[:4] = 1
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine, image.header), path)
    return voxels


def test_the_same_command_keeps_a_correction(run, phantom_dir, copied, capfd):
    path = min((copied / "pseudo_labels").iterdir())
    voxels = corrected(path)
    for _ in range(2):
        assert start(phantom_dir, copied) == 0
        np.testing.assert_array_equal(labels(copied / "pseudo_labels")[path.name], voxels)
        np.testing.assert_array_equal(labels(copied / "reviewed")[path.name], voxels)
    assert len(list((copied / "reviewed").glob("*.nii.gz"))) == 1
    assert capfd.readouterr().out.count("is taken as corrected") == 1


@pytest.mark.slow
def test_a_restart_keeps_a_correction(phantom_dir, copied):
    path = min((copied / "pseudo_labels").iterdir())
    voxels = corrected(path)
    command = ["run", str(phantom_dir), "--output", str(copied), "--restart-from", "round_2", "--device", "cpu"]
    assert main([*command, *small(max_iterations=8)]) == 2  # stale from round 1 on: nothing is touched
    np.testing.assert_array_equal(labels(copied / "pseudo_labels")[path.name], voxels)
    assert main([*command, *small()]) == 0
    for kept in ("reviewed", "pseudo_labels"):
        np.testing.assert_array_equal(labels(copied / kept)[path.name], voxels)


def test_a_changed_review_list_is_kept_under_its_date(phantom_dir, copied):
    (copied / "review.csv").write_text((copied / "review.csv").read_text() + "my note\n")
    assert start(phantom_dir, copied) == 0
    (kept,) = copied.glob("review_20*.csv")
    assert "my note" in kept.read_text() and "my note" not in (copied / "review.csv").read_text()


# A journal that tells the truth


@pytest.mark.parametrize(
    "gone",
    ["round_0/labels", "round_0/copied", "round_1/predictions", "round_1/labels", "round_2/uncertainty", "round_2"],
)
def test_results_that_are_gone_are_made_again(run, phantom_dir, copied, gone, capfd):
    folder = copied / gone
    if gone == "round_2":
        shutil.rmtree(folder)
    else:
        min(folder.iterdir()).unlink()
    assert start(phantom_dir, copied) == 0
    for made in ("round_0/labels", "round_0/copied", "round_1/predictions", "round_1/labels", "pseudo_labels"):
        assert_same_labels(run / made, copied / made)
    assert_same_labels(run / "round_2" / "uncertainty", copied / "round_2" / "uncertainty")
    assert "its results are not there" in capfd.readouterr().out


def test_work_files_that_nobody_needs_are_not_missed(phantom_dir, copied, capfd):
    shutil.rmtree(copied / "features")
    shutil.rmtree(copied / "round_0" / "work")
    assert start(phantom_dir, copied) == 0
    assert "gone" not in capfd.readouterr().out and not (copied / "features").exists()


def test_a_touched_scan_makes_nothing_stale_and_a_changed_one_does(phantom_dir, run, tmp_path, capsys):
    data, copied = shutil.copytree(phantom_dir, tmp_path / "data"), shutil.copytree(run, tmp_path / "run")
    scan = data / "images" / "phantom_01.nii.gz"
    os.utime(scan)
    assert start(data, copied) == 0
    image = nibabel.load(scan)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine, image.header), scan)
    assert start(data, copied) == 2
    assert "phantom_01" in capsys.readouterr().err


def test_a_scan_that_was_damaged_for_a_while_is_as_before(phantom_dir, run, tmp_path):
    data, copied = shutil.copytree(phantom_dir, tmp_path / "data"), shutil.copytree(run, tmp_path / "run")
    scan = data / "images" / "phantom_01.nii.gz"
    whole = scan.read_bytes()
    scan.write_bytes(whole[:1000])
    assert start(data, copied) == 0
    assert "phantom_01" in json.loads((copied / "run.json").read_text())["set_aside"]
    scan.write_bytes(whole)
    assert start(data, copied, restart_from="round_2") == 0
    assert json.loads((copied / "run.json").read_text())["set_aside"] == {}
    found = [list(csv.DictReader((folder / "review.csv").open())) for folder in (run, copied)]
    assert found[0] == found[1]


def test_a_new_scan_gets_a_label_and_others_stay(phantom_dir, run, tmp_path, capfd):
    data, copied = shutil.copytree(phantom_dir, tmp_path / "data"), shutil.copytree(run, tmp_path / "run")
    shutil.copy(data / "images" / "phantom_02.nii.gz", data / "images" / "new.nii.gz")
    (data / "train.txt").write_text((data / "train.txt").read_text() + "new\n")
    assert start(data, copied) == 0
    before, after = labels(run / "pseudo_labels"), labels(copied / "pseudo_labels")
    assert after.keys() - before.keys() == {"new.nii.gz"} and after["new.nii.gz"].any()
    for name, label in before.items():
        np.testing.assert_array_equal(label, after[name])
    rows = {row["case"]: row for row in csv.DictReader((copied / "review.csv").open())}
    assert float(rows["new"]["predicted_dice"]) == pytest.approx(float(rows["phantom_02"]["predicted_dice"]), abs=0.1)
    first = {row["case"]: row for row in csv.DictReader((copied / "round_0" / "quality.csv").open())}
    back = [float(first[name]["reverse_consistency"]) for name in ("new", "phantom_02")]
    assert back[0] == pytest.approx(back[1], abs=0.05)  # the same scan, so the same but for its atlases
    said = capfd.readouterr().out
    assert "new since the last start: new." in said and "--restart-from propagation" in said
    journal = json.loads((copied / "progress.json").read_text())
    assert "cohort#pool new" in journal["settings"]
