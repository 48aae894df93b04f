"""The refinement's engine, its guard and its voxel votes on tiny scans."""

import nibabel
import numpy as np
import pytest
import torch

from semisam_o1.data import ScanReader
from semisam_o1.data.export import write_label, write_share
from semisam_o1.data.grids import Grid
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.features import FeatureStore
from semisam_o1.refinement.engine import refinement_engine
from semisam_o1.refinement.kinds import VoxelVotes, no_votes
from semisam_o1.round_0.passes import Alignment, FirstPass
from semisam_o1.round_0.places import AffineMap
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import Case
from tests.jobs import cohort_of

SIDES = (12, 12, 12)
GRID = Grid(np.eye(4), SIDES)
CUBE = np.zeros(SIDES)
CUBE[3:9, 3:9, 3:9] = 1
DOUBTED = (5, 5, 8)  # of the cube, at its face


def write_scan(folder, name, label=None) -> Case:
    path = folder / f"{name}.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros(SIDES, np.float32), np.eye(4)), path)
    if label is not None:
        write_label(folder / f"{name}-label.nii.gz", label, path, GRID)
    return Case(name, path, folder / f"{name}-label.nii.gz" if label is not None else None, "pool")


@pytest.fixture
def cohort(tmp_path):
    """A template with a cube and scans a and b of the same features; of a, one voxel of the cube is called in doubt."""
    store = FeatureStore(tmp_path / "features", mind(), 1.0, "float32")
    cases = [write_scan(tmp_path, "t", CUBE), write_scan(tmp_path, "a"), write_scan(tmp_path, "b")]
    x, y, z = np.meshgrid(*(np.arange(12) - 5.5,) * 3, indexing="ij")
    tokens = torch.tensor(np.stack([CUBE, x / 50, y / 50, z / 50]), dtype=torch.float32)
    points = torch.tensor(np.stack([x, y, z], -1), dtype=torch.float32)
    run = RunFolder(tmp_path)
    first, predicted, folder = run.round(0).work("first"), run.round(1).work("predicted"), run.round(1)
    place = {"t": Alignment(AffineMap(torch.eye(3), torch.zeros(3)), torch.zeros(1, 2, 2, 2))}
    for case in cases:
        store.save(case, tokens, np.eye(4), GRID)
        shares = torch.tensor(np.stack([1 - CUBE, CUBE]) * 0.96 + 0.02)
        if case.name == "a":
            shares[:, *DOUBTED] = torch.tensor([0.6, 0.4], dtype=shares.dtype)
        FirstPass(shares, "world", "t", 0.1, 0.1, points, place).save(first, case.name)
        predicted.save(case.name, {"probabilities": shares}, {"affine": np.eye(4)})
        entropy = -(shares * shares.log()).sum(0).numpy() / np.log(2)
        write_label(folder.prediction(case.name), shares.argmax(0).numpy(), case.image, GRID)
        write_share(folder.uncertainty_map(case.name), entropy, case.image, GRID)
    return cohort_of(cases[:1], cases[1:], {0: "background", 1: "cube"}, store=store, folder=tmp_path)


def voxel_votes(cohort, **more):
    return VoxelVotes(cohort.store, cohort, cohort.folder, 1, **more)


def label(cohort, kind, name):
    return ScanReader().volume(cohort.folder / "round_1" / kind / f"{name}.nii.gz")[0].numpy()


def test_a_doubted_place_gets_the_label_of_its_like_and_the_rest_stays(cohort):
    a, b = cohort.pool
    assert label(cohort, "predictions", "a").sum() == CUBE.sum() - 1
    np.testing.assert_array_equal(voxel_votes(cohort)(a), CUBE)
    assert voxel_votes(cohort)(b) is None  # nothing in doubt
    mine = voxel_votes(cohort, share=0.0)(a)
    np.testing.assert_array_equal(mine, label(cohort, "predictions", "a"))


def test_what_is_sure_is_not_touched(cohort):
    (a, _), path = cohort.pool, cohort.folder / "round_1" / "predictions" / "a.nii.gz"
    wrong = CUBE.copy()
    wrong[0, 0, 0], wrong[DOUBTED] = 1, 0
    write_label(path, wrong, a.image, GRID)
    mended = wrong.copy()
    mended[DOUBTED] = 1
    np.testing.assert_array_equal(voxel_votes(cohort)(a), mended)
    assert voxel_votes(cohort, unsure=0.99)(a) is None  # 0.6 against 0.4 is 0.97
    np.testing.assert_array_equal(voxel_votes(cohort, quantile=0.9999)(a), mended)


def test_scans_that_round_0_did_not_align_are_stretched_over_the_template(cohort):
    for name in "ab":
        nowhere = FirstPass(torch.zeros(2, *SIDES), "world", "", float("nan"), 0.1, None, {})
        nowhere.save(RunFolder(cohort.folder).round(0).work("first"), name)
    np.testing.assert_array_equal(voxel_votes(cohort)(cohort.pool[0]), CUBE)


def run(cohort, propose, guard=None):
    engine = refinement_engine(propose, cohort, cohort.folder, 1, guard)
    engine.run(cohort.pool, epoch_length=len(cohort.pool))
    return engine.state.replaced


def proposing(case):
    return torch.ones(SIDES)


def worth(gains):
    """A guard by which a proposal is worth so much more than the prediction."""
    return lambda case, path: 0.5 + gains[case.name] * (path.parent.name == "labels")


def test_proposals_replace_predictions(cohort):
    assert run(cohort, proposing) == ["a", "b"] and label(cohort, "labels", "b").all()
    assert run(cohort, no_votes) == []
    for name in "ab":
        np.testing.assert_array_equal(label(cohort, "labels", name), label(cohort, "predictions", name))


def test_the_guard_turns_down_a_proposal_worth_less(cohort):
    assert run(cohort, proposing, worth({"a": -0.1, "b": 0.2})) == ["b"]
    assert not RunFolder(cohort.folder).round(1).refinement_off
    np.testing.assert_array_equal(label(cohort, "labels", "a"), label(cohort, "predictions", "a"))
    assert label(cohort, "labels", "b").all()


@pytest.mark.parametrize("gains", [{"a": -0.3, "b": 0.2}, {"a": 0.0005, "b": 0.001}])
def test_a_refinement_that_gains_nothing_on_average_is_switched_off(cohort, caplog, gains):
    caplog.set_level("INFO", "semisam_o1")
    assert run(cohort, proposing, worth(gains)) == [] and "switched off" in caplog.text
    assert RunFolder(cohort.folder).round(1).refinement_off and not RunFolder(cohort.folder).round(2).refinement_off
    np.testing.assert_array_equal(label(cohort, "labels", "b"), label(cohort, "predictions", "b"))
