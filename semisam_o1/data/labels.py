"""The one function that reads a label, on the grid of its scan, and what it accepts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from semisam_o1.data.findings import NOTE, Fault, Finding
from semisam_o1.data.grids import Grid, corner_distance
from semisam_o1.data.itk_image import segments_of
from semisam_o1.data.reader import ScanReader
from semisam_o1.data.stored import Stored

# Largest distance between the corners of image and label, in voxels. Rounding in headers (float32 offsets,
# quaternions) stays below 0.001 voxel. A shift of 0.05 voxel does not change any overlap measurably; half a voxel does.
AFFINE_TOLERANCE = 0.05
WHOLE = 1e-3  # a value this close to a whole number is that number
HIGHEST = 65535  # class number that label files hold


class Label(NamedTuple):
    """A label on its scan's grid: class numbers (H, W, D) int32, and what was noticed."""

    values: np.ndarray
    findings: tuple[Finding, ...]


def class_key(name: str) -> str:
    """What tells one class from another by its name: upper and lower case are the same, so are spaces, underscores and
    hyphens, and accents composed and decomposed."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name)).strip().casefold()


def read_label(
    path: Path,
    reader: ScanReader,
    scan: Stored | None = None,
    classes: Mapping[int, str] | None = None,
    segments: Mapping[int, str] | None = None,
) -> Label:
    """A label file as class numbers on the grid of its scan.

    Values within `WHOLE` of a whole number are rounded; another order of axes is put right; the cropped extent of a
    ``.seg.nrrd`` is placed. Values that have names in the file become the class numbers of these names.

    Args:
        scan: the scan; without it, the label keeps its own grid.
        classes: class number -> name, as the data set says; None if it says none.
        segments: value in the file -> name, if known from elsewhere; by default as a ``.seg.nrrd`` says.

    Raises:
        Fault: the label cannot be used.
    """
    stored = reader.open(path, label=True)
    if segments is None and path.name.lower().endswith((".nrrd", ".nhdr")):
        segments = segments_of(path)
    if segments and len(stored.grid.shape) > 3:
        raise Fault("overlapping segments", "one segment per voxel", "export a label map without overlap")
    axes = len(stored.grid.shape)
    if axes != 3:
        remedy = "store one label map per file" if axes > 3 else "store whole volumes, not slices"
        raise Fault(f"a {axes}D label, {sizes(stored.grid.shape)}", "a 3D label", remedy)
    if min(stored.grid.shape) == 0:
        raise Fault(f"a label of {sizes(stored.grid.shape)} voxels", "voxels", "outline the scan again")
    values, findings = _whole(stored.voxels())
    if segments:
        values, named = _by_name(values, segments, classes)
        findings += named
    if scan is not None:
        values, placed = _placed(values, stored.grid, scan, cropped=bool(segments))
        findings += placed
    return Label(values, (*stored.findings, *findings))


def sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)


def some(names: list) -> str:
    return ", ".join(str(name) for name in names[:5]) + (" ..." if len(names) > 5 else "")


def _whole(values: np.ndarray) -> tuple[np.ndarray, list[Finding]]:
    with np.errstate(invalid="ignore"):
        whole = np.rint(values)
        off = np.abs(values - whole)
    if not (off <= WHOLE).all():  # NaN is not
        remedy = "store class numbers, unscaled and not interpolated"
        raise Fault("the label has values that are not whole numbers", "0, 1, 2 ...", remedy)
    low, high = float(whole.min()), float(whole.max())
    if low < 0 or high > HIGHEST:
        found = f"the label holds class {low if low < 0 else high:.0f}"
        raise Fault(found, f"class numbers from 0 to {HIGHEST:,}", "write the background as 0, classes as 1, 2, ...")
    rounded = (
        [Finding(NOTE, "values just beside whole numbers", "whole numbers", "nothing: they are rounded")]
        if off.any()
        else []
    )
    return whole.astype(np.int32), rounded


def _by_name(
    values: np.ndarray, segments: Mapping[int, str], classes: Mapping[int, str] | None
) -> tuple[np.ndarray, list[Finding]]:
    """``values`` with the class number of each segment's name in place of the segment's value."""
    held = {int(n) for n in np.unique(values)} - {0}
    if classes is None:
        return values, [
            Finding(
                NOTE, "named segments, but no classes.json", "classes.json", "nothing, if the values are the classes"
            )
        ]
    numbers = {class_key(name): number for number, name in classes.items()}
    if unknown := [
        segments.get(value, f"value {value}") for value in sorted(held) if not _known(value, segments, numbers)
    ]:
        remedy = "give them the names of the classes, or add theirs to classes.json if the data set has one"
        raise Fault(
            f"segments unknown to the run: {some(unknown)}", f"one of {some(list(classes.values())[1:])}", remedy
        )
    table = np.zeros(max(held, default=0) + 1, np.int32)
    for value in held:
        table[value] = numbers[class_key(segments[value])]
    return table[values], []


def _known(value: int, segments: Mapping[int, str], numbers: Mapping[str, int]) -> bool:
    return value in segments and class_key(segments[value]) in numbers


def _placed(values: np.ndarray, own: Grid, scan: Stored, cropped: bool) -> tuple[np.ndarray, list[Finding]]:
    """``values`` on the scan's grid.

    Raises:
        Fault: the label lies on another grid.
    """
    grid = scan.grid
    if own.shape == grid.shape and corner_distance(own, grid) <= AFFINE_TOLERANCE:
        return values, []
    turned, grid_of_turned = _reordered(values, own, grid)
    findings = [
        Finding(NOTE, "axes in another order than the scan's", "the scan's order", "nothing: the axes are reordered")
    ]
    findings = findings if turned is not values else []
    if turned.shape == grid.shape and corner_distance(grid_of_turned, grid) <= AFFINE_TOLERANCE:
        return turned, findings
    if cropped:
        return _in_extent(turned, grid_of_turned, grid), findings
    if own.shape != grid.shape and turned.shape != grid.shape:
        raise Fault(f"label {sizes(own.shape)}", f"the image's {sizes(grid.shape)}", "draw or resample it on the image")
    distance = corner_distance(grid_of_turned if turned.shape == grid.shape else own, grid)
    if scan.other is not None and turned.shape == grid.shape:
        name, affine = scan.other
        if corner_distance(own, Grid(affine, grid.shape)) <= AFFINE_TOLERANCE:
            found = f"the label lies {distance:.3g} voxels off, but fits the scan's {name}, which is not used"
            raise Fault(
                found, "a label on the form in use", f"repair the header, or --set nifti_form={name} (all scans)"
            )
    found = f"the label's grid lies {distance:.3g} voxels from the image's"
    raise Fault(found, f"at most {AFFINE_TOLERANCE:g} voxels", "draw or resample it on the image")


def _reordered(values: np.ndarray, own: Grid, grid: Grid) -> tuple[np.ndarray, Grid]:
    """``values`` with axes permuted and flipped to run as those of ``grid``; unchanged if that is not all it takes."""
    if not np.isfinite(own.affine).all() or abs(np.linalg.det(own.affine[:3, :3])) < 1e-12:
        return values, own
    between = np.linalg.solve(grid.affine, own.affine)[:3, :3]  # own index -> the scan's
    order = np.abs(between).argmax(1)  # own axis for each of the scan's
    if sorted(order) != [0, 1, 2]:
        return values, own
    signs = np.sign(between[np.arange(3), order])
    if not np.allclose(between, np.eye(3)[order] * signs[:, None], atol=AFFINE_TOLERANCE / max(own.shape)):
        return values, own
    if list(order) == [0, 1, 2] and (signs > 0).all():
        return values, own
    change = np.eye(4)  # index after -> index before
    change[:3, :3] = (np.eye(3)[order] * signs[:, None]).T
    for before, sign in zip(order, signs):
        if sign < 0:
            change[before, 3] = own.shape[before] - 1
    moved = np.transpose(values, order)
    moved = moved[tuple(slice(None, None, int(sign)) for sign in signs)]
    return np.ascontiguousarray(moved), Grid(own.affine @ change, moved.shape)


def _in_extent(values: np.ndarray, own: Grid, grid: Grid) -> np.ndarray:
    """A cropped label in the whole of ``grid``, background elsewhere."""
    between = np.linalg.solve(grid.affine, own.affine)
    start = np.rint(between[:3, 3]).astype(int)
    moved = np.eye(4)
    moved[:3, 3] = start
    distance = corner_distance(Grid(grid.affine @ moved, own.shape), own)
    if not distance <= AFFINE_TOLERANCE:
        found = f"an extent that lies {distance:.3g} voxels beside the scan's voxels"
        raise Fault(found, "the scan's own voxels", "export it with the scan as reference")
    whole = np.zeros(grid.shape, values.dtype)
    first, last = np.maximum(start, 0), np.minimum(start + own.shape, grid.shape)
    inside = tuple(slice(a, max(a, b)) for a, b in zip(first - start, last - start))
    if (values != 0).sum() > (values[inside] != 0).sum():
        raise Fault("an extent that reaches beyond the scan", "segments inside the scan", "crop them to the scan")
    whole[tuple(slice(a, max(a, b)) for a, b in zip(first, last))] = values[inside]
    return whole
