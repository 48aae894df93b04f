"""Draw the pictures of the pages: `python docs/make_pictures.py` writes data_way.png, monai_label.png in docs/images.

Names of stages come from `semisam_o1.job.stages` and names of files from `semisam_o1.runfolder`, so that the pictures
say what the code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from semisam_o1.clinic.make_app import MODEL
from semisam_o1.clinic.next_scan import RUN
from semisam_o1.job.stages import ROUND_0, round_stages
from semisam_o1.runfolder import RunFolder

IMAGES = Path(__file__).resolve().parent / "images"
CASE = "case"
STAGE, FILES, INPUT = "#cfe3f5", "#f4f4f4", "#fdebc8"  # colours of boxes
WIDTH, HEIGHT, FILES_HEIGHT = 2.45, 0.92, 0.8  # of a stage's box and of that of its files, inches
COLUMNS = (1.75, 4.6, 7.45, 10.3, 13.15)
# What each stage does, and what it leaves: by the last part of its name.
DOES = {
    "features": "scan → tokens",
    "first": "tokens + template's label\n→ label",
    "fusion": "labels of similar scans\n→ label",
    "copies": "template, deformed as the\nscans are → known errors",
    "training": "scans + labels\n→ network",
    "prediction": "scan + network\n→ prediction",
    "refinement": "unsure places vote\n→ label",
    "quality": "label → predicted Dice",
}


def data_way(path: Path) -> None:
    """A scan's way: tokens, label, prediction, hand-out; a row for round 0, for each round, and for the end."""
    run = RunFolder("RUN")
    folders = {0: run.round(0), 1: run.round(1)}

    def inside(file: Path, number: int) -> str:
        return file.relative_to(folders[number].path).as_posix().replace(f"{CASE}.nii.gz", "")

    def work(kind: str) -> str:
        return f"{inside(folders[0].work(kind).folder, 0)}/"

    zero, one = folders[0], folders[1]
    leaves = {
        "features": [f"{run.features.as_posix()}/"],
        "first": [inside(zero.label(CASE), 0), inside(zero.confidence(CASE), 0), work("first")],
        "fusion": [inside(zero.label(CASE), 0), work("fused")],
        "copies": [work("copies")],
        "training": [inside(one.model, 1)],
        "prediction": [inside(one.prediction(CASE), 1), inside(one.uncertainty_map(CASE), 1), work("predicted")],
        "refinement": [inside(one.label(CASE), 1), inside(one.refinement, 1)],
        "quality": [inside(zero.quality.path, 0)],
    }
    out = [run.pseudo_labels, run.review, run.metrics, run.report, run.bundle]
    handed_out = [file.name + ("" if file.suffix else "/") for file in out]

    figure, axes = plt.subplots(figsize=(14.5, 8.3), dpi=100)
    axes.set(xlim=(0, 14.5), ylim=(0.2, 8.5))
    axes.axis("off")
    first, rounds, end = 6.85, 3.75, 0.65  # heights of the rows
    top, below = HEIGHT / 2, HEIGHT / 2 + 0.3 + FILES_HEIGHT  # of a row, from its height
    given = "images/ of all scans    labels/ of the template    RUN/reviewed/: labels that people mended"
    box(axes, 5.3, 8.15, given, INPUT, 9.6)
    arrow(axes, (COLUMNS[0], 7.9), (COLUMNS[0], first + top))
    title(axes, first + top + 0.2, f"before the first round, in {run.path}/{run.round(0).path.name}/")
    row(axes, first, [(stage.name, stage.name.split("/")[-1]) for stage in ROUND_0], leaves)
    title(axes, rounds + top + 0.2, f"each round N = 1, 2, ..., in {run.path}/{run.round(1).path.name[:-1]}N/")
    named = [(stage.name.replace("round_1", "round_N"), stage.name.split("/")[-1]) for stage in round_stages(1)]
    row(axes, rounds, named, leaves)
    lane = first - below - 0.3
    path_of(axes, [(COLUMNS[2], first - below), (COLUMNS[2], lane), (COLUMNS[0], lane), (COLUMNS[0], rounds + top)])
    note(axes, (COLUMNS[0] + COLUMNS[2]) / 2, lane, "labels of round 0, to round 1, and on where they are better")
    x, lane, left = COLUMNS[2] - 0.4, rounds - below - 0.3, 0.2
    path_of(axes, [(x, rounds - below), (x, lane), (left, lane), (left, rounds), (COLUMNS[0] - WIDTH / 2, rounds)])
    note(axes, COLUMNS[1], lane, "labels of round N, to round N + 1")
    x, lane = COLUMNS[2] + 0.4, rounds - below - 0.7
    path_of(axes, [(x, rounds - below), (x, lane), (COLUMNS[0], lane), (COLUMNS[0], end + 0.31)])
    note(axes, COLUMNS[1], lane, "labels of the last or best round")
    stage_box(axes, COLUMNS[0], end, "finish", "hand-out", 0.62)
    box(axes, 7.65, end, "   ".join(handed_out), FILES, 7.4)
    arrow(axes, (COLUMNS[0] + WIDTH / 2, end), (7.65 - 3.7, end))
    save(figure, path)


def monai_label(path: Path) -> None:
    """What passes between a person in 3D Slicer, the server and the folders on its disk, from top to bottom."""
    figure, axes = plt.subplots(figsize=(12.5, 5.6), dpi=110)
    axes.set(xlim=(0, 12.5), ylim=(0.2, 5.8))
    axes.axis("off")
    viewer, server, disk = 1.5, 6.2, 11.0
    for x, text in ((viewer, "3D Slicer"), (server, "MONAI Label server"), (disk, "folders")):
        axes.text(x, 5.5, text, ha="center", fontsize=12, weight="bold")
        axes.plot([x, x], [0.4, 5.3], color="#bbbbbb", lw=1, zorder=0)
    model = f"APP/model/{MODEL}"
    steps = (
        ("Next Sample", "strategy review: the scan\nto correct next", f"STUDIES/\n{model}/{RUN}/", False),
        ("Run", "suggestion", f"{model}/\nmodels/model.pt", False),
        ("Submit Label", "how many scans are left\nto look at", "STUDIES/labels/final/", True),
        ("Train", "the last line of the training", f"{model}/{RUN}/\nmodels/model.pt", True),
    )
    for number, (asks, answer, folder, writes) in enumerate(steps):
        y = 4.7 - 1.2 * number
        box(axes, viewer, y, asks, INPUT, 2.2)
        box(axes, server, y, answer, STAGE, 3.6, 0.75)
        box(axes, disk, y, folder, FILES, 2.9, 0.75)
        arrow(axes, (viewer + 1.1, y + 0.1), (server - 1.8, y + 0.1))
        arrow(axes, (server - 1.8, y - 0.1), (viewer + 1.1, y - 0.1))
        ends = [(server + 1.8, y), (disk - 1.45, y)]
        arrow(axes, *(ends if writes else ends[::-1]))
        note(axes, (ends[0][0] + ends[1][0]) / 2, y + 0.02, "writes" if writes else "reads")
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)


def row(axes: Axes, y: float, stages: Sequence[tuple[str, str]], leaves: dict[str, list[str]]) -> None:
    """Stages from left to right, each with what it does and, below it, the files it leaves."""
    for x, (name, kind) in zip(COLUMNS, stages):
        stage_box(axes, x, y, name, DOES[kind], HEIGHT)
        arrow(axes, (x, y - HEIGHT / 2), (x, y - HEIGHT / 2 - 0.3))
        box(axes, x, y - (HEIGHT + FILES_HEIGHT) / 2 - 0.3, "\n".join(leaves[kind]), FILES, WIDTH, FILES_HEIGHT)
    for left, right in pairwise(COLUMNS[: len(stages)]):
        arrow(axes, (left + WIDTH / 2, y), (right - WIDTH / 2, y))


def frame(axes: Axes, x: float, y: float, colour: str, width: float, height: float) -> None:
    place = (x - width / 2, y - height / 2)
    axes.add_patch(plt.Rectangle(place, width, height, facecolor=colour, edgecolor="#666666"))


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float, height: float = 0.5) -> None:
    """Names of files in a box about (x, y)."""
    frame(axes, x, y, colour, width, height)
    axes.text(x, y, text, ha="center", va="center", fontsize=10, family="monospace", linespacing=1.35)


def stage_box(axes: Axes, x: float, y: float, name: str, does: str, height: float) -> None:
    """A stage by name, with what it does."""
    frame(axes, x, y, STAGE, WIDTH, height)
    axes.text(x, y + height / 2 - 0.18, name, ha="center", va="center", fontsize=11, weight="bold")
    axes.text(x, y + height / 2 - 0.34, does, ha="center", va="top", fontsize=9.5)


def title(axes: Axes, y: float, text: str) -> None:
    axes.text(COLUMNS[1] - WIDTH / 2, y, text, fontsize=11, va="center", color="#444444", style="italic")


def note(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y + 0.04, text, ha="center", va="bottom", fontsize=9.5, color="#333333")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#333333", "shrinkA": 0, "shrinkB": 0})


def path_of(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """A line through points, with an arrow at its end."""
    axes.plot(*zip(*points[:-1]), color="#333333", lw=1)
    arrow(axes, points[-2], points[-1])


if __name__ == "__main__":
    data_way(IMAGES / "data_way.png")
    monai_label(IMAGES / "monai_label.png")
