"""Normalisation of intensities before a network."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import torch
from monai.config import KeysCollection
from monai.transforms import (
    Compose,
    MapTransform,
    NormalizeIntensity,
    ScaleIntensityRange,
    ScaleIntensityRangePercentiles,
)

Window = tuple[float, float] | None
HAS_DATA = "has_data"  # key of the mask of an image's voxels with data
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


def _percentiles(window: Window) -> list[Callable]:
    if window is not None:
        return [ScaleIntensityRange(*window, b_min=0, b_max=1, clip=True), NormalizeIntensity()]
    return [ScaleIntensityRangePercentiles(lower=1, upper=99.5, b_min=0, b_max=1, clip=True), NormalizeIntensity()]


def _foreground(window: Window) -> list[Callable]:
    return [*_stored(window), lambda image: normalise_foreground(image[None])[0]]


def _stored(window: Window) -> list[Callable]:
    return [] if window is None else [lambda image: image.clamp(*window)]


# Name -> function from a window (lowest and highest intensity, or None) to what normalises an image (1, H, W, D).
INTENSITIES: dict[str | None, Callable[[Window], list[Callable]]] = {
    "percentiles": _percentiles,
    "foreground": _foreground,
    None: _stored,
}


class NormaliseDatad(MapTransform):
    """Normalises ``keys``, (1, H, W, D) each, by the voxels with data; voxels without get the lowest result.

    An item without the mask ``has_data`` (1, H, W, D) has data everywhere.

    Args:
        keys: the images.
        intensities: a name of `INTENSITIES`.
        window: the lowest and the highest intensity, e.g. in Hounsfield units; used instead of percentiles.
    """

    def __init__(self, keys: KeysCollection, intensities: str | None, window: Window = None):
        super().__init__(keys)
        self.normalise = Compose(INTENSITIES[intensities](window))

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict:
        data = dict(data)
        held = data[HAS_DATA].bool() if HAS_DATA in data else None
        for key in self.key_iterator(data):
            if held is None or held.all():
                data[key] = self.normalise(data[key])
            else:
                volume = data[key].clone()
                values = self.normalise(torch.as_tensor(volume)[held].reshape(1, -1, 1, 1))  # as if it were a volume
                volume[held], volume[~held] = values.flatten(), values.min()
                data[key] = volume
        return data
