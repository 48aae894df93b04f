"""Several templates: each scan takes the one that suits it best, whatever they are called and however they stand."""

import shutil

import numpy as np
import pytest

from semisam_o1.cli import main
from semisam_o1.round_0.passes import FirstPass
from semisam_o1.runfolder import RunFolder
from tests.jobs import assert_same_labels, labels, small

STAGES = ("round_0/labels", "round_1/predictions", "round_1/labels", "pseudo_labels")


@pytest.fixture(scope="module")
def cohort(phantom_dir, made_once):
    """The phantoms, and the first of them once more under another name; not to be written to."""

    def make(root):
        shutil.copytree(phantom_dir, root, dirs_exist_ok=True)
        for kind in ("images", "labels"):
            (file,) = (root / kind).glob("phantom_00.*")
            shutil.copy(file, file.with_name(file.name.replace("phantom_00", "another")))
        (root / "train.txt").write_text("phantom_00\nphantom_01\nphantom_02\n")

    return made_once("templates", make)


def labelled(cohort, output, *templates, **more):
    settings = small(feature_voxels=4000, num_rounds=1, refine_last=True, guard=False, unsure=0.6, **more)
    command = ["run", str(cohort), "--output", str(output), "--device", "cpu", "--template", *templates, *settings]
    assert main(command) == 0
    return output


@pytest.fixture(scope="module")
def one(cohort, made_once):
    """The run of one template; not to be written to."""
    return made_once("one_template", lambda root: labelled(cohort, root / "run", "phantom_00")) / "run"


@pytest.fixture(scope="module")
def two(cohort, made_once):
    """The run of the same template under two names; not to be written to."""
    return made_once("two_names", lambda root: labelled(cohort, root / "run", "phantom_00", "another")) / "run"


@pytest.mark.slow
@pytest.mark.parametrize("refinement", ["voxel", "volume"])
def test_the_same_template_under_two_names_changes_no_voxel(cohort, one, two, tmp_path, refinement):
    if refinement == "volume":  # of the same training
        votes = {"_target_": "semisam_o1.refinement.VolumeVotes", "store": "@store", "cohort": "@cohort", "k": 1}
        votes |= {"output_dir": "@output_dir", "round": "@round", "quantile": 0.5}
        more = {"refinement#propose": votes, "restart_from": "round_1/refinement"}
        one, two = shutil.copytree(one, tmp_path / "one"), shutil.copytree(two, tmp_path / "two")
        labelled(cohort, one, "phantom_00", **more)
        labelled(cohort, two, "phantom_00", "another", **more)
    for stage in STAGES:
        assert_same_labels(one / stage, two / stage)
    quality = [RunFolder(run).round(0).quality.read() for run in (one, two)]
    assert quality[0] == quality[1]


@pytest.mark.slow
def test_the_order_of_templates_changes_no_voxel(cohort, tmp_path):
    one = labelled(cohort, tmp_path / "one", "phantom_00", "phantom_01")
    two = labelled(cohort, tmp_path / "two", "phantom_01", "phantom_00")
    for stage in STAGES:
        assert_same_labels(one / stage, two / stage)


@pytest.mark.slow
def test_each_scan_takes_the_template_that_leaves_the_least(cohort, tmp_path):
    """A template that is the scan itself, under another name, and one that is not."""
    data, run = shutil.copytree(cohort, tmp_path / "data"), tmp_path / "run"
    (data / "train.txt").write_text("phantom_01\nphantom_02\nphantom_00\n")
    command = ["propagate", str(data), "--output", str(run), "--template", "another", "phantom_01"]
    assert main([*command, *small()]) == 0
    folder = RunFolder(run).round(0)
    records, back = folder.work("first"), folder.work("back")
    found = FirstPass.load(records, "phantom_00", "template", "residual")
    assert found.template == "another" and found.residual < 0.01
    assert back.load("phantom_00", ["template"]) == ["another"]
    truth = labels(cohort / "labels")["phantom_00.nii.gz"]
    np.testing.assert_array_less(0.95, (labels(folder.labels)["phantom_00.nii.gz"] == truth).mean())
