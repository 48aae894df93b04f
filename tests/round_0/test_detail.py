"""Classes that are thinner than a token: carried over at the template's own resolution."""

from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

from semisam_o1.cli import main
from semisam_o1.data import ScanReader
from semisam_o1.data.class_sizes import kept_on_tokens
from semisam_o1.data.grids import Grid
from semisam_o1.encoders.base import Encoder
from semisam_o1.features import FeatureStore
from semisam_o1.round_0.calibration import USUAL_SPREAD, calibrate
from semisam_o1.round_0.detail import Details, Placed, dices_of_small
from semisam_o1.round_0.engines import first_pass_engine, label_fusion_engine
from semisam_o1.round_0.passes import Alignment, FirstPass
from semisam_o1.round_0.places import AffineMap, centred_points, coarse
from semisam_o1.round_0.propagation import Propagated, near, prototype
from semisam_o1.round_0.quality import Evidence, WayBack, evidence
from semisam_o1.round_0.templates import reference
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import Case, UserError
from tests.jobs import cohort_of, labels

TOKENS, STEP = (16, 15, 14), 3  # tokens of 3 x 3 x 3 voxels of 1 mm
SHAPE = tuple(STEP * n for n in TOKENS)
ORIGIN = np.array([10.0, -20.0, 5.0])  # of the first voxel, RAS mm
TOKEN_AFFINE = np.diag([STEP, STEP, STEP, 1.0])
TOKEN_AFFINE[:3, 3] = ORIGIN + (STEP - 1) / 2
BALL, PLATE = 1, 2


def made_label(moved=0):
    """A ball, and a plate of one voxel, ``moved`` voxels along the second axis."""
    label = np.zeros(SHAPE, np.uint8)
    distance = np.linalg.norm(np.moveaxis(np.indices(SHAPE), 0, -1) - [23, 18 + moved, 20], axis=-1)
    label[distance < 16] = BALL
    label[10:30, 37 + moved, 7:30] = PLATE
    return label


def grid(axes=(1, 1, 1)):
    """The scans' grid; an axis of -1 is stored in the opposite direction, over the same place."""
    affine = np.diag([*axes, 1.0])
    affine[:3, 3] = ORIGIN + [n - 1 if axis < 0 else 0 for n, axis in zip(SHAPE, axes)]
    return Grid(affine, SHAPE)


def stored(values, axes):
    return values[tuple(slice(None, None, axis) for axis in axes)]


@pytest.fixture(params=[(1, 1, 1), (-1, -1, 1)], ids=["RAS", "LPS"])
def cohort(request, tmp_path):
    """A template t, and a scan a whose content lies 2 mm further along the second axis; both stored along ``axes``."""
    store, axes = FeatureStore(tmp_path / "features", Encoder(nn.Identity(), "plain"), 1.0, "float32"), request.param
    cases, place = [], grid(axes)
    for name in "ta":
        paths = [tmp_path / f"{name}_{kind}.nii.gz" for kind in ("image", "label")]
        for path, values in zip(paths, (np.ones(SHAPE, np.float32), made_label(0 if name == "t" else 2))):
            nibabel.save(nibabel.Nifti1Image(stored(values, axes), place.affine), path)
        cases.append(Case(name, *paths, "pool"))
        store.save(cases[-1], torch.zeros(4, *TOKENS), TOKEN_AFFINE, place)
    return cohort_of(cases[:1], cases[1:], classes=3, store=store, folder=tmp_path)


def first_of(cohort, reached=(1.0, 1.0)):
    """The first pass of scan a, from its own place in the template."""
    template = cohort.templates[0]
    points = centred_points(TOKENS, STEP) - torch.tensor([0.0, 2.0, 0.0])
    shares = reference(cohort.pool[0], cohort.store.load("a"), cohort).label  # what tokens can tell at best
    place = Alignment(
        AffineMap(torch.eye(3), torch.tensor([0.0, -2.0, 0.0])), coarse(*[torch.zeros(4, *TOKENS)] * 2)[0]
    )
    found = {template.name: place}
    return FirstPass(shares, "world", template.name, 0.1, 0.1, points, found, None, None, torch.tensor(reached))


def test_tokens_keep_a_ball_and_lose_a_plate(cohort):
    case, found = cohort.templates[0], cohort.store.load("t")
    kept = kept_on_tokens(cohort.label(case), found.scan, reference(case, found, cohort).label, found.affine)
    assert kept[BALL] > 0.95 and kept[PLATE] == 0


@pytest.mark.parametrize(("reached", "plate"), [((1.0, 1.0), True), ((1.0, 0.0), False)])
def test_fused_labels_have_the_small_classes_of_the_template(cohort, reached, plate):
    """Voxel for voxel where the template's outline lies; nothing of a class outside of the field of view."""
    folder = RunFolder(cohort.folder).round(0)
    first_of(cohort, reached).save(folder.work("first"), "a")
    folder.uncertainty.write({"a": {"uncertainty": 0.1}})
    engine = label_fusion_engine(cohort.store, cohort, cohort.pool, cohort.folder, iterations=(0, 0, 0))
    engine.run(cohort.pool, epoch_length=1)
    assert engine.state.failed == {}
    found = ScanReader().volume(folder.label("a"))[0].numpy()
    true = cohort.label(cohort.pool[0]).numpy()
    assert ((found == PLATE) == ((true == PLATE) & plate)).all()
    overlap = 2 * ((found == BALL) & (true == BALL)).sum() / ((found == BALL).sum() + (true == BALL).sum())
    assert overlap > 0.9
    assert float(ScanReader().volume(folder.confidence("a")).max()) <= 1


def test_the_first_pass_has_them_too(cohort):
    first = first_of(cohort)

    def propagate(references, scan, step_mm, turns):
        place = first.alignments["t"].to_template
        return Propagated(first.probabilities, (place,), 0, 0.1, first.points, None)

    engine = first_pass_engine(cohort.store, cohort, propagate, cohort.folder)
    engine.run(cohort.pool, epoch_length=1)
    assert engine.state.failed == {}
    found = ScanReader().volume(RunFolder(cohort.folder).round(0).label("a"))[0].numpy()
    np.testing.assert_array_equal(found == PLATE, cohort.label(cohort.pool[0]).numpy() == PLATE)


def test_nothing_is_added_without_an_alignment_or_a_small_class(cohort):
    details, found, first = Details(cohort.store, cohort), cohort.store.load("a"), first_of(cohort)
    assert details(first, found) is not None
    assert details(first._replace(points=None), found) is None
    assert details(first._replace(template=""), found) is None
    only_ball = cohort.folder / "ball.nii.gz"
    nibabel.save(nibabel.Nifti1Image((made_label() == BALL).astype(np.uint8), grid().affine), only_ball)
    template = replace(cohort.templates[0], image=cohort.folder / "t_image.nii.gz", label=only_ball)
    nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE, np.float32), grid().affine), template.image)
    cohort.store.save(template, torch.zeros(4, *TOKENS), TOKEN_AFFINE, grid())
    assert Details(cohort.store, replace(cohort, templates=(template,)))(first, found) is None


def test_nothing_is_added_beyond_the_tokens(cohort):
    """The scan's last rows lie outside of all tokens, as where a scan was cropped."""
    first, found = first_of(cohort), cohort.store.load("a")
    few = replace(found, affine=TOKEN_AFFINE, tokens=found.tokens[:, :4])  # the plate reaches further
    part = first._replace(points=first.points[:4])
    shares = torch.zeros(3, *SHAPE)
    shares[0] = 1
    added = Details(cohort.store, cohort)(part, few)(shares, found.scan)
    rows = np.flatnonzero(
        stored((added[PLATE] > 0.5).numpy(), np.sign(np.diag(found.scan.affine)[:3]).astype(int)).any((1, 2))
    )
    assert rows.min() == 10 and rows.max() < 4 * STEP + 3
    torch.testing.assert_close(added.sum(0), torch.ones(SHAPE))


def test_a_method_that_aligns_nothing_needs_a_class_that_fills_a_token(cohort):
    """The plate alone fills none; without an alignment nothing tells where it lies."""
    label = cohort.templates[0].label
    values = nibabel.load(label)
    nibabel.save(nibabel.Nifti1Image((values.get_fdata() == PLATE).astype(np.uint8), values.affine), label)
    with pytest.raises(UserError, match="template t: no class fills a token .* or the method nearest"):
        first_pass_engine(cohort.store, cohort, prototype, cohort.folder)


@pytest.mark.parametrize(("moved", "expected"), [(0.0, 1.0), (0.3, 1.0), (1.0, 0.0)])
def test_labels_of_small_classes_are_compared_in_voxels(cohort, moved, expected):
    """A plate of one voxel that lies one voxel off overlaps nothing, whatever its shares on tokens."""
    template, small = Details(cohort.store, cohort).of("t")
    points = centred_points(TOKENS, STEP)
    one = Placed(template.reference.label, points)
    other = one._replace(points=points + torch.tensor([0.0, moved, 0.0]))
    found = dices_of_small(template, small, one, other, TOKEN_AFFINE)
    np.testing.assert_allclose(found, [np.nan, expected])


def test_evidence_takes_the_shares_of_small_classes(cohort):
    """The plate is the largest class of no token, and yet it agrees and comes back."""
    found = reference(cohort.templates[0], cohort.store.load("t"), cohort)
    way = WayBack(centred_points(TOKENS, STEP), 0.1)
    plain, small = (evidence(found, found, found.label, way, STEP, 0.1, channels) for channels in ((), [PLATE]))
    assert np.isnan(plain.agreement[1]) or plain.agreement[1] == 0
    assert small.agreement[1] > 0.05 and small.reverse_consistency[1] == pytest.approx(1)
    assert small.agreement[0] == plain.agreement[0] > 0.8


def test_the_factor_of_a_small_class_is_that_of_the_copies():
    """Copies with a true error of 0.1 where the agreement expects 0.7."""
    pool = [Evidence(np.array([0.3]), np.array([0.9]), 0.1, 0.1, 0.0, 1.0)]
    made = [np.array([0.9])] * 3, [np.array([0.3])] * 3
    dice = [calibrate(pool, *made, small=channels).predict(pool[0]).predicted_dice for channels in ([], [1])]
    assert dice[1] == pytest.approx(0.9) and dice[0] < 0.8


def test_the_largest_shares_stand_for_a_class_that_fills_no_token():
    label = torch.zeros(2, 9, 9, 9)
    label[1, 4, 4, 4], label[1, 4, 4, 5], label[1, 4, 4, 6] = 0.3, 0.2, 0.1
    label[0] = 1 - label[1]
    found = near(label)
    assert found[4, 4, 3] and found[4, 4, 6] and not found[4, 4, 7]  # within one token of the first two
    full = torch.zeros(2, 9, 9, 9)
    full[1, 4, 4, 4], full[1, 4, 4, 5] = 1.0, 0.4
    full[0] = 1 - full[1]
    assert not near(full)[4, 4, 6]  # only what fills a token counts where there is such


@pytest.mark.filterwarnings("error")
def test_labelled_scans_whose_classes_are_all_small_do_not_change_the_calibration():
    pool = [Evidence(np.array([0.3]), np.array([0.9]), 0.1, 0.1, 0.0, 1.0)]
    true, agreement = [np.array([dice]) for dice in (0.9, 0.2, 0.7)], [np.array([0.3])] * 3
    alone = calibrate(pool, true, agreement, small=[1])
    unknown = [np.array([np.nan])] * 2
    found = calibrate(pool, [*true, *unknown], [*agreement, *unknown], len(unknown), small=[1])
    assert found.spread == alone.spread > USUAL_SPREAD and found.factor == alone.factor


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True], ids=["beside a large class", "alone"])
def test_a_thin_class_is_labelled_on_coarse_tokens(tmp_path, alone):
    """`propagate` with tokens of some 3 voxels; the sheet has one voxel, so it fills no token."""
    number_of_sheet = 1 if alone else 2
    at = np.moveaxis(np.indices((48, 44, 40)), 0, -1) - np.array([24, 22, 20])
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    truth = {}
    for number, name in enumerate(("t", "a", "b")):
        draw = np.random.default_rng(number)
        where = at - draw.integers(-2, 3, 3)
        body, organ = (np.linalg.norm(where / np.array(r), axis=-1) < 1 for r in ((20, 17, 15), (9, 8, 7)))
        sheet = (where[..., 0] == 12) & (np.abs(where[..., 1:]).max(-1) < 7)
        image = body + 0.6 * organ + 0.8 * sheet + draw.normal(0, 0.05, body.shape)
        truth[name] = np.where(sheet, number_of_sheet, organ & (not alone)).astype(np.uint8)
        for folder, values in (("images", image.astype(np.float32)), ("labels", truth[name])):
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / folder / f"{name}.nii.gz")
    (tmp_path / "train.txt").write_text("t\na\nb")
    run = tmp_path / "run"
    command = ["propagate", str(tmp_path), "--output", str(run), "--device", "cpu", "--set", "feature_voxels=4000"]
    command.append("label_shape=trust")  # a sheet looks like one outlined slice
    assert main(command) == 0
    quality = RunFolder(run).round(0).quality.read()
    for name in "ab":
        assert quality[name][f"predicted_dice_{number_of_sheet}"] > 0.5
        found = labels(run / "pseudo_labels")[f"{name}.nii.gz"] == number_of_sheet
        true = truth[name] == number_of_sheet
        assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.5
