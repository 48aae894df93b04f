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

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from nibabel.orientations import apply_orientation, io_orientation
from PIL import Image

from semisam_o1.metrics import SPLITS, STAGES, read_csv, summary, write_whole
from semisam_o1.transforms import HDF5_SUFFIXES, read_volume
from semisam_o1.types import Affine, Case

# Okabe and Ito's colours, told apart by colour-blind readers; the brightest first, since scans are dark.
COLOURS = ("#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#0072B2")
TRUTH_COLOUR = "#FFFFFF"
# The axes (across, up, through) of each plane in RAS and what its four edges show: left, right, top, bottom.
PLANES = {"axial": (0, 1, 2, "RLAP"), "coronal": (0, 2, 1, "RLSI"), "sagittal": (1, 2, 0, "APSI")}
STAGE_NAMES = {"copied": "copied template label (the floor)"}


def class_colour(number: int) -> str:
    """The colour of class ``number`` (1, 2, ...); after seven they come round again."""
    return COLOURS[(number - 1) % len(COLOURS)]


def to_ras(arrays: Sequence[np.ndarray], affine: Affine) -> tuple[list[np.ndarray], np.ndarray]:
    """Arrays (H, W, D) of one grid with their axes flipped and swapped to run to right, anterior and superior.

    Nothing is resampled: an oblique scan stays as stored, along the nearest axes. Returns the arrays and the
    spacing (3,) in mm along their new axes.
    """
    orientation = io_orientation(affine)
    sizes = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
    spacing = sizes[np.argsort(orientation[:, 0])]
    return [apply_orientation(np.asarray(array), orientation) for array in arrays], spacing


def _centre(mask: np.ndarray) -> np.ndarray:
    """The voxel nearest the centre of mass of ``mask`` (H, W, D), or the volume's middle where it is empty."""
    places = np.argwhere(mask)
    return np.round(places.mean(0)).astype(int) if len(places) else np.array(mask.shape) // 2


def _window(mask: np.ndarray, centre: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, float]:
    """Lower corner (3,) and side, mm, of the cube to show: 2.2 times the label's extent, kept within the scan."""
    extent = np.array(mask.shape) * spacing
    places = np.argwhere(mask)
    label = ((np.ptp(places, axis=0) + 1) * spacing).max() if len(places) else extent.max()
    side = float(min(max(2.2 * label, extent.max() / 4), extent.max()))
    low = np.clip((centre + 0.5) * spacing - side / 2, 0, np.maximum(extent - side, 0))
    low = np.where(extent < side, (extent - side) / 2, low)  # shorter axes are centred
    return low, side


def _draw_planes(
    axes: Sequence[Axes],
    image: np.ndarray,
    label: np.ndarray,
    truth: np.ndarray | None,
    spacing: Sequence[float],
    marks: bool,
    width: float,
) -> None:
    """Draw the three planes through the label's centre into ``axes``; arrays (H, W, D) in RAS, spacing in mm."""
    spacing = np.asarray(spacing, float)
    foreground = label > 0
    if not foreground.any() and truth is not None:
        foreground = truth > 0
    centre = _centre(foreground)
    low, side = _window(foreground, centre, spacing)
    finite = image[::2, ::2, ::2][np.isfinite(image[::2, ::2, ::2])]
    dark, bright = np.percentile(finite, (0.5, 99.5)) if finite.size else (0, 1)
    for axis, (across, up, through, letters) in zip(axes, PLANES.values()):
        picture, *masks = (np.take(a, centre[through], through) for a in (image, label, truth) if a is not None)
        box = [0, picture.shape[0] * spacing[across], 0, picture.shape[1] * spacing[up]]
        picture = np.nan_to_num(picture, posinf=bright, neginf=dark)
        axis.imshow(picture.T, origin="lower", extent=box, cmap="gray", vmin=dark, vmax=bright, interpolation="bilinear")
        # Truth goes below: where both agree the label alone is seen.
        for mask, is_truth in reversed(list(zip(masks, (False, True)))):
            padded = np.pad(mask, 1)  # contours close at the edge of the scan
            where = [(np.arange(n + 2) - 0.5) * spacing[a] for n, a in zip(mask.shape, (across, up))]
            for number in np.unique(mask[mask > 0]):
                colour = TRUTH_COLOUR if is_truth else class_colour(int(number))
                axis.contour(*where, (padded == number).T, levels=[0.5], colors=[colour], linewidths=width)
        # Right is shown on the left and anterior, in the sagittal plane, too, as radiologists have it.
        axis.set(xlim=(low[across] + side, low[across]), ylim=(low[up], low[up] + side), facecolor="black", aspect="equal")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        places = [(0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.98, "center", "top")]
        for letter, (x, y, ha, va) in zip(letters if marks else "", places):
            axis.text(x, y, letter, transform=axis.transAxes, ha=ha, va=va, color="#bbbbbb", fontsize=7)


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

    ``image``, ``label`` and ``truth`` (None where unknown) are (H, W, D) in RAS (`to_ras`); ``spacing`` (3,) in mm
    along them, which sets the aspect. The label's contours have the colours of ``classes`` (number to name; named
    in a legend where there is a title), the truth's are white.

    Args:
        marks: letters at the edges for right, anterior and so on; leave them out where the orientation is unknown.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(image, label, truth, title)
    top = 0.22 if title else 0.0  # inches
    figure = Figure(figsize=(5.1, 1.7 + top), dpi=100, facecolor="white" if title else "black")
    height = 1.7 / (1.7 + top)
    axes = [figure.add_axes((i / 3 + 0.002, 0, 1 / 3 - 0.004, height)) for i in range(3)]
    _draw_planes(axes, np.asarray(image), np.asarray(label), truth, spacing, marks, 1.1)
    if title:
        figure.text(0.005, 1 - 0.11 / (1.7 + top), title, va="center", fontsize=8)
        handles = _handles(classes, truth is not None)
        figure.legend(handles=handles, loc="upper right", ncols=len(handles), fontsize=6, frameon=False, borderpad=0)
    return _png(figure, colours=64)


def montage(
    rows: Iterable[tuple[str, np.ndarray, np.ndarray, np.ndarray | None, Sequence[float]]],
    classes: Mapping[int, str],
    path: Path,
    marks: bool = True,
) -> Path:
    """A picture of several scans, one a row and its three planes the columns, written as a PNG.

    Each row is (title, image, label, truth or None, spacing) as `case_picture` takes them: arrays (H, W, D) in
    RAS, spacing in mm.

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
        _same_shape(image, label, truth, title)
        bottom = (len(rows) - 1 - i) * size / total
        left, step = 0.3 / (3 * size + 0.3), size / (3 * size + 0.3)
        axes = [figure.add_axes((left + j * step, bottom, step - 0.006, (size - 0.04) / total)) for j in range(3)]
        _draw_planes(axes, np.asarray(image), np.asarray(label), truth, spacing, marks, 1.4)
        figure.text(left / 2, bottom + size / total / 2, title, rotation=90, ha="center", va="center", fontsize=9)
        if i == 0:
            for axis, name in zip(axes, PLANES):
                axis.set_title(name, fontsize=9, pad=3)
    handles = _handles(classes, any(row[3] is not None for row in rows))
    figure.legend(handles=handles, loc="upper center", ncols=min(len(handles), 6), fontsize=8, frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_png(figure, colours=128))
    return path


def _same_shape(image, label, truth, title: str) -> None:
    shapes = [np.shape(a) for a in (image, label, truth) if a is not None]
    if len(set(shapes)) > 1 or len(shapes[0]) != 3:
        raise ValueError(f"{title or 'case'}: image, label and truth must be 3D and of one shape, got {shapes}")


def _handles(classes: Mapping[int, str], with_truth: bool) -> list[Line2D]:
    named = [Line2D([], [], color=class_colour(n), label=name) for n, name in sorted(classes.items()) if n > 0]
    grey = {"color": "#999999", "linewidth": 1, "label": "truth (white)"}
    return named + ([Line2D([], [], **grey)] if with_truth else [])


def _png(figure: Figure, colours: int | None = None) -> bytes:
    """A figure as PNG bytes; a palette of ``colours`` makes it a third of the size and is not seen."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    if colours:
        picture = picture.quantize(colours, dither=Image.Dither.NONE)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def _chart(table: Sequence[Mapping]) -> bytes:
    """Mean Dice a round, a line for each split and stage, from `summary`'s rows."""
    figure = Figure(figsize=(5.6, 2.8), dpi=110, layout="constrained")
    axis = figure.subplots()
    rounds = sorted({line["round"] for line in table})
    pairs = [(split, stage) for split in SPLITS for stage in STAGES]
    colours = {"pool": COLOURS[6], "val": COLOURS[2], "test": COLOURS[5]}
    styles = {"copied": ("none", "x"), "propagated": ("-", "s"), "predicted": ("-", "o"), "refined": ("--", "^")}
    for split, stage in pairs:
        points = [(line["round"], line["dice_mean"]) for line in table if (line["split"], line["stage"]) == (split, stage)]
        if not points:
            continue
        style, marker = styles[stage]
        look = {"color": colours[split], "linestyle": style, "marker": marker, "markersize": 5, "linewidth": 1.4}
        axis.plot(*zip(*points), **look, label=f"{split}, {stage}")
        if stage == "copied":
            axis.axhline(points[0][1], color=colours[split], linewidth=0.8, linestyle=":")
    axis.set(xlabel="round", ylabel="mean Dice", xticks=rounds, xlim=(rounds[0] - 0.3, rounds[-1] + 0.3))
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return _png(figure, colours=64)
