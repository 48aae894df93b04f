"""How a scan gets from its file to the working space and a result gets back: MONAI readers and chains.

The working space is axis-aligned RAS at one isotropic spacing for the whole cohort: `Orientationd("RAS")`, then
`Spacingd(..., diagonal=True)`, so that oblique scans are turned upright too. Results return by their affines
alone (`to_grid`), whatever happened in between.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import nibabel
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import ITKReader, MetaTensor
from monai.data.image_reader import ImageReader
from monai.transforms import (
    AsDiscreted,
    Compose,
    EnsureTyped,
    KeepLargestConnectedComponent,
    Lambdad,
    LoadImage,
    LoadImaged,
    MapTransform,
    NormalizeIntensityd,
    Orientationd,
    Pad,
    ScaleIntensityRangePercentilesd,
    Spacingd,
    SpatialResample,
)
from monai.utils import CommonKeys as Keys
from scipy.ndimage import gaussian_filter

from semisam_o1.encoders.sam_med3d import normalise_foreground
from semisam_o1.types import Affine, Case, Probabilities, Volume

HDF5_SUFFIXES = (".h5", ".hdf5")
NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
ONE_PIECE = 0.95  # of a class's voxels in its largest component: veins and the like may be cut by the field of view
LONGEST_SIDE = 32  # voxels; a U-Net of five levels needs more than one voxel at its bottom
UNSAID_SPACING = "HDF5 files say no voxel size and none was given: taken as 1 mm along each axis."
SUFFIXES = HDF5_SUFFIXES + NIFTI_SUFFIXES + ITK_SUFFIXES


class Grid(NamedTuple):
    """Where the voxels of a scan lie: ``affine`` (4, 4), voxel index to RAS mm, and ``shape`` (H, W, D)."""

    affine: Affine
    shape: tuple[int, ...]

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size along each stored axis, mm, (3,)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


class HDF5Reader(ImageReader):
    """Reads one dataset of an HDF5 file as (H, W, D) float32, with ``spacing`` (mm) in place of the missing affine.

    Args:
        key: the dataset's name, e.g. ``image`` or ``label``.
        spacing: voxel size in mm along the stored axes, one number or three; 1 where the file says nothing.

    Raises:
        KeyError: the file has no such dataset; the message lists those it has.
    """

    def __init__(self, key: str = "image", spacing: float | Sequence[float] | None = None):
        self.key, self.spacing = key, spacing

    def verify_suffix(self, filename) -> bool:
        names = [filename] if isinstance(filename, (str, Path)) else filename
        return all(str(name).lower().endswith(HDF5_SUFFIXES) for name in names)

    def read(self, data, **kwargs):
        path = data if isinstance(data, (str, Path)) else data[0]
        with h5py.File(path, "r") as file:
            if self.key not in file:
                raise KeyError(f"{path}: no dataset '{self.key}' in the file, which has {sorted(file)}.")
            return file[self.key][()]

    def get_data(self, img) -> tuple[np.ndarray, dict]:
        affine = hdf5_affine(self.spacing)
        meta = {"affine": affine, "original_affine": affine.copy(), "spatial_shape": np.asarray(img.shape)}
        return np.ascontiguousarray(img), meta | {"original_channel_dim": float("nan"), "space": "RAS"}


def hdf5_affine(spacing: float | Sequence[float] | None) -> Affine:
    """The affine of an HDF5 scan: its spacing on the diagonal, 1 mm where unsaid."""
    return np.diag([*np.broadcast_to(1.0 if spacing is None else spacing, 3), 1.0]).astype(float)


class LoadScand(LoadImaged):
    """MONAI's `LoadImaged`, channel first, that knows HDF5 as well: (1, H, W, D) float32 with its affine (RAS mm).

    Args:
        keys: what to load; each names a file in the item.
        dataset: the HDF5 dataset read where the file is one.
        spacing: the voxel size (mm) that HDF5 files lack.
    """

    def __init__(self, keys: KeysCollection, dataset: str = "image", spacing=None, **kwargs):
        super().__init__(keys, ensure_channel_first=True, image_only=True, **kwargs)
        self.register(HDF5Reader(dataset, spacing))


def read_grid(path: str | Path, dataset: str = "image", spacing=None) -> Grid:
    """Affine and shape of a scan from its header alone; the shape has as many axes as the file has."""
    name = str(path).lower()
    if name.endswith(HDF5_SUFFIXES):
        with h5py.File(path, "r") as file:
            if dataset not in file:
                raise KeyError(f"no dataset '{dataset}' in the file, which has {sorted(file)}")
            return Grid(hdf5_affine(spacing), tuple(int(n) for n in file[dataset].shape))
    if name.endswith(NIFTI_SUFFIXES):
        image = nibabel.load(path)
        return Grid(np.asarray(image.affine, float), tuple(int(n) for n in image.shape))
    reader = ITKReader()
    array, meta = reader.get_data(reader.read(str(path)))
    return Grid(np.asarray(meta["affine"], float), tuple(int(n) for n in meta["spatial_shape"]))


def read_volume(path: str | Path, dataset: str = "image", spacing=None) -> MetaTensor:
    """One image or label as stored: (1, H, W, D) float32 with its affine."""
    loader = LoadImage(image_only=True, ensure_channel_first=True)
    loader.register(HDF5Reader(dataset, spacing))
    return loader(str(path))


class AntiAliasd(MapTransform):
    """Gaussian smoothing ahead of a resampling to ``spacing`` mm, where that is coarser than the scan.

    The standard deviation is (ratio - 1)/2 voxels an axis, as scikit-image takes it; finer or equal axes stay.
    """

    def __init__(self, keys: KeysCollection, spacing: float | Sequence[float], allow_missing_keys: bool = False):
        super().__init__(keys, allow_missing_keys)
        self.spacing = np.broadcast_to(spacing, 3)

    def __call__(self, data: Mapping[Hashable, Volume]) -> dict:
        data = dict(data)
        for key in self.key_iterator(data):
            stored = np.linalg.norm(np.asarray(data[key].affine)[:3, :3], axis=0)
            sigma = np.maximum(0, (self.spacing / stored - 1) / 2)
            if sigma.max() > 0.05:  # less is not felt
                smooth = gaussian_filter(data[key].numpy(), (0, *sigma), mode="nearest", truncate=3)
                data[key] = MetaTensor(torch.from_numpy(smooth), meta=data[key].meta)
        return data


def image_chain(
    spacing: float | Sequence[float] | None,
    hdf5_key: str = "image",
    hdf5_spacing=None,
    intensities: str | None = "percentiles",
    frame: str = "world",
) -> Compose:
    """``image`` from its file to the working space: (1, H, W, D), RAS, ``spacing`` mm.

    Intensities are normalised on the stored voxels, before anything is resampled, so that orientation, padding and
    obliqueness cannot change them: "percentiles" clips to the 1st and 99.5th and z-normalises, "foreground"
    z-normalises by the voxels above zero (as SAM-Med3D was trained), None leaves them. ``spacing`` None keeps the
    stored grid (the published code's way). ``frame`` "world" turns oblique scans upright; "stored" keeps their own
    axes, the nearest to RAS, for where the patient lay askew and not the scan.
    """
    steps = {
        "percentiles": [
            ScaleIntensityRangePercentilesd(Keys.IMAGE, lower=1, upper=99.5, b_min=0, b_max=1, clip=True),
            NormalizeIntensityd(Keys.IMAGE),
        ],
        "foreground": [Lambdad(Keys.IMAGE, lambda image: normalise_foreground(image[None])[0])],
        None: [],
    }
    if intensities not in steps:
        raise ValueError(f"intensities '{intensities}': expected one of {', '.join(map(str, steps))}.")
    load = LoadScand(Keys.IMAGE, dataset=hdf5_key, spacing=hdf5_spacing)
    return Compose([load, *steps[intensities], *_resampling(Keys.IMAGE, spacing, frame)])


def label_chain(spacing: float | Sequence[float] | None, num_classes: int, hdf5_spacing=None) -> Compose:
    """``label`` from its file to fractional labels in the working space: (num_classes, H, W, D), summing to 1.

    Classes beyond the last count as the last, which merges all foreground where there are two.
    """
    load = LoadScand(Keys.LABEL, dataset="label", spacing=hdf5_spacing)
    merge = Lambdad(Keys.LABEL, lambda label: label.clamp(max=num_classes - 1))
    return Compose([load, merge, AsDiscreted(Keys.LABEL, to_onehot=num_classes), *_resampling(Keys.LABEL, spacing)])


def _resampling(key: str, spacing: float | Sequence[float] | None, frame: str = "world") -> list:
    if spacing is None:
        return [EnsureTyped(key, dtype=torch.float32)]
    spacing = [float(s) for s in np.broadcast_to(spacing, 3)]
    return [
        Orientationd(key, axcodes="RAS", labels=None),
        AntiAliasd(key, spacing),
        Spacingd(key, pixdim=spacing, diagonal=frame == "world", mode="bilinear", padding_mode="border"),
        EnsureTyped(key, dtype=torch.float32),
    ]


class PublishedPadd(MapTransform):
    """Zeros on both sides of every axis, as the published code pads before its crop; for (C, H, W, D).

    If any side s is at most that of the patch p, every axis gets max((p - s) div 2 + 3, 0) on each side.
    """

    def __init__(self, keys: KeysCollection, patch_size: Sequence[int]):
        super().__init__(keys)
        self.patch_size = tuple(int(n) for n in patch_size)

    def __call__(self, data: Mapping[Hashable, Volume]) -> dict:
        data = dict(data)
        for key in self.key_iterator(data):
            sides = data[key].shape[1:]
            if any(s <= p for s, p in zip(sides, self.patch_size)):
                pads = [max((p - s) // 2 + 3, 0) for s, p in zip(sides, self.patch_size)]
                data[key] = Pad([(0, 0), *((n, n) for n in pads)], mode="constant")(data[key])
        return data


def chain(*parts: Compose | Sequence) -> Compose:
    """Several chains as one flat `Compose`, of which `CacheDataset` can cache the deterministic head."""
    return Compose([step for part in parts for step in (part.transforms if isinstance(part, Compose) else part)])


def working_shape(case_grid: Grid, spacing: float) -> np.ndarray:
    """Voxels a side (3,), RAS order, that a scan takes in the working space."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(case_grid.shape) - 1)
    world = corners @ case_grid.affine[:3, :3].T
    return np.ceil(np.ptp(world, axis=0) / spacing + 0.5).astype(int)


def choose_patch(grids: Sequence[Grid], spacing: float, max_voxels: int, divisor: int = 8) -> list[int]:
    """Sides of a training patch, RAS order: the median scan, in whole multiples of ``divisor``, at most ``max_voxels``.

    Where the whole scan is more than that, the longest side is shortened until it fits.
    """
    sides = np.median([working_shape(grid, spacing) for grid in grids], axis=0)
    sides = np.maximum(np.ceil(sides / divisor), 2).astype(int) * divisor
    sides[sides.argmax()] = max(sides.max(), LONGEST_SIDE)
    while sides.prod() > max_voxels and sides.max() > LONGEST_SIDE:
        sides[sides.argmax()] -= divisor
    return [int(n) for n in sides]


def to_grid(
    volume: Probabilities, affine: Affine, grid: Grid, mode: str = "bilinear", outside: str = "border"
) -> torch.Tensor:
    """Resample ``volume`` (C, h, w, d), lying where ``affine`` says, onto ``grid``: (C, H, W, D).

    ``outside`` of it are the values of its "border", or "zeros".
    """
    source = MetaTensor(
        volume.as_tensor() if isinstance(volume, MetaTensor) else volume, affine=torch.as_tensor(affine)
    )
    resample = SpatialResample(mode=mode, padding_mode=outside, dtype=torch.float32)
    return resample(source, dst_affine=torch.as_tensor(grid.affine), spatial_size=grid.shape).as_tensor()


def keep_largest(label: Volume, classes: Sequence[int]) -> Volume:
    """``label`` (1, H, W, D) with the largest component of each of ``classes`` alone; the rest is background."""
    keep = KeepLargestConnectedComponent(list(classes), is_onehot=False)
    return keep(label.clone()) if len(classes) else label  # it works in place


def one_piece_classes(labels: Sequence[Volume], num_classes: int) -> list[int]:
    """The foreground classes that are one piece in each of ``labels`` (1, H, W, D) that has them; one must."""
    found = []
    labels = [label.clamp(max=num_classes - 1) for label in labels]
    for number in range(1, num_classes):
        there = [label for label in labels if (label == number).any()]
        shares = [float((keep_largest(la, [number]) == number).sum() / (la == number).sum()) for la in there]
        if shares and min(shares) >= ONE_PIECE:
            found.append(number)
    return found


def choose_spacing(grids: Sequence[Grid], max_voxels: int) -> float:
    """An isotropic working spacing in mm: the median scan holds about ``max_voxels`` voxels, none finer than stored.

    It depends on the field of view alone, so scans whose true voxel size is unknown are worked on equally well.
    """
    extents = [np.prod(np.array(grid.shape[:3]) * grid.spacing) for grid in grids]
    finest = np.median([grid.spacing.min() for grid in grids])
    return float(f"{max((np.median(extents) / max_voxels) ** (1 / 3), finest):.5g}")


def case_grid(case: Case, hdf5_key: str = "image", hdf5_spacing=None) -> Grid:
    """The stored grid of a case's image, to which all its results go back."""
    return read_grid(case.image, hdf5_key, hdf5_spacing)
