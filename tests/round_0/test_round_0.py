"""The engines of round 0 on tiny scans: what the second pass finds when it starts."""

from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

from semisam_o1.data import ScanReader
from semisam_o1.data.grids import Grid
from semisam_o1.encoders.base import Encoder
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.features import Features, FeatureStore
from semisam_o1.files import write_json
from semisam_o1.round_0.engines import first_pass_engine, label_fusion_engine, write_results
from semisam_o1.round_0.passes import Alignment, FirstPass, dropped_vote, settle_vote
from semisam_o1.round_0.places import CHANNELS, AffineMap, centred_points, coarse
from semisam_o1.round_0.propagation import Propagated, copy
from semisam_o1.round_0.templates import templates_of
from semisam_o1.runfolder import OUTLINES, RoundFolder, RunFolder
from semisam_o1.types import Case, UserError
from tests.jobs import cohort_of

SIDES = (12, 11, 10)
CUBE = np.zeros(SIDES, np.uint8)
CUBE[4:8, 4:8, 3:7] = 1


def with_label(case, label):
    """The case with a file of the label (H, W, D)."""
    path = case.image.with_name(f"{case.name}_label.nii.gz")
    nibabel.save(nibabel.Nifti1Image(label.astype(np.uint8), np.eye(4)), path)
    return replace(case, label=path)


@pytest.fixture
def cohort(tmp_path):
    """Template t and scans a, b, c, all with the same features; a's first label is unsure, the others are a cube."""
    store = FeatureStore(tmp_path / "features", Encoder(nn.Identity(), "plain"), 1.0, "float32")
    tokens = torch.randn(CHANNELS, *SIDES, generator=torch.Generator().manual_seed(0))
    grid, drafts, cases = Grid(np.eye(4), SIDES), RunFolder(tmp_path).round(0).work("first"), []
    for name in "tabc":
        nibabel.save(nibabel.Nifti1Image(np.zeros(SIDES, np.float32), np.eye(4)), tmp_path / f"{name}.nii.gz")
        cases.append(Case(name, tmp_path / f"{name}.nii.gz", None, "pool"))
        store.save(cases[-1], tokens, np.eye(4), grid)

    def first_pass(names="abc", apart=0.0):
        RunFolder(tmp_path).round(0).uncertainty.write(dict.fromkeys(names, {"uncertainty": 0.1}))
        apart = torch.tensor([0, 0, apart])
        for name in names:
            shares = torch.zeros(2, *SIDES)
            shares[1, 4:8, 4:8, 3:7] = 0.45 if name == "a" else 0.9
            shares[0] = 1 - shares[1]
            place = Alignment(AffineMap(torch.eye(3), torch.zeros(3)), coarse(tokens, tokens)[0])
            points = centred_points(SIDES, 1.0) + apart
            FirstPass(shares, "world", "t", 0.1, 0.1, points, {"t": place}).save(drafts, name)

    more = {"store": store, "folder": tmp_path, "first_pass": first_pass}
    return cohort_of([with_label(cases[0], CUBE)], cases[1:], **more)


def label_fusion(cohort):
    return label_fusion_engine(cohort.store, cohort, cohort.pool, cohort.folder, atlases=2, iterations=(0, 0, 0))


def label(cohort, name):
    return ScanReader().volume(RunFolder(cohort.folder).round(0).label(name))[0].numpy()


def test_two_atlases_outvote_a_scan_that_is_not_sure(cohort):
    cohort.first_pass()
    engine = label_fusion(cohort)
    engine.run(cohort.pool, epoch_length=3)
    assert engine.state.failed == {}
    for name in "abc":
        np.testing.assert_array_equal(label(cohort, name), CUBE)


def test_a_scan_whose_places_in_the_template_are_others_keeps_its_label_where_it_is(cohort):
    """Its label is on its own tokens; only the template's descriptors are looked up by its places there.

    These are the same at each place along the third axis, so the scan's own label matches as well as any.
    """
    alike = torch.randn(CHANNELS, *SIDES[:2], 1).expand(CHANNELS, *SIDES).contiguous()
    for case in cohort.cases:
        cohort.store.save(case, alike, np.eye(4), Grid(np.eye(4), SIDES))
    cohort.first_pass("abc", apart=2.0)
    label_fusion(cohort).run(cohort.pool, epoch_length=3)
    for name in "abc":
        np.testing.assert_array_equal(label(cohort, name), CUBE)


def test_the_second_pass_sees_what_the_first_wrote_after_it_was_built(cohort):
    engine = label_fusion(cohort)
    cohort.first_pass()
    engine.run(cohort.pool, epoch_length=3)
    assert label(cohort, "a").sum() == 64


def test_scans_that_the_first_pass_did_not_align_are_left_alone(cohort):
    cohort.first_pass("ab")
    engine = label_fusion(cohort)
    engine.run(cohort.pool, epoch_length=3)
    assert sorted(p.name for p in (cohort.folder / "round_0" / "labels").iterdir()) == ["a.nii.gz", "b.nii.gz"]
    assert engine.state.failed == {}


def test_a_template_that_fills_no_token_is_refused(tmp_path):
    label, grid = np.zeros((24, 24, 24), np.uint8), Grid(np.eye(4), (24, 24, 24))
    label[4:20, 4:20, 4:20], label[12:14, 12:14, 12:14] = 1, 2
    for name, volume in (("image", np.zeros((24, 24, 24), np.float32)), ("label", label)):
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / f"{name}.nii.gz")
    case = Case("t", tmp_path / "image.nii.gz", tmp_path / "label.nii.gz", "template")
    store = FeatureStore(tmp_path / "features", mind(), 1.0)
    place = np.diag([8.0, 8, 8, 1])
    place[:3, 3] = 3.5
    store.save(case, torch.zeros(2, 3, 3, 3), place, grid)
    classes = {0: "background", 1: "large", 2: "small"}
    cohort = cohort_of([case], classes=classes)
    assert len(templates_of(store, cohort)) == 1
    label[label == 1] = 0
    nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), tmp_path / "label.nii.gz")
    with pytest.raises(UserError, match="of 8 mm"):
        first_pass_engine(store, cohort, copy, tmp_path)


@pytest.mark.parametrize(("guard", "worse"), [(True, True), (True, False), (False, True)])
def test_a_vote_that_makes_labels_less_consistent_is_dropped_for_all(cohort, guard, worse):
    """Labels as if the vote had cut half of a cube, or had mended one that lacked that half."""
    store, folder = cohort.store, cohort.folder
    whole, half = (np.zeros(SIDES) for _ in range(2))
    whole[4:8, 4:8, 3:7], half[4:6, 4:8, 3:7] = 1, 1
    cohort = replace(cohort, templates=(with_label(cohort.templates[0], whole),))
    for case in cohort.templates:
        store.save(case, store.load("a").tokens, np.eye(4), Grid(np.eye(4), SIDES))

    def propagate(references, scan, step_mm, turns):
        voted, plain = (
            torch.tensor(np.stack([1 - c, c]), dtype=torch.float32) for c in (half, whole)[:: 1 if worse else -1]
        )
        place = (AffineMap(torch.eye(3), torch.zeros(3)),)
        return Propagated(voted, place, 0, 0.1, centred_points(SIDES, 1.0), plain)

    for cases in (cohort.pool[:2], cohort.pool[2:]):  # a scan that comes later follows
        engine = first_pass_engine(store, cohort, propagate, folder, guard=guard)
        engine.run(cases, epoch_length=len(cases))
        assert engine.state.failed == {}
    records = RunFolder(folder).round(0).work("first")
    expected = half if worse and not guard else whole
    for name in "abc":
        found = ScanReader().volume(RunFolder(folder).round(0).label(name))[0].numpy()
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(FirstPass.load(records, name, "probabilities").probabilities[1], expected)
    assert dropped_vote(records) == (worse if guard else None)


def test_the_vote_is_settled_once_by_the_mean_over_scans(tmp_path):
    records = RunFolder(tmp_path).round(0).work("first")
    for name, gain in (("a", -0.02), ("b", 0.002), ("c", None)):
        FirstPass(torch.zeros(2, 1, 1, 1), "world", "t", 0.1, 0.1, None, {}, None, gain).save(records, name)
    assert settle_vote(records, ["b", "c"]) is False and settle_vote(records, ["a"]) is False
    RunFolder(tmp_path).round(0).remove(["first"], "abc")  # what is begun anew is settled anew
    FirstPass(torch.zeros(2, 1, 1, 1), "world", "t", 0.1, 0.1, None, {}, None, -0.02).save(records, "a")
    assert settle_vote(records, ["a"]) is True


@pytest.mark.parametrize("published", [True, False])
def test_as_published_a_voxel_is_its_tokens_and_outside_of_all_is_background(tmp_path, published):
    """Two tokens of 4 mm, the first of class 1 for 0.7, in a row of 12 voxels that begins 2 voxels before them."""
    scan, affine = Grid(np.eye(4), (12, 4, 4)), np.diag([4.0, 4, 4, 1])
    affine[:3, 3] = 3.5, 1.5, 1.5
    nibabel.save(nibabel.Nifti1Image(np.zeros(scan.shape, np.float32), np.eye(4)), tmp_path / "a.nii.gz")
    foreground = torch.tensor([0.7, 0.0]).reshape(2, 1, 1)
    probabilities = torch.stack([1 - foreground, foreground])
    case = Case("a", tmp_path / "a.nii.gz", None, "pool")
    write_results(RoundFolder(tmp_path), case, probabilities, Features(None, affine, None, scan), [0, 1], published)
    row = ScanReader().volume(tmp_path / "labels" / "a.nii.gz")[0, :, 0, 0].tolist()
    assert row == ([0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0] if published else [0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0])


def test_borders_are_moved_again_for_the_scans_that_are_left(cohort):
    """What was learned of how people outline no longer holds; a scan that was rejected since has a fused label, too."""
    cohort.first_pass()
    label_fusion(cohort).run(cohort.pool, epoch_length=3)
    write_json(cohort.folder / "round_0" / "work" / "first" / OUTLINES, {"factors": [0.1], "gain": 0.1})
    left = replace(cohort, pool=cohort.pool[1:])
    engine = label_fusion_engine(cohort.store, left, left.pool, cohort.folder, atlases=2, iterations=(0, 0, 0))
    before = RunFolder(cohort.folder).round(0).label("a").stat().st_mtime_ns
    engine.run(left.pool[:1], epoch_length=1)
    assert engine.state.failed == {} and set(engine.state.values) >= {left.pool[0].name}
    np.testing.assert_array_equal(label(cohort, left.pool[1].name), CUBE)
    assert RunFolder(cohort.folder).round(0).label("a").stat().st_mtime_ns == before
