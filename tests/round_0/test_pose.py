"""Scans turned by right angles, of which no header tells: found, and labelled as if they stood upright."""

import nibabel
import numpy as np
import pytest
import torch

from semisam_o1.cli import main
from semisam_o1.data.grids import Grid
from semisam_o1.data.phantoms import grid_affine, make_phantom
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.encoders.turns import RIGHT_TURNS, frame_of, turn_of
from semisam_o1.features import FeatureStore
from semisam_o1.round_0.pose import right_turn
from semisam_o1.types import Case
from tests.jobs import labels

SHAPE, STEP = (24, 22, 18), 2.0
ENCODER = mind(dilations=(1, 2), boxes=(3, 5))


def turned_array(array, turn):
    """An array (H, W, D) whose content is turned: what lies at x moves to ``turn`` x, both from the middle."""
    order = np.abs(turn).argmax(1)
    signs = turn[range(3), order]
    return array.transpose(order)[tuple(slice(None, None, int(sign)) for sign in signs)].copy()


def tokens_of(image):
    with torch.no_grad():
        return ENCODER(torch.from_numpy(image)[None, None])[0]


def standard(seed):
    image, label = make_phantom(seed, SHAPE, STEP)
    return ((image - image.mean()) / image.std()).astype(np.float32), label


def test_the_24_turns_are_proper_and_differ():
    assert len(RIGHT_TURNS) == 24 and len({turn.tobytes() for turn in RIGHT_TURNS}) == 24
    for turn in RIGHT_TURNS:
        assert np.linalg.det(turn) == pytest.approx(1) and np.array_equal(turn @ turn.T, np.eye(3))
    np.testing.assert_array_equal(RIGHT_TURNS[0], np.eye(3))
    np.testing.assert_array_equal(turn_of(frame_of(7)), RIGHT_TURNS[7])
    assert turn_of("world") is None and turn_of("stored") is None


@pytest.mark.parametrize("number", range(0, 24, 3))
def test_turned_descriptors_are_those_of_a_turned_volume(number):
    image, turn = np.random.default_rng(0).normal(size=(9, 8, 7)).astype(np.float32), RIGHT_TURNS[number]
    expected = tokens_of(turned_array(image, turn))
    found = ENCODER.turned(tokens_of(image), turn)
    moved = np.stack([turned_array(channel, turn) for channel in found.numpy()])
    np.testing.assert_allclose(moved, expected, atol=1e-5)


@pytest.mark.parametrize("number", [0, 2, 5, 17])
def test_the_turn_of_a_scan_is_found(number):
    (template, _), (scan, _) = standard(0), standard(1)
    turn = RIGHT_TURNS[number]
    found = right_turn(tokens_of(template), tokens_of(turned_array(scan, turn)), STEP, ENCODER.turned)
    np.testing.assert_array_equal(RIGHT_TURNS[found], turn.T)  # from the scan's pose to the template's


def test_a_store_gives_turned_tokens(tmp_path):
    image, _ = standard(0)
    store = FeatureStore(tmp_path, ENCODER, STEP, "float32")
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), tmp_path / "a.nii.gz")
    tokens = tokens_of(image)
    store.save(Case("a", tmp_path / "a.nii.gz", None, "pool"), tokens, np.eye(4), Grid(np.eye(4), SHAPE))
    found = store.frame(frame_of(5)).load("a").tokens
    torch.testing.assert_close(found, ENCODER.turned(tokens, RIGHT_TURNS[5]))
    torch.testing.assert_close(store.frame("world").load("a").tokens, tokens)


@pytest.mark.slow
def test_a_turned_scan_gets_the_label_of_the_upright_one(tmp_path):
    """Round 0 with label fusion and quality, on two scans and a copy of one that lies on its side."""
    turn, affine = RIGHT_TURNS[5], grid_affine(SHAPE, STEP)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for name, seed in (("t", 0), ("a", 1), ("side", 1)):
        image, label = standard(seed)
        for folder, array in (("images", image), ("labels", label.astype(np.uint8))):
            array = turned_array(array, turn) if name == "side" else array
            nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / folder / f"{name}.nii.gz")
    (tmp_path / "train.txt").write_text("t\na\nside\n")
    command = ["propagate", str(tmp_path), "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*command, "--set", "feature_voxels=9000"]) == 0
    found = labels(tmp_path / "run" / "pseudo_labels")
    back = turned_array(found["side.nii.gz"], turn.T)
    overlap = 2 * ((back > 0) & (found["a.nii.gz"] > 0)).sum() / ((back > 0).sum() + (found["a.nii.gz"] > 0).sum())
    assert overlap > 0.9
