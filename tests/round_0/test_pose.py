"""Scans that lie turned or mirrored, of which no header tells: found, and labelled as if they stood upright."""

import logging

import nibabel
import numpy as np
import pytest
import torch
from monai.utils import CommonKeys as Keys
from scipy.spatial.transform import Rotation

from semisam_o1.cli import main
from semisam_o1.data.grids import Grid
from semisam_o1.data.intensities import HAS_DATA
from semisam_o1.data.phantoms import grid_affine
from semisam_o1.data.transforms import image_chain
from semisam_o1.data.turns import frame_of, turn_of, turned
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.features import Features, FeatureStore
from semisam_o1.round_0 import first_pass, pose
from semisam_o1.round_0.places import AffineMap, centred_points, pooled
from semisam_o1.round_0.pose import (
    Coarse,
    Poses,
    angle,
    coarse_image,
    covering,
    nearest_turn,
    search,
    with_right_angles,
)
from semisam_o1.round_0.propagation import Propagated, Reference
from semisam_o1.round_0.quality import WayBack
from semisam_o1.round_0.templates import Template
from semisam_o1.round_0.turned_scans import lacks_turned
from semisam_o1.round_0.way_back import TemplatesWayBack
from semisam_o1.types import Case
from tests.jobs import labels

SHAPE, STEP = (34, 30, 26), 1.5
UPRIGHT = np.eye(3)
TILTED = Rotation.from_rotvec([40, -60, 35], degrees=True).as_matrix()
QUARTER = Rotation.from_rotvec([0, 90, 0], degrees=True).as_matrix()
# centre and radii of ellipsoids in mm, and their intensity: a body with a head, and organs that no turn or mirror maps
# onto each other
PARTS = (
    ((0, -2, 0), (19, 14, 10), 0.4),
    ((13, 11, 3), (7, 7, 6), 0.5),
    ((-7, -4, 3), (6, 5, 5), 1.0),
    ((6, -3, -3), (5, 5, 4), 0.05),
    ((14, 11, 4), (4, 3, 3), 0.9),
    ((-13, 3, -2), (3, 4, 4), 0.1),
)
ORGAN = 2  # of the parts, which has the label


def scan(turn=UPRIGHT, seed=0, mirrored=False, shape=SHAPE):
    """Image and label, (H, W, D) each, of a body whose content is turned: what lies at x moves to ``turn`` x."""
    draw = np.random.default_rng(seed)
    at = np.moveaxis(np.indices(shape), 0, -1) - (np.array(shape) - 1) / 2
    at = at * STEP @ turn  # the inverse turn
    at[..., 0] *= -1 if mirrored else 1
    at = at / draw.normal(1, 0.03, 3) - draw.normal(0, 0.5, 3)
    image = np.zeros(shape)
    for centre, radii, value in PARTS:
        depth = (1 - np.linalg.norm((at - np.array(centre)) / np.array(radii), axis=-1)) * min(radii)
        image += (value - image) * 0.5 * (1 + np.tanh(depth / 1.5))
    centre, radii, _ = PARTS[ORGAN]
    label = np.linalg.norm((at - np.array(centre)) / np.array(radii), axis=-1) < 1
    image = image + draw.normal(0, 0.02, shape)
    return ((image - image.mean()) / image.std()).astype(np.float32), label.astype(np.uint8)


def coarse(*args, **options):
    image = torch.from_numpy(scan(*args, **options)[0])[None]
    return Coarse(image, torch.ones_like(image) > 0, STEP)


def test_the_name_of_a_frame_tells_its_turn():
    assert angle(turn_of(frame_of(TILTED)), TILTED) < 0.05
    assert turn_of("world") is None and turn_of("stored") is None and turn_of(None) is None


def test_no_rotation_is_far_from_all_turns():
    turns = covering()
    np.testing.assert_allclose(turns[0], UPRIGHT, atol=1e-9)
    asked = Rotation.random(300, random_state=0).as_matrix()
    traces = np.einsum("nij,mij->nm", asked, turns).max(1)
    assert np.degrees(np.arccos((traces - 1) / 2)).max() < 30


def test_the_nearest_turn_is_proper():
    assert angle(nearest_turn(1.2 * TILTED + 0.01), TILTED) < 2
    assert np.linalg.det(nearest_turn(np.diag([1.0, 1.0, -0.1]))) == pytest.approx(1)


def test_right_angles_come_before_turns_near_them():
    """6 degrees off: the right angle alone; 25 degrees: first the right angle; 45 degrees: as it is."""
    found = [with_right_angles([Rotation.from_rotvec([0, d, 0], degrees=True).as_matrix()]) for d in (84, 65, 45)]
    assert [[round(angle(turn, UPRIGHT)) for turn in turns] for turns in found] == [[90], [90, 65], [45]]


@pytest.mark.parametrize("turn", [TILTED, QUARTER], ids=["tilted", "quarter"])
def test_the_turn_of_a_scan_is_found(turn):
    found = search(coarse(), coarse(turn, seed=1, shape=(34, 34, 34)))
    assert angle(found.turns[0], turn.T) < 15  # from the scan's pose to the template's
    assert found.mirrored > pose.MIRRORED


def test_an_upright_scan_is_not_turned():
    found = search(coarse(), coarse(seed=1))
    assert found.turns == [] and found.mirrored > pose.MIRRORED


def test_a_mirrored_scan_fits_mirrored():
    assert search(coarse(), coarse(seed=1, mirrored=True)).mirrored < pose.MIRRORED


def test_a_coarse_image_leaves_empty_voxels_out_of_its_means():
    image, held = torch.ones(1, 4, 4, 4), torch.ones(1, 4, 4, 4) > 0
    image[:, :, :, 3], held[:, :, :, 3] = -5, False
    image[:, :2, :2, :2], held[:, :2, :2, :2] = -5, False
    found = coarse_image(image, held, 1.5, 2)
    assert found.step_mm == 3 and found.has_data.sum() == 3
    assert (found.image[found.has_data] == 1).all() and (found.image[~found.has_data] == -5).all()


def test_a_turned_frame_has_the_content_in_another_pose(tmp_path):
    """The turned scan, turned back, is the upright one; where it has no data, it has the lowest value."""
    (upright, _), (tilted, _) = scan(), scan(TILTED, shape=(40, 40, 40))
    nibabel.save(nibabel.Nifti1Image(tilted, grid_affine(tilted.shape, STEP)), tmp_path / "a.nii.gz")
    chain = image_chain(STEP, intensities=None, frame=frame_of(TILTED.T), keep_mask=True)
    item = chain({"case": "a", Keys.IMAGE: str(tmp_path / "a.nii.gz")})
    found, held = item[Keys.IMAGE].as_tensor()[0], item[HAS_DATA].as_tensor()[0] > 0.5
    assert 0.2 < held.float().mean() < 0.95 and (found[~held] == found.min()).all()
    at = np.stack(np.nonzero(held.numpy()), -1) @ item[Keys.IMAGE].affine.numpy()[:3, :3].T
    at = (at + item[Keys.IMAGE].affine.numpy()[:3, 3]) / STEP + (np.array(SHAPE) - 1) / 2
    index = np.rint(at).astype(int)
    inside = ((index >= 0) & (index < SHAPE)).all(1)
    expected = upright[tuple(index[inside].T)]
    assert np.corrcoef(expected, found[held].numpy()[inside])[0, 1] > 0.9


def test_turned_features_are_fresh_for_their_turn_alone(tmp_path):
    store = FeatureStore(tmp_path, mind(dilations=(1,), boxes=(3,)), STEP)
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 3, 3), np.float32), np.eye(4)), tmp_path / "a.nii.gz")
    case = Case("a", tmp_path / "a.nii.gz", None, "pool")
    store.frame(frame_of(TILTED)).save(case, torch.zeros(2, 3, 3, 3), np.eye(4), Grid(np.eye(4), (3, 3, 3)))
    assert store.frame(frame_of(TILTED)).fresh(case)
    assert not store.frame(frame_of(QUARTER)).fresh(case) and not store.fresh(case)
    assert not lacks_turned(store, case, frame_of(TILTED)) and not lacks_turned(store, case, "world")
    assert lacks_turned(store, case, frame_of(QUARTER))  # the first pass of the scan is repeated


def test_a_turned_affine_is_that_of_a_turned_world():
    affine = turned(grid_affine(SHAPE, STEP), QUARTER)
    np.testing.assert_allclose(turned(affine, QUARTER.T), grid_affine(SHAPE, STEP), atol=1e-12)
    np.testing.assert_allclose(affine[:3, 0], [0, 0, -STEP], atol=1e-12)  # left-right has become head-foot


class OneTurn:
    """In place of `TurnedScans`: a mirrored pose that fits, and one turn to try, in which ``tokens`` are the scan's."""

    def __init__(self, tokens, affine, promising):
        self.tokens, self.affine, self.promising, self.kept, self.tried = tokens, affine, promising, [], []

    def search(self, template, name):
        return Poses([QUARTER], 0.5) if self.promising else Poses([], 0.5, [QUARTER])

    def features(self, name, frame):
        self.tried.append(frame)
        return Features(self.tokens, self.affine, np.ones(1), Grid(self.affine, SHAPE))

    def keep(self, name, frame):
        self.kept.append(frame)


@pytest.mark.parametrize("pooling", [1, 2])
@pytest.mark.parametrize("promising", [True, False])
@pytest.mark.parametrize(("better", "distance", "taken"), [(True, 0.11, True), (True, 0.3, True), (False, 0.1, False)])
def test_the_way_back_of_the_label_decides_and_a_mirrored_pose_is_said(
    tmp_path, caplog, monkeypatch, better, distance, taken, promising, pooling
):
    """A label that comes back to the template in one of two poses; the other comes back nowhere.

    How alike scan and template are in the pose from which nothing comes back says nothing. On large grids, poses are
    compared on pooled tokens, and the label is that of all tokens.
    """
    steps = []
    image, label = scan()
    affine, shares = grid_affine(SHAPE, STEP), torch.from_numpy(np.stack([1 - label, label])).float()
    place = (AffineMap(torch.eye(3), torch.zeros(3)),)
    tokens = {True: torch.ones(1, *SHAPE), False: torch.zeros(1, *SHAPE)}
    nibabel.save(nibabel.Nifti1Image(image, affine), tmp_path / "a.nii.gz")
    store = FeatureStore(tmp_path, mind(dilations=(1,), boxes=(3,)), STEP)
    store.save(Case("a", tmp_path / "a.nii.gz", None, "pool"), tokens[not better], affine, Grid(affine, SHAPE))

    def propagate(references, scan, step_mm, turns=None):
        steps.append(step_mm)
        own = pooled(shares, round(step_mm / STEP))
        found = own if scan.mean() > 0 else torch.stack([own.sum(0), 0 * own[0]])
        return Propagated(found, place, 0, 0.1 if turns else distance, None)

    template = Template("t", store.load("a"), Reference(tokens[True], shares))

    def back(templates, features, frame):
        (one,) = templates
        points = centred_points(one.reference.tokens.shape[1:], one.features.step_mm)
        return TemplatesWayBack(one, WayBack(points, 0.1))

    monkeypatch.setattr(first_pass, "way_back", back)
    monkeypatch.setattr(first_pass, "finest", lambda _: pooling)
    poses = OneTurn(tokens[better], affine, promising)
    with caplog.at_level(logging.WARNING, "semisam_o1"):
        found = first_pass.Propagation(store, [template], propagate, poses)("a")
    expected = frame_of(QUARTER) if taken else "world"
    assert found.frame == expected and poses.kept == [expected]
    assert found.features.tokens.shape[1:] == found.result.probabilities.shape[1:] == SHAPE
    coarse = sum(step > 1.5 * STEP for step in steps)
    assert coarse == (pooling > 1) * (2 if poses.tried else 1)
    assert bool(poses.tried) == (promising or better)  # a turn that fits no better is tried if nothing comes back
    assert [record.message.split(":")[0] for record in caplog.records] == ["case a"]
    assert "a mirrored copy" in caplog.text and "50%" in caplog.text


@pytest.mark.parametrize("shape", [(6, 8, 10), (7, 8, 9), (1, 5, 4)])
def test_pooled_features_lie_where_they_lay(shape):
    """A token whose value is its place along an axis, in mm, has that place after pooling."""
    affine = grid_affine(shape, (2.0, 2.0, 2.0), "LAS", (0, 0, 0.3))
    places = np.einsum("ij,jhwd->ihwd", affine[:3, :3], np.indices(shape)) + affine[:3, 3, None, None, None]
    tokens = torch.from_numpy(places).float()
    found = first_pass.coarser(Features(tokens, affine, np.ones(1), Grid(affine, shape)), 2)
    expected = np.einsum("ij,jhwd->ihwd", found.affine[:3, :3], np.indices(found.tokens.shape[1:]))
    expected += found.affine[:3, 3, None, None, None]
    np.testing.assert_allclose(found.tokens.numpy(), expected, atol=1e-4)
    assert found.step_mm == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("turned", "taken"),
    [
        ([], 0),
        ([(0.42, 0.1, 0.1)], 0),  # comes back hardly better
        ([(0.54, 0.12, 0.1)], 0),  # fits much worse, and the label comes back from both
        ([(0.61, 0.3, 0.1)], 1),  # the label comes back from this one alone, whose corners fit nothing
        ([(0.59, 0.3, 0.1)], 0),  # but not well enough
        ([(0.5, 0.11, 0.19)], 1),
        ([(0.74, 0.1, 0.131), (0.76, 0.1, 0.118)], 2),  # both come back: the template fits the second better
        ([(0.76, 0.1, 0.128), (0.64, 0.1, 0.121)], 2),
        ([(0.54, 0.1, 0.191), (0.22, 0.1, 0.178)], 1),  # the second does not come back
        ([(0.64, 0.1, 0.191), (0.45, 0.1, 0.178)], 1),  # the second hardly comes back
        ([(0.54, 0.066, 0.191), (0.58, 0.102, 0.176)], 1),  # the scan fits the template much worse in the second
        ([(0.1, 0.066, 0.1), (0.62, 0.102, 0.176)], 2),  # but not if the label does not come back from the first
    ],
)
def test_of_poses_from_which_the_label_comes_back_the_template_fits_one_best(turned, taken):
    """Each pose: reverse consistency, distance of the scan to the template, distance of the template to the scan."""

    def pose(worth, distance, back_distance):
        found = Propagated(None, residual=distance)
        return first_pass.Carried(None, found, "", TemplatesWayBack(None, WayBack(None, back_distance)), worth)

    poses = [pose(0.4, 0.1, 0.2), *(pose(*one) for one in turned)]
    assert first_pass.best_pose(poses[0], poses[1:]) is poses[taken]


def test_a_right_angle_takes_no_place_of_another_turn(monkeypatch):
    """Three poses, each 25 degrees from a right-angled one, give six turns to try."""
    ways = ([115, 0, 0], [0, 115, 0], [0, 0, 155])
    turned = [Rotation.from_rotvec(way, degrees=True).as_matrix() for way in ways]
    found = [pose.Pose(UPRIGHT, 1.0), *(pose.Pose(turn, 0.5) for turn in turned)]
    monkeypatch.setattr(pose, "poses", lambda *_, mirrored=False: found)
    turns = search(None, None).turns
    assert [round(angle(turn, UPRIGHT)) for turn in turns] == [90, 115, 90, 115, 180, 155]


@pytest.mark.slow
def test_a_turned_scan_gets_a_label(tmp_path):
    made = {"t": scan(), "tilted": scan(TILTED, 2, shape=(40, 40, 40))}
    for folder, part in (("images", 0), ("labels", 1)):
        (tmp_path / folder).mkdir()
        for name, arrays in made.items():
            volume = nibabel.Nifti1Image(arrays[part], grid_affine(arrays[part].shape, STEP))
            nibabel.save(volume, tmp_path / folder / f"{name}.nii.gz")
    (tmp_path / "train.txt").write_text("\n".join(made))
    run = tmp_path / "run"
    command = ["propagate", str(tmp_path), "--output", str(run), "--device", "cpu", "--set", "feature_voxels=6000"]
    assert main([*command, "label_fusion=false", "quality_estimate=false"]) == 0
    found, truth = labels(run / "pseudo_labels")["tilted.nii.gz"] > 0, made["tilted"][1] > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.6
    assert (run / "features" / "turned" / "tilted.h5").is_file()
