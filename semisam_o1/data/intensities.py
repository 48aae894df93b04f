"""How intensities are normalised before a network sees them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from monai.transforms import Lambdad, NormalizeIntensityd, ScaleIntensityRangePercentilesd, Transform

FLAT = 1e-6  # a standard deviation under this part of the mean is float32 rounding


def normalise_foreground(volume: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W, D) -> float32 of that shape, z-normalised over its voxels above zero, volume by volume.

    (x - m) / s for every voxel, m and s the mean and the standard deviation (n - 1 in the divisor) of those
    above zero: the intensities that SAM-Med3D was trained on. If these are all equal s is 1, and if there are
    none the volume stays as it is, so that an empty window passes.
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


# By name: from the key of an image (1, H, W, D) to what normalises it there.
INTENSITIES: dict[str | None, Callable[[str], list[Transform]]] = {
    "percentiles": _percentiles,
    "foreground": _foreground,
    None: lambda key: [],
}
