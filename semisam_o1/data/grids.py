"""Grids: the position of voxels, the choice of the working space, and resampling between grids."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    SpatialResample,
)

from semisam_o1.types import Affine, Probabilities

REACH = 0.75  # voxels beyond the centre of a volume's last voxel; `Spacing` leaves up to 0.54 there
LONGEST_SIDE = 32  # voxels; a U-Net of five levels needs more than one voxel at its bottleneck


class Grid(NamedTuple):
    """The voxel grid of a scan: ``affine`` (4, 4), voxel index to RAS mm, and ``shape`` (H, W, D)."""

    affine: Affine
    shape: tuple[int, ...]

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size along each stored axis, mm, (3,)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def cropped(grid: Grid, box: Sequence[slice]) -> Grid:
    """The part of a grid in ``box``, a slice for each axis."""
    affine = np.array(grid.affine, float)
    affine[:3, 3] += affine[:3, :3] @ [part.start for part in box]
    return Grid(affine, tuple(part.stop - part.start for part in box))


def corner_distance(one: Grid, other: Grid) -> float:
    """The largest distance between corresponding corners of two grids of equal shape, in voxels of ``other``."""
    corners = np.array([[*corner, 1.0] for corner in product(*((0, n - 1) for n in other.shape))])
    try:
        between = np.linalg.solve(other.affine, one.affine) - np.eye(4)
    except np.linalg.LinAlgError:  # no inverse
        return float("inf")
    return float(np.linalg.norm((corners @ between.T)[:, :3], axis=1).max())


def working_shape(case_grid: Grid, spacing: float) -> np.ndarray:
    """Voxels per side (3,), RAS order, of a scan in the working space."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(case_grid.shape) - 1)
    world = corners @ case_grid.affine[:3, :3].T
    return np.ceil(np.ptp(world, axis=0) / spacing + 0.5).astype(int)


def choose_patch(grids: Sequence[Grid], spacing: float, max_voxels: int, divisor: int = 8) -> list[int]:
    """Sides of a training patch, RAS order: the median scan's, as multiples of ``divisor``, at most ``max_voxels``.

    If the whole scan has more voxels, the longest side is shortened until the patch fits.
    """
    sides = np.median([working_shape(grid, spacing) for grid in grids], axis=0)
    sides = np.maximum(np.ceil(sides / divisor), 2).astype(int) * divisor
    sides[sides.argmax()] = max(sides.max(), LONGEST_SIDE)
    while sides.prod() > max_voxels and sides.max() > LONGEST_SIDE:
        sides[sides.argmax()] -= divisor
    return [int(n) for n in sides]


def choose_spacing(grids: Sequence[Grid], max_voxels: int) -> float:
    """An isotropic working spacing in mm: the median scan has about ``max_voxels`` voxels, never finer than stored.

    It is relative to the field of view, so it also suits scans whose true voxel size is unknown.
    """
    extents = [np.prod(np.array(grid.shape[:3]) * grid.spacing) for grid in grids]
    finest = np.median([grid.spacing.min() for grid in grids])
    return float(f"{max((np.median(extents) / max_voxels) ** (1 / 3), finest):.5g}")


def to_grid(
    volume: Probabilities, affine: Affine, grid: Grid, mode: str = "bilinear", outside: str = "background"
) -> torch.Tensor:
    """Resample ``volume`` (C, h, w, d) with ``affine`` onto ``grid``: (C, H, W, D).

    ``outside`` sets the values outside of ``volume``: "border" repeats its border; "background" repeats it as far
    as the last voxel reaches, since the voxels of two grids end at different places, and has class 0 beyond; or
    "zeros".
    """
    source = MetaTensor(
        volume.as_tensor() if isinstance(volume, MetaTensor) else volume, affine=torch.as_tensor(affine)
    )
    padding_mode = "zeros" if outside == "zeros" else "border"
    resample = SpatialResample(mode=mode, padding_mode=padding_mode, dtype=torch.float32)
    found = resample(source, dst_affine=torch.as_tensor(grid.affine), spatial_size=grid.shape).as_tensor()
    if outside == "background" and (beyond := _beyond(affine, volume.shape[1:], grid)) is not None:
        found[:, beyond] = 0
        found[0, beyond] = 1
    return found


def _beyond(affine: Affine, shape: Sequence[int], grid: Grid) -> torch.Tensor | None:
    """The voxels of ``grid`` more than `REACH` outside of a volume with ``affine`` and ``shape``; None if none is."""
    place = np.linalg.solve(np.asarray(affine, float), np.asarray(grid.affine, float))
    limits = np.asarray(shape, float) - 1 + REACH
    corners = np.array(list(product(*((0, n - 1) for n in grid.shape)))) @ place[:3, :3].T + place[:3, 3]
    if ((corners >= -REACH) & (corners <= limits)).all():
        return None
    axes = [np.arange(n, dtype=np.float32) for n in grid.shape]
    beyond = np.zeros(grid.shape, bool)
    for row, limit in zip(place[:3].astype(np.float32), limits):
        where = np.add.outer(np.add.outer(row[0] * axes[0], row[1] * axes[1]), row[2] * axes[2]) + row[3]
        beyond |= (where < -REACH) | (where > limit)
    return torch.from_numpy(beyond) if beyond.any() else None
