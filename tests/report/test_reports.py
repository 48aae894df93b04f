"""The report of a tiny made-up run, and the pictures in it."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import nibabel
import numpy as np
import pytest
from PIL import Image

from semisam_o1.report.metrics import MEASURES, Measure, read_csv, score, summary_text, write_csv
from semisam_o1.report.page import write_report
from semisam_o1.report.pictures import case_picture, class_colour, montage, to_ras
from semisam_o1.runfolder import LAYOUT
from semisam_o1.types import Case, DatasetError
from tests.jobs import cohort_of

AFFINE = np.diag([1.0, 1.0, 3.0, 1.0])
VOID = {"meta", "img", "br", "hr", "link", "input"}
NAMES = ["t & 0", "p<1>", "p2", "p3", "p4", "<script>p5()</script>"]


class Page(HTMLParser):
    """Fails where tags do not nest; keeps text, links and pictures' descriptions."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.text, self.alts = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.open += [] if tag in VOID else [tag]
        self.links += [value for name, value in attributes if name in ("src", "href", "action")]
        self.alts += [value for name, value in attributes if name == "alt"]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data


def ball(centre, shape=(20, 24, 10), radius=5.0):
    places = np.indices(shape) * np.diag(AFFINE)[:3].reshape(3, 1, 1, 1)
    return (np.linalg.norm(places - np.reshape(centre, (3, 1, 1, 1)), axis=0) < radius).astype(np.uint8)


def save(array, path, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


@pytest.fixture
def run(tmp_path):
    """A run folder of round 0 and its cohort: a template and five pool cases, p4 without truth."""
    data, out, cases = tmp_path / "data", tmp_path / "run", []
    for i, name in enumerate(NAMES):
        truth = ball((9 + i % 2, 11, 14))
        noise = np.random.default_rng(i).normal(0, 0.1, truth.shape)
        image = save((truth + noise).astype(np.float32), data / "images" / f"c{i}.nii.gz")
        label = None if name == "p4" else save(truth, data / "labels" / f"c{i}.nii.gz")
        cases.append(Case(name, image, label, "pool"))
        if i:
            save(ball((9, 12, 14)), out / "round_0" / "labels" / f"{name}.nii.gz")
    classes = {0: "background", 1: "ball & socket"}
    cohort = cohort_of(cases[:1], cases[1:], classes, set_aside={"p9": "shape (3, 3) of <image>"})
    (out / "review.csv").write_text("case,uncertainty,predicted_dice\np3,0.5,\np<1>,0.25,0.7\np4,0.125,\n")
    settings = {"dataset_dir": "https://example.org/data", "knn_k": 5, "patch_size": [8, 8], "spacing": None}
    stages = [{"stage": "propagation", "seconds": 1.5, "peak_memory_mib": 300}]
    record = {
        "layout": LAYOUT,
        "seed": 7,
        "template": [NAMES[0]],
        "classes": {},
        "rounds": 2,
        "best_round": 2,
        "settings": settings,
        "stages": stages,
        "set_aside": {"p8": "torn"},
        "warnings": [],
    }
    (out / "run.json").write_text(json.dumps(record))
    return out, cohort


def rows(case, round, stage, dice, split="pool"):
    scores = dict(zip((m.name for m in MEASURES["mm"]), (dice, dice / (2 - dice), 4.0, 1.25)))
    here = {"case": case, "split": split, "round": round, "stage": stage}
    return [here | {"class": c} | scores for c in (1, "mean")]


def test_report_of_round_0_alone(run):
    out, cohort = run
    table = rows("p3", 0, "copied", 0.4) + rows("p3", 0, "propagated", 0.625) + rows("p2", 0, "propagated", 0.875)
    write_csv(table, out / "metrics.csv")
    path = write_report(out, cohort)
    assert path == out / "report.html" and not list(out.glob("*partial*"))
    page = Page(path.read_text(encoding="utf-8"))
    for name in NAMES:
        assert name in page.text
    for said in (
        "ball & socket",
        "p9",
        "shape (3, 3) of <image>",
        "p8",
        "torn",
        "knn_k",
        "8, 8",
        "propagation",
    ):
        assert said in page.text
    # Worst first as review.csv has it, then the case it does not name.
    places = [page.alts.index(f"{name}, three planes") for name in ("p3", "p<1>", "p4", "p2")]
    assert places == sorted(places)
    assert "p3: Dice 0.625, uncertainty 0.5" in page.text
    assert "p<1>: uncertainty 0.25, predicted Dice 0.7" in page.text
    assert "copied template label (the floor)" in page.text
    assert "0.7500.7500.625" in page.text  # mean, median and worst of what was propagated


def test_the_report_says_where_nobody_can_tell(run):
    out, cohort = run
    (out / "review.csv").write_text(
        "case,uncertainty,predicted_dice,cannot_tell\np4,0.125,,the scan is unlike <others>\np3,0.5,0.6,\n"
    )
    page = Page(write_report(out, cohort).read_text(encoding="utf-8"))
    assert "p4: uncertainty 0.125, cannot tell how good it is: the scan is unlike <others>" in page.text
    assert page.text.count("cannot tell") == 1


def test_report_needs_nothing_from_outside(run):
    out, cohort = run
    text = write_report(out, cohort).read_text(encoding="utf-8")
    assert Page(text).links and all(link.startswith("data:image/png;base64,") for link in Page(text).links)
    assert "<script" not in text and "url(" not in text and "@import" not in text
    for picture in re.findall(r'base64,([^"]+)"', text):
        Image.open(io.BytesIO(base64.b64decode(picture))).verify()
        assert len(picture) < 60_000


def test_nothing_that_a_user_names_becomes_html(run):
    out, cohort = run
    evil = "<script>alert('1')</script>\"><img src=x>"
    record = json.loads((out / "run.json").read_text())
    record |= {"warnings": [evil], "versions": {evil: evil}, "stages": [{"stage": evil, "seconds": evil}]}
    record["settings"][evil] = [evil]
    (out / "run.json").write_text(json.dumps(record))
    cohort.classes.update({1: evil, 2: evil})
    cohort.set_aside[evil] = evil
    write_csv(rows(NAMES[-1], 0, "propagated", 0.5), out / "metrics.csv")
    text = write_report(out, cohort).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text and all(link.startswith("data:image/png") for link in page.links)
    # A warning, a class in the legend and in the table's head (two of each), and four rows of two cells.
    assert page.text.count(evil) == 1 + 4 + 8
    assert f"{NAMES[-1]}: Dice 0.500" in page.text


def test_report_of_an_earlier_layout_is_refused(run):
    out, cohort = run
    (out / "run.json").write_text('{"settings": {}}')
    with pytest.raises(DatasetError, match="earlier version"):
        write_report(out, cohort)


def test_report_calls_distances_by_the_unit_of_the_definition(run):
    out, cohort = run
    write_csv(rows("p3", 0, "propagated", 0.5), out / "metrics.csv")
    assert "JaccardHD95, mmASD, mm" in Page(write_report(out, cohort).read_text()).text
    record = json.loads((out / "run.json").read_text())
    record["settings"]["metric_definition"] = "paper"
    (out / "run.json").write_text(json.dumps(record))
    page = Page(write_report(out, cohort).read_text())
    assert "splitroundstagecasesDice, meanmedianworstJaccardHD95, voxelsASD, voxels" in page.text
    assert "Jaccard, HD95 and ASD are means over the cases" in page.text


def test_a_further_measure_is_one_value(run, monkeypatch):
    out, cohort = run
    missing = Measure(
        "missing_ml", "Missing", "mL", "lower", 1, 0.0, -1.0, lambda pair: float((pair.truth & ~pair.prediction).sum())
    )
    monkeypatch.setitem(MEASURES, "mm", (*MEASURES["mm"], missing))
    here = {"case": "p3", "split": "pool", "round": 0, "stage": "propagated"}
    truth, label = np.zeros((9, 9, 9), int), np.zeros((9, 9, 9), int)
    truth[2:6, 2:6, 2:6], label[3:6, 2:6, 2:6] = 1, 1
    table = [here | scores for scores in score(label, truth, (1, 1, 1), 2)]
    table += [here | {"case": "p2"} | scores for scores in score(0 * label, truth, (1, 1, 1), 2)]
    path = write_csv(table, out / "metrics.csv")
    assert path.read_text().splitlines()[0] == "case,split,round,stage,class,dice,jaccard,hd95_mm,asd_mm,missing_ml"
    assert [row["missing_ml"] for row in read_csv(path)] == [16, 16, -1, -1]
    head, line = summary_text(read_csv(path)).splitlines()
    assert head.endswith("ASD mm  Missing mL") and line.endswith(" 7.5")
    page = Page(write_report(out, cohort).read_text(encoding="utf-8"))
    assert "ASD, mmMissing, mL" in page.text and "Jaccard, HD95, ASD and Missing are means" in page.text
    assert re.search(r"\d7\.5\s", page.text)


def test_report_shows_the_last_round(run):
    out, cohort = run
    table = rows("p3", 0, "propagated", 0.5) + rows("p3", 1, "predicted", 0.75) + rows("p3", 10, "refined", 0.8125)
    write_csv(table + rows("p3", 2, "predicted", 0.7) + rows("v", 1, "predicted", 0.3, "val"), out / "metrics.csv")
    save(ball((9, 12, 14), radius=7), out / "round_10" / "labels" / "p3.nii.gz")
    before = write_report(out, cohort).read_text()
    assert "Dice 0.812 (round 0: 0.500)" in before
    save(ball((9, 12, 14), radius=3), out / "round_9" / "labels" / "p3.nii.gz")
    assert write_report(out, cohort).read_text() == before  # an older round changes nothing
    save(ball((9, 12, 14), radius=3), out / "pseudo_labels" / "p3.nii.gz")
    assert write_report(out, cohort).read_text() != before


@pytest.mark.parametrize(
    ("labels_round", "said"),
    [(0, "Dice 0.500 (round 10: 0.812)"), (1, "Dice 0.750 (round 0: 0.500)"), (10, "Dice 0.812 (round 0: 0.500)")],
)
def test_the_dice_under_a_picture_is_that_of_the_label_shown(run, labels_round, said):
    out, cohort = run
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"labels_round": labels_round}))
    table = rows("p3", 0, "propagated", 0.5) + rows("p3", 1, "predicted", 0.75) + rows("p3", 10, "refined", 0.8125)
    write_csv(table, out / "metrics.csv")
    assert f"p3: {said}, uncertainty" in Page(write_report(out, cohort).read_text()).text


def test_a_run_whose_scored_scans_were_all_touched_has_a_report(run):
    out, cohort = run
    write_csv(rows("p3", 0, "propagated", 0.5, "touched"), out / "metrics.csv")
    assert "touched" in Page(write_report(out, cohort).read_text()).text


def test_the_legend_has_the_colours_of_the_pictures(run):
    """Pictures have channels 1 and 2, whatever the numbers of the classes."""
    out, cohort = run
    page = write_report(out, replace(cohort, classes={0: "background", 2: "two", 5: "five"})).read_text()
    places = [page.index(f"{class_colour(channel)}") for channel in (1, 2)]
    assert places == sorted(places) and page.index("two") > places[0] and page.index("five") > places[1]
    assert class_colour(5) not in page[: page.index("truth, where known")]


def test_the_report_says_what_is_odd(run):
    out, cohort = run
    (out / "review.csv").write_text("case,uncertainty,predicted_dice,odd\np3,0.5,0.6,1: 0.2 times its usual volume\n")
    page = Page(write_report(out, cohort).read_text(encoding="utf-8"))
    assert "p3: uncertainty 0.5, predicted Dice 0.6, odd: class 1: 0.2 times its usual volume" in page.text


def test_report_survives_what_is_missing_or_broken(run):
    out, cohort = run
    for name in ("run.json", "review.csv"):
        (out / name).unlink()
    (out / "round_0" / "labels" / "p2.nii.gz").unlink()
    (out / "round_0" / "labels" / "p3.nii.gz").write_bytes(b"torn")
    save(ball((9, 11, 14))[:-1], out / "round_0" / "labels" / "p4.nii.gz")
    page = Page(write_report(out, cohort).read_text(encoding="utf-8"))
    assert "No label was written." in page.text and "No case with truth was scored." in page.text
    assert page.text.count("No picture: ") == 2 and "expected the image's" in page.text
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        write_report(out / "elsewhere", cohort)


def test_report_keeps_to_its_cap(run):
    out, cohort = run
    page = Page(write_report(out, cohort, max_cases=2).read_text(encoding="utf-8"))
    assert "The first 2 of 5 cases." in page.text
    assert [alt for alt in page.alts if "planes" in alt] == [f"{n}, three planes" for n in (NAMES[0], "p3", "p<1>")]


def test_to_ras_turns_axes_and_spacing_alike():
    array = np.arange(24).reshape(2, 3, 4)
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = 5, -2, 3, 1  # axes run to S, L and A
    (turned,), spacing = to_ras([array], affine)
    assert spacing == pytest.approx([2, 3, 5])
    assert np.array_equal(turned, array.transpose(1, 2, 0)[::-1])


def colours_at(png, colour, tolerance=40):
    """Rows and columns of the pixels of about that colour."""
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return np.nonzero(np.abs(picture - wanted).max(-1) < tolerance)


def test_picture_has_the_right_aspect_and_side():
    # Voxels of 2 x 2 x 10 mm: a label 8 voxels wide and 4 high stands 2.5 times as high as it is wide.
    label = np.zeros((40, 40, 12), np.uint8)
    label[4:12, 16:24, 4:8] = 1  # 16 x 16 x 40 mm, on the patient's left
    png = case_picture(np.zeros(label.shape), label, None, (2, 2, 10), {1: "box"}, marks=False)
    y, x = colours_at(png, class_colour(1))
    width = Image.open(io.BytesIO(png)).width
    coronal = (x > width / 3) & (x < 2 * width / 3)
    tall, wide = np.ptp(y[coronal]), np.ptp(x[coronal])
    assert tall / wide == pytest.approx(40 / 16, rel=0.1)
    axial = x < width / 3
    assert np.ptp(y[axial]) == pytest.approx(np.ptp(x[axial]), abs=2)
    assert x[axial].mean() > width / 6  # low indices lie to the left of the patient, so on the right


def test_picture_shows_truth_apart_and_draws_empty_labels():
    truth = ball((9, 11, 14))
    image = np.full(truth.shape, np.nan)
    png = case_picture(image, np.zeros_like(truth), truth, (1, 1, 3), {1: "ball"}, "a title")
    assert len(colours_at(png, "#F0E442")[0]) > 50
    nothing = case_picture(np.zeros(truth.shape), np.zeros_like(truth), None, (1, 1, 3), {1: "ball"})
    assert Image.open(io.BytesIO(nothing)).format == "PNG"
    with pytest.raises(ValueError, match="one shape"):
        case_picture(image, truth[:-1], None, (1, 1, 3), {1: "ball"})


def test_montage_is_a_picture_with_a_row_a_case(tmp_path):
    truth = ball((9, 11, 14))
    row = ("case", truth.astype(float), ball((10, 11, 14)), truth, (1, 1, 3))
    one = Image.open(montage([row], {1: "ball"}, tmp_path / "a" / "one.png"))
    two = Image.open(montage([row, row], {1: "ball"}, tmp_path / "two.png"))
    assert two.width == one.width and two.height - one.height == pytest.approx(231, abs=1)
    with pytest.raises(ValueError, match="at least one case"):
        montage([], {1: "ball"}, tmp_path / "none.png")
