"""Metrics against phantoms worked out by hand and against independent implementations."""

from __future__ import annotations

import math
from functools import partial

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

from semisam_o1.report.metrics import (
    MEASURES,
    Pair,
    columns,
    evaluate_folder,
    read_csv,
    score,
    summary,
    summary_text,
    write_csv,
)
from semisam_o1.runfolder import volume
from semisam_o1.types import Case
from tests.jobs import cohort_of

PROPAGATED = {"split": "pool", "round": 0, "stage": "propagated"}
PREDICTED = {"split": "pool", "round": 1, "stage": "predicted"}
SPACING = (1.0, 2.0, 3.0)


def cube(start=(8, 8, 8), side=4, shape=(20, 20, 20), number=1):
    array = np.zeros(shape, np.uint8)
    array[tuple(slice(s, s + side) for s in start)] = number
    return array


def blobs(seed, shape=(24, 20, 16)):
    """Two classes of ragged shapes, some of which meet the volume's edge."""
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2)
    return np.digitize(field, np.quantile(field, [0.6, 0.85])).astype(np.uint8)


def values(row):
    return [row[measure.name] for measure in MEASURES["mm"]]


# A cube of side 4 has 56 voxels of surface. Shifted by one voxel along the last axis, 16 of them leave the
# other cube by that voxel's size; 4 in the middle of the opposite face lie inside it, one step of the first
# axis from its side; the other 36 lie on its surface.
def test_shifted_cube_in_mm():
    one, mean = score(cube((8, 8, 9)), cube(), SPACING, 2)
    assert one["class"] == 1 and mean["class"] == "mean"
    assert values(one) == pytest.approx([0.75, 0.6, 3.0, (16 * 3 + 4 * 1) / 56], rel=1e-6)
    assert values(mean) == values(one)


def test_shifted_cube_by_the_published_definition_is_in_voxels():
    one, _ = score(cube((8, 8, 9)), cube(), SPACING, 2, "paper")
    assert values(one) == pytest.approx([0.75, 0.6, 1.0, (16 + 4) / 56], rel=1e-6)


@pytest.mark.parametrize("axis, k", [(0, 2), (1, 3), (2, 5)])
def test_hausdorff_of_a_shift_is_its_length_in_mm(axis, k):
    start = [8, 8, 8]
    start[axis] += k
    row = score(cube(start), cube(), SPACING, 2)[0]
    assert row["hd95_mm"] == pytest.approx(k * SPACING[axis], rel=1e-6)
    assert row["dice"] == pytest.approx(max(0, 4 - k) / 4)


def test_a_line_against_its_end_tells_the_two_definitions_apart():
    truth, line = np.zeros((12, 3, 3), int), np.zeros((12, 3, 3), int)
    truth[0, 1, 1] = 1
    line[:10, 1, 1] = 1  # distances 0..9 one way, 0 the other
    ours, paper = score(line, truth, (1, 1, 1), 2)[0], score(line, truth, (1, 1, 1), 2, "paper")[0]
    assert values(ours) == pytest.approx([2 / 11, 1 / 10, 8.55, 45 / 11])
    assert values(paper) == pytest.approx([2 / 11, 1 / 10, 8.5, 4.5])
    back = score(truth, line, (1, 1, 1), 2, "paper")[0]
    assert back["asd_mm"] == 0 and back["hd95_mm"] == pytest.approx(8.5)


def test_empty_labels_score_as_documented():
    nothing, something = np.zeros((20, 20, 20), int), cube()
    diagonal = math.hypot(20, 40, 60)
    for definition, missed in (("mm", [diagonal, diagonal]), ("paper", [200, 100])):
        assert values(score(nothing, nothing, SPACING, 2, definition)[0]) == [1, 1, 0, 0]
        for pair in ((nothing, something), (something, nothing)):
            assert values(score(*pair, SPACING, 2, definition)[0]) == pytest.approx([0, 0, *missed])


def test_the_mean_is_over_the_foreground_and_never_nan():
    truth = cube() + cube((0, 0, 0), number=2)
    rows = score(cube(), truth, SPACING, 4)  # class 1 exact, class 2 missed, class 3 in neither
    assert [row["class"] for row in rows] == [1, 2, 3, "mean"]
    assert rows[-1]["dice"] == pytest.approx(2 / 3)
    assert rows[-1]["hd95_mm"] == pytest.approx(math.hypot(20, 40, 60) / 3)
    assert all(math.isfinite(v) for row in rows for v in values(row))


def surface(mask):
    """Indices of the surface, by looking at every voxel's six neighbours in turn."""
    padded = np.pad(mask, 1)
    inner = np.ones_like(mask)
    for axis in range(3):
        for step in (-1, 1):
            inner &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
    return np.argwhere(mask & ~inner)


@pytest.mark.parametrize("seed", range(3))
def test_distances_against_brute_force(seed):
    prediction, truth = blobs(seed), blobs(seed + 10)
    ours, paper = (score(prediction, truth, SPACING, 3, d) for d in ("mm", "paper"))
    for number in (1, 2):
        a, b = surface(prediction == number), surface(truth == number)
        matrix = cdist(a * SPACING, b * SPACING)
        there, back = matrix.min(1), matrix.min(0)
        assert ours[number - 1]["hd95_mm"] == pytest.approx(max(np.percentile(d, 95) for d in (there, back)), rel=1e-5)
        assert ours[number - 1]["asd_mm"] == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-5)
        matrix = cdist(a, b)
        there, back = matrix.min(1), matrix.min(0)
        assert paper[number - 1]["hd95_mm"] == pytest.approx(np.percentile(np.r_[there, back], 95), rel=1e-5)
        assert paper[number - 1]["asd_mm"] == pytest.approx(there.mean(), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_overlap_against_simpleitk(seed):
    prediction, truth = blobs(seed), blobs(seed + 10)
    oracle = sitk.LabelOverlapMeasuresImageFilter()
    oracle.Execute(sitk.GetImageFromArray(prediction), sitk.GetImageFromArray(truth))
    for row in score(prediction, truth, SPACING, 3)[:2]:
        assert row["dice"] == pytest.approx(oracle.GetDiceCoefficient(row["class"]), rel=1e-6)
        assert row["jaccard"] == pytest.approx(oracle.GetJaccardCoefficient(row["class"]), rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_cropping_changes_nothing():
    prediction, truth = (np.pad(blobs(seed), ((30, 2), (0, 9), (4, 4))) for seed in (1, 2))
    channels = [torch.from_numpy(np.stack([x == n for n in range(3)]))[None].float() for x in (prediction, truth)]
    hd95 = compute_hausdorff_distance(*channels, percentile=95, spacing=list(SPACING))[0]
    asd = compute_average_surface_distance(*channels, symmetric=True, spacing=list(SPACING))[0]
    for row in score(prediction, truth, SPACING, 3)[:2]:
        assert row["hd95_mm"] == pytest.approx(hd95[row["class"] - 1].item(), rel=1e-5)
        assert row["asd_mm"] == pytest.approx(asd[row["class"] - 1].item(), rel=1e-5)


def test_score_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match="shape"):
        score(cube(), cube(shape=(20, 20, 21)), SPACING, 2)
    with pytest.raises(ValueError, match="'cm'.*mm, paper"):
        score(cube(), cube(), SPACING, 2, "cm")
    with pytest.raises(ValueError, match="num_classes is 1"):
        score(cube(), cube(), SPACING, 1)


@pytest.fixture
def folder(tmp_path):
    """Truths of two cases at 1 x 2 x 3 mm, a third without, and a folder of labels for the first two."""
    cases = []
    for name, start in (("a", (8, 8, 8)), ("b, second", (6, 8, 8)), ("c", None)):
        truth = tmp_path / f"{name}-truth.nii.gz"
        if start:
            nibabel.save(nibabel.Nifti1Image(cube(start), np.diag([*SPACING, 1])), truth)
        cases.append(Case(name, tmp_path / f"{name}.nii.gz", truth if start else None, "pool"))
        nibabel.save(nibabel.Nifti1Image(cube((8, 8, 9)), np.diag([*SPACING, 1])), tmp_path / f"{name}.nii.gz")
    (tmp_path / "c.nii.gz").unlink()
    return tmp_path, cases, cohort_of([], cases)


def test_evaluate_folder_scores_cases_with_truth_in_mm(folder):
    path, cases, cohort = folder
    rows = evaluate_folder(partial(volume, path), cases, cohort, PREDICTED, "mm")
    assert [(row["case"], row["class"]) for row in rows] == [
        ("a", 1), ("a", "mean"), ("b, second", 1), ("b, second", "mean"),
    ]  # fmt: skip
    assert all(tuple(row) == tuple(columns()) and row["stage"] == "predicted" and row["round"] == 1 for row in rows)
    assert values(rows[0]) == pytest.approx([0.75, 0.6, 3.0, 52 / 56], rel=1e-6)
    assert evaluate_folder(partial(volume, path / "none"), cases, cohort, PREDICTED) == []


def test_a_label_already_scored_is_not_scored_again(folder):
    """Its truth has changed since, and its figures have not."""
    path, cases, cohort = folder
    known = {}
    label = partial(volume, path)
    first = evaluate_folder(label, cases, cohort, PREDICTED, known=known)
    for case in cases:
        if case.label is not None:
            nibabel.save(nibabel.Nifti1Image(np.zeros((20, 20, 20), np.uint8), np.eye(4)), case.label)
    second = evaluate_folder(label, cases, cohort, PREDICTED | {"stage": "refined"}, known=known)
    assert [values(row) for row in second] == [values(row) for row in first]
    assert {row["stage"] for row in second} == {"refined"} and {row["stage"] for row in first} == {"predicted"}


def test_evaluate_folder_names_the_case_that_does_not_fit(folder):
    path, cases, cohort = folder
    nibabel.save(nibabel.Nifti1Image(cube(shape=(20, 20, 19)), np.eye(4)), path / "a.nii.gz")
    with pytest.raises(ValueError, match="a-truth.nii.gz: label 20 x 20 x 20; expected the image's 20 x 20 x 19"):
        evaluate_folder(partial(volume, path), cases, cohort, PROPAGATED)
    nibabel.save(nibabel.Nifti1Image(cube().astype(np.float32) / 2, np.eye(4)), path / "a.nii.gz")
    with pytest.raises(ValueError, match="a.nii.gz: .*not whole numbers"):
        evaluate_folder(partial(volume, path), cases, cohort, PROPAGATED)


def test_csv_round_trip_and_summary(folder, tmp_path):
    path, cases, cohort = folder
    label = partial(volume, path)
    rows = evaluate_folder(label, cases, cohort, PROPAGATED)
    rows = evaluate_folder(label, cases[:1], cohort, PREDICTED | {"split": "test"}) + rows
    rows += evaluate_folder(label, cases[:1], cohort, PROPAGATED | {"stage": "copied"})
    target = write_csv(rows, tmp_path / "run" / "metrics.csv")
    assert target.read_text().splitlines()[0] == "case,split,round,stage,class,dice,jaccard,hd95_mm,asd_mm"
    assert [p.name for p in target.parent.iterdir()] == ["metrics.csv"]  # no part left behind
    again = read_csv(target)
    keys = list(columns())[:5]
    assert [[row[c] for c in keys] for row in again] == [[row[c] for c in keys] for row in rows]
    assert [values(row) for row in again] == [pytest.approx(values(row), abs=1e-6) for row in rows]

    table = summary(again)
    assert [(line["split"], line["round"], line["stage"], line["cases"]) for line in table] == [
        ("pool", 0, "copied", 1), ("pool", 0, "propagated", 2), ("test", 1, "predicted", 1),
    ]  # fmt: skip
    dice = [row["dice"] for row in rows if row["stage"] == "propagated" and row["class"] == "mean"]
    assert table[1]["dice_mean"] == pytest.approx(np.mean(dice), abs=1e-6)
    assert table[1]["dice_worst"] == pytest.approx(min(dice), abs=1e-6)
    assert table[1]["hd95_mm_worst"] >= table[1]["hd95_mm_median"]
    assert summary(again, 1)[0]["cases"] == 1
    text = summary_text(again).splitlines()
    assert len(text) == 4 and "HD95 mm" in text[0] and "0.750" in text[1]
    assert summary_text([]) == "no case with truth was scored"


def test_the_terminal_table_is_laid_out_as_ever(folder):
    path, cases, cohort = folder
    rows = evaluate_folder(partial(volume, path), cases, cohort, PROPAGATED)
    head, line = summary_text(rows, "paper").splitlines()
    assert head == "split  round  stage       cases   Dice  median  worst  Jaccard  HD95 voxels  ASD voxels"
    assert line.split()[:4] == ["pool", "0", "propagated", "2"]
    table = summary(rows)[0]
    overlaps = [f"{table[name]:.3f}" for name in ("dice_mean", "dice_median", "dice_worst", "jaccard_mean")]
    assert line.split()[4:] == [*overlaps, f"{table['hd95_mm_mean']:.2f}", f"{table['asd_mm_mean']:.2f}"]


def test_both_definitions_measure_the_same_things():
    assert [m.name for m in MEASURES["mm"]] == [m.name for m in MEASURES["paper"]]
    assert {m.unit for m in MEASURES["mm"]} == {"", "mm"} and {m.unit for m in MEASURES["paper"]} == {"", "voxels"}


@pytest.mark.parametrize("definition", MEASURES)
def test_distances_of_a_class_are_measured_once(definition):
    """There and back, for HD95 and ASD alike: what was found once is what every figure is of."""
    pair = Pair(cube((8, 8, 9)) == 1, cube() == 1, np.array(SPACING), 1.0)
    assert pair.distances is pair.distances
    vars(pair)["distances"] = np.full(5, 7.0), np.full(4, 7.0)
    found = {measure.name: measure.of(pair) for measure in MEASURES[definition]}
    assert found["hd95_mm"] == found["asd_mm"] == 7


def test_a_case_named_like_a_formula_stays_text_and_comes_back(tmp_path):
    row = {"case": "=1+1", **PREDICTED, "class": "mean", **dict.fromkeys((m.name for m in MEASURES["mm"]), 0.5)}
    path = write_csv([row], tmp_path / "metrics.csv")
    assert path.read_text().splitlines()[1].startswith("'=1+1,pool,1,predicted,mean,0.500000,")
    assert read_csv(path) == [row]


def test_read_csv_names_a_missing_column(tmp_path):
    (tmp_path / "m.csv").write_text("case,split,round,stage,class,dice,jaccard,hd95_mm\n")
    with pytest.raises(ValueError, match="no column asd_mm"):
        read_csv(tmp_path / "m.csv")
