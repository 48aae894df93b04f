"""Normalisation of intensities before a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from monai.transforms import Lambdad, NormalizeIntensityd, ScaleIntensityRangePercentilesd, Transform

FLAT = 1e-6  # of the mean; a smaller standard deviation is float32 rounding


def normalise_foreground(volume: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W, D) -> float32 of the same shape, z-normalised by the voxels above zero of each volume.

    Every voxel becomes (x - m) / s, with the mean m and the sample standard deviation s of the voxels above zero, as in
    the training of SAM-Med3D. If these voxels are all equal, s is 1. If there are none, the volume stays unchanged, so
    an empty window is allowed.
    """
    volume = volume.float()
    foreground = volume > 0
    axes = (1, 2, 3, 4)
    count = foreground.sum(axes, keepdim=True)
    mean = volume.where(foreground, 0).sum(axes, keepdim=True) / count.clamp(min=1)
    squares = ((volume - mean) ** 2).where(foreground, 0).sum(axes, keepdim=True)
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    return (volume - mean) / deviation.masked_fill(deviation <= FLAT * mean, 1)


def _percentiles(key: str) -> list[Transform]:
    scale = ScaleIntensityRangePercentilesd(key, lower=1, upper=99.5, b_min=0, b_max=1, clip=True)
    return [scale, NormalizeIntensityd(key)]


def _foreground(key: str) -> list[Transform]:
    return [Lambdad(key, lambda image: normalise_foreground(image[None])[0])]


# Name -> function from the key of an image (1, H, W, D) to the transforms that normalise it.
INTENSITIES: dict[str | None, Callable[[str], list[Transform]]] = {
    "percentiles": _percentiles,
    "foreground": _foreground,
    None: lambda key: [],
}
