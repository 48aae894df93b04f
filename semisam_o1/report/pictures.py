"""Pictures of labels on their scans: three planes per case, contours in colours safe for colour-blind readers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from nibabel.orientations import apply_orientation, io_orientation
from PIL import Image

from semisam_o1.files import atomic_write
from semisam_o1.types import Affine

# Okabe and Ito's colours, which colour-blind readers can distinguish; yellow is reserved for the truth.
COLOURS = ("#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2")
TRUTH_COLOUR = "#F0E442"
PROPOSAL_COLOUR = "#FFFFFF"  # of the label that a person corrected
PIXELS = 150  # per inch, of a case's picture
# The RAS axes (across, up, through) of each plane and the letters at its left, right and top.
PLANES = {"axial": (0, 1, 2, "RLA"), "coronal": (0, 2, 1, "RLS"), "sagittal": (1, 2, 0, "APS")}


def class_colour(number: int) -> str:
    """The colour of class ``number`` (1, 2, ...); the six colours repeat."""
    return COLOURS[(number - 1) % len(COLOURS)]


def to_ras(arrays: Sequence[np.ndarray], affine: Affine) -> tuple[list[np.ndarray], np.ndarray]:
    """Flip and swap the axes of arrays (H, W, D) on one grid so that they run to right, anterior and superior.

    There is no resampling: an oblique scan keeps its own axes, in the order of the nearest RAS axes. Returns the arrays
    and the spacing (3,) in mm along their new axes.
    """
    orientation = io_orientation(affine)
    sizes = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
    spacing = sizes[np.argsort(orientation[:, 0])]
    return [apply_orientation(np.asarray(array), orientation) for array in arrays], spacing


class _View(NamedTuple):
    """The part to draw: the voxel ``centre`` (3,), the window's lower corner ``low`` (3,) and sides, in mm."""

    centre: np.ndarray
    low: np.ndarray
    wide: float
    tall: float


def _view(label: np.ndarray, truth: np.ndarray | None, spacing: np.ndarray) -> _View:
    """The planes through the label's centre of mass, 2.2 times its extent wide, within the scan.

    For an empty label the truth is used; if that is empty too, the whole scan.
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
    tall = float(min(wide, extent[1:].max()))  # axes 1 and 2 are vertical in some plane
    low = []
    for axis in range(3):
        side = tall if axis == 2 else wide
        start = np.clip((centre[axis] + 0.5) * spacing[axis] - side / 2, 0, max(extent[axis] - side, 0))
        low.append(float(start) if extent[axis] > side else (extent[axis] - side) / 2)  # shorter axes are centred
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
    truth_colour: str = TRUTH_COLOUR,
) -> None:
    """Draw the three planes of ``view`` into ``axes``; arrays (H, W, D) in RAS, spacing in mm."""
    sample = image[::2, ::2, ::2]
    sample = sample[np.isfinite(sample)]
    dark, bright = np.percentile(sample, (0.5, 99.5)) if sample.size else (0, 1)
    # A black rim keeps lines visible on bright tissue.
    halo: list[Any] = [withStroke(linewidth=width + 1, foreground="black", alpha=0.5)]
    for axis, (across, up, through, letters) in zip(axes, PLANES.values()):
        picture, *masks = (np.take(a, view.centre[through], through) for a in (image, label, truth) if a is not None)
        box = (0, picture.shape[0] * spacing[across], 0, picture.shape[1] * spacing[up])
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
        # Truth is drawn first, below the label: where both agree only the label is visible.
        for mask, is_truth in reversed(list(zip(masks, (False, True)))):
            padded = np.pad(mask, 1)  # closes contours at the edge of the scan
            where = [(np.arange(n + 2) - 0.5) * spacing[a] for n, a in zip(mask.shape, (across, up))]
            for number in np.unique(mask[mask > 0]):
                colour = truth_colour if is_truth else class_colour(int(number))
                lines = axis.contour(*where, (padded == number).T, levels=[0.5], colors=[colour], linewidths=width)
                lines.set_path_effects(halo)
        # Radiological convention: right is on the left and, in the sagittal plane, anterior is on the left.
        left, bottom = view.low[across], view.low[up]
        # The axial plane is as high as the others although its window is wider.
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
            mark = axis.text(x, y, letter, transform=axis.transAxes, ha=ha, va=va, color="#eeeeee", fontsize=8)
            mark.set_path_effects(halo)


def case_picture(
    image: np.ndarray,
    label: np.ndarray,
    truth: np.ndarray | None,
    spacing: Sequence[float] | np.ndarray,
    classes: Mapping[int, str],
    title: str = "",
    marks: bool = True,
    truth_colour: str = TRUTH_COLOUR,
) -> bytes:
    """One scan in three orthogonal planes through its label's centre, as the bytes of a PNG of about 40 kB.

    ``image``, ``label`` and ``truth`` (None if unknown) are (H, W, D) in RAS (`to_ras`); ``spacing`` (3,) in mm sets
    the aspect ratio. Each class of the label has its own colour; the truth's contours have ``truth_colour``. With a
    title, a legend shows the names in ``classes`` (number -> name).

    Args:
        marks: letters at the edges for right, anterior and so on; False if the orientation is unknown.

    Raises:
        ValueError: the shapes differ.
    """
    image, label, truth, sizes = _checked(image, label, truth, spacing, title)
    view = _view(label, truth, sizes)
    top, height = 0.22 if title else 0.0, 1.7 * view.tall / view.wide  # inches
    figure = Figure(figsize=(5.1, height + top), dpi=PIXELS, facecolor="white")
    axes = [figure.add_axes((i / 3 + 0.002, 0, 1 / 3 - 0.004, height / (height + top))) for i in range(3)]
    _draw_planes(axes, view, image, label, truth, sizes, marks, 1.1, truth_colour)
    if title:
        figure.text(0.005, 1 - top / 2 / (height + top), title, va="center", fontsize=8)
        handles = _handles(classes, truth is not None)
        look = {"fontsize": 6, "frameon": False, "borderpad": 0}
        figure.legend(handles=handles, loc="upper right", ncols=max(len(handles), 1), **look)
    return png(figure)


def montage(
    rows: Iterable[tuple[str, np.ndarray, np.ndarray, np.ndarray | None, Sequence[float]]],
    classes: Mapping[int, str],
    path: Path,
    marks: bool = True,
) -> Path:
    """Write a PNG of several scans, one per row, with the three planes as columns.

    Each row is (title, image, label, truth or None, spacing) as in `case_picture`: arrays (H, W, D) in RAS, spacing in
    mm.

    Raises:
        ValueError: there is no row, or the shapes in a row differ.
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
        view = view._replace(tall=view.wide, low=view.low - [0, 0, (view.wide - view.tall) / 2])  # square panels
        bottom = (len(rows) - 1 - i) * size / total
        left, step = 0.3 / (3 * size + 0.3), size / (3 * size + 0.3)
        axes = [figure.add_axes((left + j * step, bottom, step - 0.006, (size - 0.04) / total)) for j in range(3)]
        _draw_planes(axes, view, image, label, truth, spacing, marks, 1.4)
        figure.text(left / 2, bottom + size / total / 2, title, rotation=90, ha="center", va="center", fontsize=9)
        if i == 0:
            for axis, name in zip(axes, PLANES):
                axis.set_title(name, fontsize=9, pad=3)
    handles = _handles(classes, any(row[3] is not None for row in rows))
    figure.legend(handles=handles, loc="upper center", ncols=max(1, min(len(handles), 6)), fontsize=8, frameon=False)
    with atomic_write(path) as aside:
        aside.write_bytes(png(figure))
    return Path(path)


def _checked(image, label, truth, spacing, title: str) -> tuple:
    """Image, label, truth and spacing as numpy arrays; raises ValueError if their shapes differ."""
    arrays = [a if a is None else np.asarray(a) for a in (image, label, truth)]
    shapes = [a.shape for a in arrays if a is not None]
    if len(set(shapes)) > 1 or len(shapes[0]) != 3:
        raise ValueError(f"{title or 'case'}: image, label and truth must be 3D and of one shape, got {shapes}")
    return *arrays, np.broadcast_to(np.asarray(spacing, float), 3)


def _handles(classes: Mapping[int, str], with_truth: bool) -> list[Line2D]:
    """The legend's lines: one per class, and the truth."""
    named = [Line2D([], [], color=class_colour(n), label=name) for n, name in sorted(classes.items()) if n > 0]
    return named + ([Line2D([], [], color=TRUTH_COLOUR, label="truth")] if with_truth else [])


def _palette() -> Image.Image:
    """32 greys and, for each colour in use, its mixtures with black, grey and white, for smooth edges."""
    entries: list[tuple[int, ...]] = [(grey,) * 3 for grey in np.linspace(0, 255, 32).astype(int).tolist()]
    for colour in map(to_rgb, (*COLOURS, TRUTH_COLOUR)):
        for weight in (0.35, 0.55, 0.8, 1.0):
            for other in (0.0, 0.5, 1.0)[: 1 if weight == 1.0 else 3]:
                mixed = (round(255 * (weight * c + (1 - weight) * other)) for c in colour)
                entries.append(tuple(mixed))
    picture = Image.new("P", (1, 1))
    picture.putpalette([value for entry in entries for value in entry])
    return picture


def picture_tag(png: bytes, text: str) -> str:
    """An ``img`` tag that contains the picture itself; ``text`` is its alternative text."""
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def png(figure: Figure) -> bytes:
    """A figure as PNG bytes, with a fixed palette that reduces the size to a third."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    file = io.BytesIO()
    picture.quantize(palette=_palette(), dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()
