"""Which spacing of the features the classes of a template ask for, and which classes are named as too small."""

from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch

from semisam_o1.data import class_sizes
from semisam_o1.data.class_sizes import choose_feature_spacing, classes_on_tokens, kept_on_tokens, small_classes
from semisam_o1.data.grids import Grid
from semisam_o1.types import Case
from tests.jobs import cohort_of

SIDE = 48  # voxels of 1 mm
VOXELS = 16**3  # of 3 mm
BALL, PLATE = 1, 2


@pytest.fixture
def cohort(request, tmp_path):
    """One template: a ball of 12 mm radius, and a plate of 20 x 20 mm as thick as the parameter says, in mm."""
    label = np.zeros((SIDE,) * 3, np.uint8)
    label[np.linalg.norm(np.moveaxis(np.indices(label.shape), 0, -1) - [16, 24, 24], axis=-1) < 12] = BALL
    label[37 : 37 + request.param, 14:34, 14:34] = PLATE
    paths = tmp_path / "image.nii.gz", tmp_path / "label.nii.gz"
    noise = np.random.RandomState(0).rand(*label.shape).astype(np.float32)
    for path, values in zip(paths, (noise, label)):
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    return cohort_of([Case("t", *paths, "template")], classes={0: "background", BALL: "ball", PLATE: "plate"})


@pytest.mark.parametrize("cohort", [1], indirect=True)
def test_a_thin_class_gets_finer_tokens_as_far_as_is_allowed(cohort):
    """By hand: 1.5, 2.25 and 3 times as many voxels are 2.6207, 2.2894 and 2.0801 mm; 27 times are 1 mm, as stored."""
    assert choose_feature_spacing(cohort, VOXELS) == choose_feature_spacing(cohort, VOXELS, 1) == 3.0
    assert choose_feature_spacing(cohort, VOXELS, 1.2) == pytest.approx(3 / 1.2 ** (1 / 3), abs=1e-3)
    assert choose_feature_spacing(cohort, VOXELS, 3) == pytest.approx(3 / 3 ** (1 / 3), abs=1e-3)
    assert choose_feature_spacing(cohort, VOXELS, 1000) == 1.0


@pytest.mark.parametrize("cohort", [3], indirect=True)
def test_tokens_are_no_finer_than_the_smallest_class_needs(cohort):
    """The chosen tokens keep 95% of the plate; those of a step before do not."""
    chosen = choose_feature_spacing(cohort, VOXELS, 1000)
    before = chosen * class_sizes.GROWTH ** (1 / 3)
    kept = {mm: classes_on_tokens(cohort, cohort.templates[0], mm)[PLATE - 1].kept for mm in (chosen, before)}
    assert 1 < chosen < 3 and kept[chosen] >= class_sizes.SMALL > kept[before]


@pytest.mark.parametrize("cohort", [0, 12], indirect=True)
def test_large_classes_change_nothing(cohort):
    assert choose_feature_spacing(cohort, VOXELS, 1000) == 3.0


@pytest.mark.parametrize("cohort", [1], indirect=True)
def test_finer_tokens_must_fit_into_memory(cohort, monkeypatch):
    """By hand: half of 60 MB holds 7,500 voxels of 4,000 bytes, 1.83 times as many: one step of 1.5, and no second.

    So a little more or less memory changes nothing.
    """
    monkeypatch.setattr(class_sizes.psutil, "virtual_memory", lambda: SimpleNamespace(total=60_000_000))
    assert choose_feature_spacing(cohort, VOXELS, 3) == pytest.approx(3 / 1.5 ** (1 / 3), abs=1e-3)


@pytest.mark.parametrize("index", [80, 81])
def test_a_thin_class_is_seen_wherever_it_lies_in_a_large_label(index, monkeypatch):
    """Every second voxel is compared, and the plate of one voxel lies between them, or not."""
    monkeypatch.setattr(class_sizes, "ENOUGH", 40**3)
    label = torch.zeros(80, 80, 80, dtype=torch.long)
    label[4:76, 4:76, 4:40], label[index - 20, 30:50, 50:70] = 1, 2
    shares = torch.stack([label != 1, label == 1, label == 3]).float()  # nothing is left of the plate
    kept = kept_on_tokens(label, Grid(np.eye(4), tuple(label.shape)), shares, np.eye(4))
    assert kept[2] == 0 and kept[1] > 0.99


@pytest.mark.parametrize("cohort", [1], indirect=True)
def test_a_stray_voxel_asks_for_nothing(cohort, monkeypatch):
    monkeypatch.setattr(class_sizes, "LEAST_VOXELS", 401)  # the plate has 400
    assert choose_feature_spacing(cohort, VOXELS, 3) == 3.0


@pytest.mark.parametrize("cohort", [2], indirect=True)
def test_classes_that_lose_detail_are_named_with_their_size(cohort):
    ball, plate = small_classes(cohort, 4.0)  # half a token thick
    assert (plate.case, plate.severity, ball.severity) == ("t", "warning", "note")
    assert plate.found == "label: plate (800 voxels, 12 tokens) fills no token of 4 mm"
    assert ball.found.startswith("label: ball (7,123 voxels, 111 tokens) loses detail on tokens of 4 mm (Dice 0.9")
    (plate,) = small_classes(cohort, 2.0)
    assert plate.severity == "note" and plate.found.startswith("label: plate (800 voxels, 100 tokens) loses detail")
    assert small_classes(cohort, 1.0) == []
