"""Several templates: each counts on each scan by how well it matches there, whatever their order."""

import shutil

import numpy as np
import pytest

from semisam_o1.cli import main
from semisam_o1.round_0.passes import FirstPass, Fused
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
def test_the_same_template_under_two_names_hardly_changes_a_label(one, two):
    """The second one is reached through the first, by an alignment of its own."""
    first, second = (labels(run / "round_0" / "labels") for run in (one, two))
    assert set(second) - set(first) == {"another.nii.gz", "phantom_00.nii.gz"}
    for name, label in first.items():
        assert (label == second[name]).mean() > 0.97


@pytest.mark.slow
def test_the_order_of_templates_changes_no_voxel(cohort, tmp_path):
    one = labelled(cohort, tmp_path / "one", "phantom_00", "phantom_01")
    two = labelled(cohort, tmp_path / "two", "phantom_01", "phantom_00")
    for stage in STAGES:
        assert_same_labels(one / stage, two / stage)


@pytest.mark.slow
def test_a_labelled_scan_that_is_the_scan_itself_decides(cohort, tmp_path):
    """Templates: the scan itself under another name, and one that is not; all is aligned to the first of the two."""
    data, run = shutil.copytree(cohort, tmp_path / "data"), tmp_path / "run"
    (data / "train.txt").write_text("phantom_01\nphantom_02\nphantom_00\n")
    command = ["propagate", str(data), "--output", str(run), "--template", "another", "phantom_01"]
    assert main([*command, *small()]) == 0
    folder = RunFolder(run).round(0)
    for name, template in (("phantom_00", "another"), ("phantom_02", "another")):
        assert FirstPass.load(folder.work("first"), name, "template").template == template
    labelled, pool = Fused.atlases_of(folder.work("fused"), "phantom_00")
    assert labelled == ["phantom_01"] and pool == ["phantom_02"]
    truth = labels(cohort / "labels")["phantom_00.nii.gz"]
    np.testing.assert_array_less(0.95, (labels(folder.labels)["phantom_00.nii.gz"] == truth).mean())
