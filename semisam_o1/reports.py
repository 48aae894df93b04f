"""What a run came to, for people: pictures of labels on their scans and one page, ``RUN/report.html``.

The page is made from the files of the run folder and the scans alone, so it can be made again at any time. It
holds its pictures and styles and asks nothing of a network.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from nibabel.orientations import apply_orientation, io_orientation
from PIL import Image

from semisam_o1.export import whole, write_text
from semisam_o1.metrics import SPLITS, STAGES, read_csv, summary
from semisam_o1.transforms import HDF5_SUFFIXES, read_volume
from semisam_o1.types import Affine, Case

# Okabe and Ito's colours, told apart by colour-blind readers; yellow is kept for the truth.
COLOURS = ("#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2")
TRUTH_COLOUR = "#F0E442"
# The axes (across, up, through) of each plane in RAS and what lies at its left, right and top.
PLANES = {"axial": (0, 1, 2, "RLA"), "coronal": (0, 2, 1, "RLS"), "sagittal": (1, 2, 0, "APS")}
STAGE_NAMES = {"copied": "copied template label (the floor)"}


def class_colour(number: int) -> str:
    """The colour of class ``number`` (1, 2, ...); after six they come round again."""
    return COLOURS[(number - 1) % len(COLOURS)]


def to_ras(arrays: Sequence[np.ndarray], affine: Affine) -> tuple[list[np.ndarray], np.ndarray]:
    """Arrays (H, W, D) of one grid, axes flipped and swapped to run to right, anterior and superior.

    Nothing is resampled: an oblique scan stays as stored, along the nearest axes. Returns the arrays and the
    spacing (3,) in mm along their new axes.
    """
    orientation = io_orientation(affine)
    sizes = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
    spacing = sizes[np.argsort(orientation[:, 0])]
    return [apply_orientation(np.asarray(array), orientation) for array in arrays], spacing


class _View(NamedTuple):
    """What is shown: the voxel ``centre`` (3,), the window's lower corner ``low`` (3,) and sides, in mm."""

    centre: np.ndarray
    low: np.ndarray
    wide: float
    tall: float


def _view(label: np.ndarray, truth: np.ndarray | None, spacing: np.ndarray) -> _View:
    """The planes through the label's centre of mass, 2.2 times its extent wide, kept within the scan.

    An empty label gives way to the truth, and that to the whole scan.
    """
    places = np.argwhere(label > 0)
    if not len(places) and truth is not None:
        places = np.argwhere(truth > 0)
    extent = np.array(label.shape) * spacing
    if len(places):
        centre = np.round(places.mean(0)).astype(int)
        reach = ((np.ptp(places, axis=0) + 1) * spacing).max()
    else:
        centre, reach = np.array(label.shape) // 2, extent.max()
    wide = float(min(max(2.2 * reach, extent.max() / 4), extent.max()))
    tall = float(min(wide, extent[1:].max()))  # axes 1 and 2 are those that run upwards in some plane
    low = []
    for axis in range(3):
        side = tall if axis == 2 else wide
        start = np.clip((centre[axis] + 0.5) * spacing[axis] - side / 2, 0, max(extent[axis] - side, 0))
        low.append(
            float(start) if extent[axis] > side else (extent[axis] - side) / 2
        )  # shorter axes are centred
    return _View(centre, np.array(low), wide, tall)


def _draw_planes(
    axes: Sequence[Axes],
    view: _View,
    image: np.ndarray,
    label: np.ndarray,
    truth: np.ndarray | None,
    spacing: np.ndarray,
    marks: bool,
    width: float,
) -> None:
    """Draw the three planes of ``view`` into ``axes``; arrays (H, W, D) in RAS, spacing in mm."""
    sample = image[::2, ::2, ::2]
    sample = sample[np.isfinite(sample)]
    dark, bright = np.percentile(sample, (0.5, 99.5)) if sample.size else (0, 1)
    halo = [
        withStroke(linewidth=width + 1, foreground="black", alpha=0.5)
    ]  # lines are seen on bright tissue, too
    for axis, (across, up, through, letters) in zip(axes, PLANES.values()):
        picture, *masks = (
            np.take(a, view.centre[through], through) for a in (image, label, truth) if a is not None
        )
        box = [0, picture.shape[0] * spacing[across], 0, picture.shape[1] * spacing[up]]
        picture = np.nan_to_num(picture, posinf=bright, neginf=dark)
        axis.imshow(
            picture.T,
            origin="lower",
            extent=box,
            cmap="gray",
            vmin=dark,
            vmax=bright,
            interpolation="bilinear",
        )
        # Truth goes below: where both agree the label alone is seen.
        for mask, is_truth in reversed(list(zip(masks, (False, True)))):
            padded = np.pad(mask, 1)  # contours close at the edge of the scan
            where = [(np.arange(n + 2) - 0.5) * spacing[a] for n, a in zip(mask.shape, (across, up))]
            for number in np.unique(mask[mask > 0]):
                colour = TRUTH_COLOUR if is_truth else class_colour(int(number))
                lines = axis.contour(
                    *where, (padded == number).T, levels=[0.5], colors=[colour], linewidths=width
                )
                lines.set_path_effects(halo)
        # Right is shown on the left and, in the sagittal plane, anterior too, as radiologists have it.
        left, bottom = view.low[across], view.low[up]
        # The axial plane stands as high as the others though its window is wide.
        bottom += (view.wide - view.tall) / 2 if up == 1 else 0
        axis.set(
            xlim=(left + view.wide, left),
            ylim=(bottom, bottom + view.tall),
            aspect="equal",
            facecolor="black",
        )
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        places = [(0.03, 0.5, "left", "center"), (0.97, 0.5, "right", "center"), (0.5, 0.97, "center", "top")]
        for letter, (x, y, ha, va) in zip(letters if marks else "", places):
            mark = axis.text(
                x, y, letter, transform=axis.transAxes, ha=ha, va=va, color="#eeeeee", fontsize=8
            )
            mark.set_path_effects(halo)


def case_picture(
    image: np.ndarray,
    label: np.ndarray,
    truth: np.ndarray | None,
    spacing: Sequence[float],
    classes: Mapping[int, str],
    title: str = "",
    marks: bool = True,
) -> bytes:
    """One scan in three orthogonal planes through its label's centre, as the bytes of a PNG of about 25 kB.

    ``image``, ``label`` and ``truth`` (None where unknown) are (H, W, D) in RAS (`to_ras`); ``spacing`` (3,)
    in mm along them sets the aspect. Each class of the label has a colour of its own, named as ``classes``
    (number to name) says in a legend where there is a title; the truth's contours are yellow.

    Args:
        marks: letters at the edges for right, anterior and so on; False where the orientation is unknown.

    Raises:
        ValueError: the shapes differ.
    """
    image, label, truth, spacing = _checked(image, label, truth, spacing, title)
    view = _view(label, truth, spacing)
    top, height = 0.22 if title else 0.0, 1.7 * view.tall / view.wide  # inches
    figure = Figure(figsize=(5.1, height + top), dpi=100, facecolor="white")
    axes = [figure.add_axes((i / 3 + 0.002, 0, 1 / 3 - 0.004, height / (height + top))) for i in range(3)]
    _draw_planes(axes, view, image, label, truth, spacing, marks, 1.1)
    if title:
        figure.text(0.005, 1 - top / 2 / (height + top), title, va="center", fontsize=8)
        handles = _handles(classes, truth is not None)
        look = {"fontsize": 6, "frameon": False, "borderpad": 0}
        figure.legend(handles=handles, loc="upper right", ncols=max(len(handles), 1), **look)
    return _png(figure)


def montage(
    rows: Iterable[tuple[str, np.ndarray, np.ndarray, np.ndarray | None, Sequence[float]]],
    classes: Mapping[int, str],
    path: Path,
    marks: bool = True,
) -> Path:
    """A picture of several scans, one a row and its three planes the columns, written as a PNG.

    Each row is (title, image, label, truth or None, spacing) as `case_picture` takes them: arrays (H, W, D)
    in RAS, spacing in mm.

    Raises:
        ValueError: there is no row, or the shapes of one differ.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("a montage needs at least one case, got none")
    size, top = 2.1, 0.5  # inches
    total = size * len(rows) + top
    figure = Figure(figsize=(3 * size + 0.3, total), dpi=110, facecolor="white")
    for i, (title, image, label, truth, spacing) in enumerate(rows):
        image, label, truth, spacing = _checked(image, label, truth, spacing, title)
        view = _view(label, truth, spacing)
        view = view._replace(
            tall=view.wide, low=view.low - [0, 0, (view.wide - view.tall) / 2]
        )  # squares in a grid
        bottom = (len(rows) - 1 - i) * size / total
        left, step = 0.3 / (3 * size + 0.3), size / (3 * size + 0.3)
        axes = [
            figure.add_axes((left + j * step, bottom, step - 0.006, (size - 0.04) / total)) for j in range(3)
        ]
        _draw_planes(axes, view, image, label, truth, spacing, marks, 1.4)
        figure.text(
            left / 2, bottom + size / total / 2, title, rotation=90, ha="center", va="center", fontsize=9
        )
        if i == 0:
            for axis, name in zip(axes, PLANES):
                axis.set_title(name, fontsize=9, pad=3)
    handles = _handles(classes, any(row[3] is not None for row in rows))
    figure.legend(
        handles=handles, loc="upper center", ncols=max(1, min(len(handles), 6)), fontsize=8, frameon=False
    )
    with whole(path) as aside:
        aside.write_bytes(_png(figure))
    return Path(path)


def _checked(image, label, truth, spacing, title: str) -> tuple:
    """Image, label, truth and spacing as numpy arrays, or a ValueError where they do not go together."""
    arrays = [a if a is None else np.asarray(a) for a in (image, label, truth)]
    shapes = [a.shape for a in arrays if a is not None]
    if len(set(shapes)) > 1 or len(shapes[0]) != 3:
        raise ValueError(
            f"{title or 'case'}: image, label and truth must be 3D and of one shape, got {shapes}"
        )
    return *arrays, np.broadcast_to(np.asarray(spacing, float), 3)


def _handles(classes: Mapping[int, str], with_truth: bool) -> list[Line2D]:
    """The legend's lines: a class each, and the truth."""
    named = [
        Line2D([], [], color=class_colour(n), label=name) for n, name in sorted(classes.items()) if n > 0
    ]
    return named + ([Line2D([], [], color=TRUTH_COLOUR, label="truth")] if with_truth else [])


def _palette() -> Image.Image:
    """32 greys and, for each colour in use, its mixtures with black, grey and white, for soft edges."""
    entries = [(grey,) * 3 for grey in np.linspace(0, 255, 32).astype(int).tolist()]
    for colour in map(to_rgb, (*COLOURS, TRUTH_COLOUR)):
        for weight in (0.35, 0.55, 0.8, 1.0):
            for other in (0.0, 0.5, 1.0)[: 1 if weight == 1.0 else 3]:
                entries.append(tuple(round(255 * (weight * c + (1 - weight) * other)) for c in colour))
    picture = Image.new("P", (1, 1))
    picture.putpalette([value for entry in entries for value in entry])
    return picture


def _png(figure: Figure) -> bytes:
    """A figure as PNG bytes, in a palette of its own, which makes it a third of the size."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    file = io.BytesIO()
    picture.quantize(palette=_palette(), dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def _chart(table: Sequence[Mapping]) -> bytes:
    """Mean Dice a round, a line for each split and stage, from `summary`'s rows."""
    figure = Figure(figsize=(5.6, 2.8), dpi=110, layout="constrained")
    axis = figure.subplots()
    rounds = sorted({line["round"] for line in table})
    pairs = [(split, stage) for split in SPLITS for stage in STAGES]
    colours = {"pool": "#0072B2", "val": "#CC79A7", "test": "#D55E00"}
    styles = {
        "copied": ("none", "x"),
        "propagated": ("-", "s"),
        "predicted": ("-", "o"),
        "refined": ("--", "^"),
    }
    for split, stage in pairs:
        points = [
            (line["round"], line["dice_mean"])
            for line in table
            if (line["split"], line["stage"]) == (split, stage)
        ]
        if not points:
            continue
        style, marker = styles[stage]
        look = {
            "color": colours[split],
            "linestyle": style,
            "marker": marker,
            "markersize": 5,
            "linewidth": 1.4,
        }
        axis.plot(*zip(*points), **look, label=f"{split}, {stage}")
        if stage == "copied":
            axis.axhline(points[0][1], color=colours[split], linewidth=0.8, linestyle=":")
    axis.set(xlabel="round", ylabel="mean Dice", xticks=rounds, xlim=(rounds[0] - 0.3, rounds[-1] + 0.3))
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return _png(figure)


def write_report(run_dir: Path, cohort, max_cases: int = 200) -> Path:
    """Write ``run_dir``/report.html, one self-contained page, whole or not at all, and return its path.

    It reads ``run.json``, ``metrics.csv``, ``review.csv`` and the final labels (``pseudo_labels``, else those
    of the newest round), each where present, so a run of round 0 alone has its page as well.

    Args:
        run_dir: the run's folder.
        cohort: gives ``templates``, the cases of each split, ``classes``, ``set_aside`` and how to read HDF5.
        max_cases: how many cases get a picture, those most in need of review first.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such run folder; expected what a run has written")
    path = run_dir / "run.json"
    run = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = read_csv(run_dir / "metrics.csv") if (run_dir / "metrics.csv").is_file() else []
    settings = run.get("settings", {})
    unit = "voxels" if settings.get("metric_definition") == "paper" else "mm"
    aside = {**run.get("set_aside", {}), **cohort.set_aside}
    stages = [
        [stage.get(k) for k in ("stage", "seconds", "peak_memory_mib")] for stage in run.get("stages", [])
    ]
    names = ", ".join(case.name for case in cohort.templates)
    parts = [
        f"<h1>Labels from one template: {escape(names)}</h1>",
        f"<p>{INTRODUCTION}</p>",
        _legend(cohort.classes),
        "<h2>Template</h2>",
        *(
            _figure(case, case.label, cohort, "the given label", is_template=True)
            for case in cohort.templates
        ),
        "<h2>Numbers</h2>",
        _numbers(rows, cohort.classes, unit),
        "<h2>Cases</h2>",
        *_case_figures(run_dir, cohort, settings.get("split", "pool"), rows, max_cases),
        "<h2>Set aside</h2>",
        _table(["case", "reason"], sorted(aside.items())) if aside else "<p>No case was set aside.</p>",
        "<h2>Run</h2>",
        _table(["stage", "seconds", "peak memory, MiB"], stages) if stages else "",
        "<details><summary>Settings</summary>",
        _table(["setting", "value"], {"seed": run.get("seed"), **settings}.items()),
        "</details><details><summary>Versions</summary>",
        _table(["package", "version"], run.get("versions", {}).items()),
        "</details>",
    ]
    head = f'<meta charset="utf-8"><title>{escape(names)}: semisam_o1 report</title><style>{STYLE}</style>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(parts)
    write_text(
        run_dir / "report.html",
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}{view}</head>\n<body>\n{body}\n</body></html>\n',
    )
    return run_dir / "report.html"


INTRODUCTION = (
    "Every label here comes from the template's alone. Contours are the final labels, in three planes through"
    " the label's centre, the cases most in need of review first."
)
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222 }
body { max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em; overflow-wrap: anywhere } h2 { margin-top: 1.8em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .6em 0; display: block; overflow-x: auto; font-size: .92em }
th, td { padding: .2em .6em; text-align: left; border-bottom: 1px solid #e5e5e5; overflow-wrap: break-word }
th { vertical-align: bottom }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(510px, 100%), 1fr)); gap: 1em }
figure { margin: 0 } figure img { max-width: 100%; display: block } figcaption b { overflow-wrap: anywhere }
.swatch { display: inline-block; width: 1.6em; height: .35em; margin: 0 .3em .2em 0; background: #000 }
.legend span { margin-right: 1.2em; white-space: nowrap } summary { cursor: pointer; margin: .6em 0 }
"""


def _legend(classes: Mapping[int, str]) -> str:
    """Class names beside their colours."""
    entries = [(class_colour(n), name) for n, name in sorted(classes.items()) if n > 0]
    entries.append((TRUTH_COLOUR, "truth, where known"))
    spans = (
        f'<span><i class="swatch" style="background:{c}"></i>{escape(str(name))}</span>'
        for c, name in entries
    )
    return f'<p class="legend">{"".join(spans)}</p>'


def _cell(value) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(v) for v in value) or "none"
    return "not set" if value is None else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence], text: int = 1) -> str:
    """A table of escaped cells; numbers after the first ``text`` columns stand on the right."""
    rows = [list(row) for row in rows]
    right = [i >= text and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(head))]

    def line(tag: str, cells: Sequence) -> str:
        marks = (' class="n"' if r else "" for r in right)
        return (
            "<tr>" + "".join(f"<{tag}{m}>{escape(_cell(c))}</{tag}>" for m, c in zip(marks, cells)) + "</tr>"
        )

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table>"


class _Number(float):
    """A float that shows three decimals, or two where it is a distance."""

    digits = 3

    def __str__(self) -> str:
        return f"{float(self):.{self.digits}f}"


class _Distance(_Number):
    digits = 2


def _numbers(rows: Sequence[Mapping], classes: Mapping[int, str], unit: str) -> str:
    """The table of numbers a round and the chart of Dice, from the rows of metrics.csv."""
    table = summary(rows)
    if not table:
        return "<p>No case with truth was scored.</p>"
    foreground = [n for n in sorted(classes) if n > 0]
    foreground = foreground if len(foreground) > 1 else []  # one class: its mean is the mean
    each = [
        {(s["split"], s["round"], s["stage"]): s["dice_mean"] for s in summary(rows, n)} for n in foreground
    ]
    head = ["split", "round", "stage", "cases", "Dice, mean", "median", "worst"]
    head += [f"Dice, {classes[n]}" for n in foreground] + ["Jaccard", f"HD95, {unit}", f"ASD, {unit}"]
    lines = []
    for line in table:
        key = (line["split"], line["round"], line["stage"])
        cells = [line["split"], line["round"], STAGE_NAMES.get(line["stage"], line["stage"]), line["cases"]]
        cells += [_Number(line[f"dice_{name}"]) for name in ("mean", "median", "worst")]
        cells += [_Number(means.get(key, float("nan"))) for means in each] + [_Number(line["jaccard_mean"])]
        lines.append(cells + [_Distance(line["hd95_mm_mean"]), _Distance(line["asd_mm_mean"])])
    note = (
        "<p>Jaccard, HD95 and ASD are means over the cases; each case counts as the mean of its classes.</p>"
    )
    return _table(head, lines) + note + _image(_chart(table), "mean Dice of each round")


def _image(png: bytes, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _final_label(run_dir: Path, name: str) -> Path | None:
    """The label a run ends with: ``pseudo_labels``, else the newest round's refined or predicted one."""
    rounds = sorted(run_dir.glob("round_*"), key=lambda p: int(p.name[6:]) if p.name[6:].isdigit() else -1)
    folders = [run_dir / "pseudo_labels"] + [
        r / kind for r in rounds[::-1] for kind in ("labels", "predictions")
    ]
    return next((f / f"{name}.nii.gz" for f in folders if (f / f"{name}.nii.gz").is_file()), None)


def _case_figures(run_dir: Path, cohort, split: str, rows: Sequence[Mapping], max_cases: int) -> list[str]:
    """A figure for each case, in the order of review.csv, which is worst first; those it lacks come after."""
    review: dict[str, dict] = {}
    if (run_dir / "review.csv").is_file():
        with open(run_dir / "review.csv", newline="", encoding="utf-8") as file:
            review = {line["case"]: line for line in csv.DictReader(file)}
    rank = {name: i for i, name in enumerate(review)}
    cases = sorted(cohort.split(split), key=lambda case: rank.get(case.name, len(rank)))
    dice: dict[str, list[tuple]] = {}
    for row in rows:
        if row["split"] == split and row["class"] == "mean" and row["stage"] in STAGES[1:]:
            dice.setdefault(row["case"], []).append((row["round"], STAGES.index(row["stage"]), row["dice"]))
    figures = []
    for case in cases[:max_cases]:
        notes = []
        if scores := sorted(dice.get(case.name, [])):
            notes.append(f"Dice {scores[-1][2]:.3f}")
            if len(scores) > 1:
                notes[0] += f" (round {scores[0][0]}: {scores[0][2]:.3f})"
        for column, text in (("uncertainty", "uncertainty"), ("predicted_dice", "predicted Dice")):
            if value := review.get(case.name, {}).get(column):
                notes.append(f"{text} {float(value):.3g}")
        figures.append(_figure(case, _final_label(run_dir, case.name), cohort, ", ".join(notes)))
    first = f"<p>The first {max_cases} of {len(cases)} cases.</p>" if len(cases) > max_cases else ""
    return [first, '<div class="cases">', *figures, "</div>"]


def _figure(case: Case, label: Path | None, cohort, note: str, is_template: bool = False) -> str:
    """A case's picture and a line below it; where it cannot be drawn the page says why and goes on."""
    caption = f"<figcaption><b>{escape(case.name)}</b>: {escape(note or 'truth unknown')}</figcaption>"
    if label is None:
        return f"<figure><p>No label was written.</p>{caption}</figure>"
    spacing = cohort.hdf5_spacing
    try:
        image = read_volume(case.image, cohort.hdf5_key, spacing)
        paths = [label] + ([case.label] if case.label is not None and not is_template else [])
        arrays = [np.asarray(image[0])] + [
            np.rint(np.asarray(read_volume(p, "label", spacing)[0])) for p in paths
        ]
        (scan, *masks), sizes = to_ras(arrays, np.asarray(image.affine))
        masks = [mask.astype(np.int32) for mask in masks] + [None]
        known = not str(case.image).lower().endswith(HDF5_SUFFIXES)  # HDF5 does not say how its axes run
        png = case_picture(scan, masks[0], masks[1], sizes, cohort.classes, marks=known)
    except Exception as error:  # noqa: BLE001 - readers raise many kinds; one bad file must not cost the page
        return f"<figure><p>No picture: {escape(str(error))}</p>{caption}</figure>"
    return f"<figure>{_image(png, f'{case.name}, three planes')}{caption}</figure>"
