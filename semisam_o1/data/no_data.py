"""Where a scan holds no data: padding, air set to one value, the outside of a circular field of view."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

LEAST = 0.01  # share of the voxels; less has no effect worth a mask
FACE_SHARE = 0.02  # of the voxels on the scan's faces; a value with less is no padding
MOST_VALUES = 3  # that are looked at on the faces
MOST_LAYERS = 3  # of padding; a scan may be padded more than once
FAR = 0.5  # of the range of all other values; padding this far below them is padding wherever it lies
SMALLEST_SIDE = 4  # voxels; of the box of the data

Box = tuple[slice, ...]  # one slice for each axis


def no_data(scan: np.ndarray) -> np.ndarray | None:
    """The voxels of ``scan`` (H, W, D) without data, as a mask (H, W, D); None if they are less than 1%.

    A value that is common on the scan's faces is no data in outer slices that hold nothing else, and in regions that
    reach an edge of the volume and are more than two voxels thick; single voxels of that value inside the body count as
    data. So do regions in the middle of a face: lungs in a scan that was clipped to a window have the value of the air
    around the body. A value far below all others is no data everywhere.
    """
    found = np.zeros(scan.shape, bool)
    for _ in range(MOST_LAYERS):
        box = data_box(found)
        layer = _outer_layer(scan[box], found[box]) & ~found[box]
        if not layer.any():
            break
        found[box] |= layer
    if found.mean() < LEAST:
        return None
    if min(part.stop - part.start for part in data_box(found)) < SMALLEST_SIDE:
        return None
    low, high = np.percentile(scan[~found], [1, 99.5])
    return found if low < high else None


def data_box(mask: np.ndarray | None, shape: tuple[int, ...] = ()) -> Box:
    """The smallest box that holds all voxels with data. ``mask``: as `no_data` returns it; None: all of ``shape``."""
    if mask is None:
        return tuple(slice(0, n) for n in shape)
    box = []
    for axis in range(3):
        held = np.flatnonzero(~mask.all(tuple(other for other in range(3) if other != axis)))
        box.append(slice(int(held[0]), int(held[-1]) + 1) if held.size else slice(0, 0))
    return tuple(box)


def _outer_layer(scan: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The voxels without data that one look finds; ``known`` are some."""
    rest = scan[~known]
    lowest = rest.min()
    found = np.zeros(scan.shape, bool)
    above = rest[rest > lowest]
    if above.size >= LEAST * scan.size and rest.size - above.size >= LEAST * scan.size:
        next_value = above.min()
        if next_value - lowest > FAR * (np.percentile(above, 99.5) - next_value):
            found |= scan == lowest
    top = np.percentile(rest, 99.5)
    for value in _common_on_faces(scan):
        if value < top and ((same := scan == value).mean() >= LEAST):
            found |= _connected_with_edges(same) | _outer_slices(same)
    return found


def _common_on_faces(scan: np.ndarray) -> list[float]:
    faces = [scan.take(index, axis).ravel() for axis in range(3) for index in (0, -1)]
    values, counts = np.unique(np.concatenate(faces), return_counts=True)
    common = np.argsort(-counts, kind="stable")[:MOST_VALUES]
    return [float(values[n]) for n in common if counts[n] >= FACE_SHARE * counts.sum()]


def _connected_with_edges(same: np.ndarray) -> np.ndarray:
    core = ndimage.binary_erosion(same, border_value=1)
    parts, _ = ndimage.label(core)
    on_face = np.ix_(*(np.isin(np.arange(n), (0, n - 1)).astype(int) for n in same.shape))
    touching = np.zeros(int(parts.max()) + 1, bool)
    touching[parts[sum(on_face) > 1]] = True
    touching[0] = False
    return ndimage.binary_dilation(touching[parts], mask=same)


def _outer_slices(same: np.ndarray) -> np.ndarray:
    """The slices at both ends of each axis that are True throughout."""
    found = np.zeros(same.shape, bool)
    for axis in range(3):
        mixed = np.flatnonzero(~same.all(tuple(other for other in range(3) if other != axis)))
        ends = np.moveaxis(found, axis, 0)
        ends[: mixed[0]], ends[mixed[-1] + 1 :] = True, True
    return found
