"""Grids: the position of voxels, the choice of the working space, and resampling between grids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    SpatialResample,
)
from nibabel.orientations import io_orientation

from semisam_o1.types import Affine, Probabilities

REACH = 0.75  # voxels beyond the centre of a volume's last voxel; `Spacing` leaves up to 0.54 there
LONGEST_SIDE = 32  # voxels; a U-Net of five levels needs more than one voxel at its bottleneck
THICK = 1.5  # times the isotropic spacing; below it, keeping the slices makes in-plane voxels at most 1.22 times finer
POOLED = 2.0  # times the finest spacing; a coarser axis is not halved, as in nnU-Net
MOST_TILT = 30  # degrees
LEAST_SIDE = 4  # voxels; a side is not halved to less
SLAB = 2**24  # values that `slabs` allows at once: 64 MiB of float32

Spacing = float | Sequence[float]  # mm, one along R, A, S or three along the stored axes nearest to them


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


def slabs(grid: Grid, channels: int) -> Iterator[tuple[slice, Grid]]:
    """Parts of a grid along its first axis, in order, in which ``channels`` volumes have at most `SLAB` values.

    A part has at least one plane. Memory for the probabilities of many classes thus does not grow with the scan.
    """
    planes = max(1, SLAB // (channels * int(np.prod(grid.shape[1:]))))
    for start in range(0, grid.shape[0], planes):
        rows = slice(start, min(start + planes, grid.shape[0]))
        yield rows, cropped(grid, (rows, *(slice(0, n) for n in grid.shape[1:])))


def working_shape(case_grid: Grid, spacing: Spacing) -> np.ndarray:
    """Voxels per side (3,), RAS order, of a scan in the working space; three numbers are along its own axes."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(case_grid.shape) - 1)
    world = corners @ (case_grid if is_isotropic(spacing) else straightened(case_grid)).affine[:3, :3].T
    return np.ceil(np.ptp(world, axis=0) / np.asarray(spacing) + 0.5).astype(int)


def is_isotropic(spacing: Spacing | None) -> bool:
    """Whether a working spacing is one number, or None (the stored grid)."""
    return spacing is None or np.ndim(spacing) == 0


def in_plane(spacing: Spacing | None) -> list[bool]:
    """For the axes R, A, S: whether the other two axes have voxels of like size, within `THICK`.

    A rotation about such an axis stays a rotation in voxel indices.
    """
    if is_isotropic(spacing):
        return [True] * 3
    sides = np.asarray(spacing, float)
    return [bool(pair.max() <= THICK * pair.min()) for pair in (np.delete(sides, axis) for axis in range(3))]


def _median_shape(grids: Sequence[Grid], spacing: Spacing) -> np.ndarray:
    """Voxels per side (3,), RAS order, of the median scan in the working space."""
    return np.median([working_shape(grid, spacing) for grid in grids], axis=0)


def choose_strides(grids: Sequence[Grid], spacing: Spacing | None, levels: int = 3) -> list:
    """The stride of each level of a U-Net: 2, or for a ``spacing`` of three numbers a list of 1 or 2 for R, A, S.

    An axis is halved while its voxels are at most `POOLED` times the finest and its side keeps `LEAST_SIDE` voxels.
    Source: the rule of nnU-Net (Isensee et al., Nature Methods 2021).
    """
    if is_isotropic(spacing):
        return [2] * levels
    sides, sizes, strides = _median_shape(grids, spacing), np.array(spacing, float), []
    for _ in range(levels):
        halved = (sizes <= POOLED * sizes.min()) & (np.ceil(sides / 2) >= LEAST_SIDE)
        factors = np.where(halved, 2, 1)
        sides, sizes = np.ceil(sides / factors), sizes * factors
        strides.append([int(n) for n in factors])
    return strides


def choose_patch(grids: Sequence[Grid], spacing: Spacing, max_voxels: int, levels: int = 3) -> list[int]:
    """Sides of a training patch, RAS order: the median scan's, at most ``max_voxels``, for a U-Net of `choose_strides`.

    A side is a multiple of the product of the strides along its axis. If the whole scan has more voxels, the longest
    side is shortened until the patch fits.
    """
    sides = _median_shape(grids, spacing)
    divisors = np.prod([np.broadcast_to(s, 3) for s in choose_strides(grids, spacing, levels)], axis=0)
    sides = np.maximum(np.ceil(sides / divisors), 2 if is_isotropic(spacing) else 1).astype(int) * divisors
    sides[sides.argmax()] = max(sides.max(), LONGEST_SIDE)
    while sides.prod() > max_voxels and sides.max() > LONGEST_SIDE:
        sides[sides.argmax()] -= divisors[sides.argmax()]
    return [int(n) for n in sides]


def choose_spacing(grids: Sequence[Grid], max_voxels: int) -> float:
    """An isotropic working spacing in mm: the median scan has about ``max_voxels`` voxels, never finer than stored.

    It is relative to the field of view, so it also suits scans whose true voxel size is unknown.
    """
    finest = np.median([grid.spacing.min() for grid in grids])
    return _rounded(max((_median_extent(grids) / max_voxels) ** (1 / 3), finest))


def choose_train_spacing(grids: Sequence[Grid], max_voxels: int) -> float | list[float]:
    """`choose_spacing`; for scans with thick slices three numbers instead, mm along the axes nearest to R, A, S.

    An axis is thick if its stored spacing is more than `THICK` times the isotropic one. It keeps its own, and the other
    axes share the voxels; none is finer than stored. If a template lies more oblique than `MOST_TILT`, the spacing is
    isotropic: another scan's slices might be nearest to another axis.
    """
    isotropic, straight = choose_spacing(grids, max_voxels), [straightened(grid) for grid in grids]
    stored = np.median([np.abs(grid.affine[:3, :3]).sum(axis=1) for grid in straight], axis=0)
    thick = stored > THICK * isotropic
    tilts = [tilt(grid) for grid in grids]
    if not thick.any() or thick.all() or max(tilts) > MOST_TILT:
        return isotropic
    share = (_median_extent(grids) / max_voxels / stored[thick].prod()) ** (1 / (~thick).sum())
    return [_rounded(size) for size in np.where(thick, stored, np.maximum(share, stored))]


def frame_of(spacing: Spacing | None) -> str:
    """The axes that a working spacing is along, see `image_chain`: three numbers are for a scan's own, "stored"."""
    return "world" if is_isotropic(spacing) else "stored"


def straightened(grid: Grid) -> Grid:
    """A grid with its axes turned to the nearest of R, A, S; its origin is where it was."""
    affine = np.array(grid.affine, float)
    affine[:3, :3] = 0
    for stored, (axis, sign) in enumerate(io_orientation(grid.affine)):
        affine[int(axis), stored] = sign * grid.spacing[stored]
    return Grid(affine, grid.shape)


def tilt(grid: Grid) -> float:
    """The largest angle, degrees, between a stored axis and the one of R, A, S that it is taken for."""
    straight = straightened(grid)
    cosines = (grid.affine * straight.affine)[:3, :3].sum(axis=0) / grid.spacing**2
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).max())


def _median_extent(grids: Sequence[Grid]) -> float:
    """The volume of the median scan's field of view, mm3."""
    return float(np.median([np.prod(np.array(grid.shape[:3]) * grid.spacing) for grid in grids]))


def _rounded(spacing: float) -> float:
    return float(f"{spacing:.5g}")


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
    if outside == "background" and (empty := beyond(affine, volume.shape[1:], grid)) is not None:
        found[:, empty] = 0
        found[0, empty] = 1
    return found


def beyond(affine: Affine, shape: Sequence[int], grid: Grid) -> torch.Tensor | None:
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
