"""Transforms from a file to the working space: MONAI readers and chains.

The working space is axis-aligned RAS with one spacing for the whole cohort: `Orientationd("RAS")`, then
`Spacingd(..., diagonal=True)`, which also rotates oblique scans to the world axes. With thick slices it is along each
scan's own axes. `to_grid` resamples results back
to the stored grid by their affines, independently of the steps in between.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    CropForegroundd,
    DeleteItemsd,
    EnsureTyped,
    KeepLargestConnectedComponent,
    MapTransform,
    Orientationd,
    Pad,
    RandAffined,
    RandFlipd,
    Randomizable,
    Spacingd,
    SpatialCrop,
)
from monai.utils import CommonKeys as Keys
from scipy.ndimage import gaussian_filter

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.grids import SLAB, Spacing, frame_of, in_plane, is_isotropic
from semisam_o1.data.intensities import HAS_DATA, INTENSITIES, NormaliseDatad
from semisam_o1.data.no_data import no_data
from semisam_o1.data.reader import LoadScand, ScanReader
from semisam_o1.data.turns import LowestOutsided, Turnd, turn_of
from semisam_o1.types import UserError, Volume

ONE_COMPONENT = 0.95  # least share of a class in its largest component; the field of view may cut off e.g. veins


class AntiAliasd(MapTransform):
    """Gaussian smoothing before resampling to ``spacing`` mm, along the axes where that is coarser than the scan.

    The standard deviation is (ratio - 1)/2 voxels along an axis, as in scikit-image; other axes are not smoothed.
    """

    def __init__(self, keys: KeysCollection, spacing: float | Sequence[float], allow_missing_keys: bool = False):
        super().__init__(keys, allow_missing_keys)
        self.spacing = np.broadcast_to(spacing, 3)

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        data = dict(data)
        for key in self.key_iterator(data):
            stored = np.linalg.norm(np.asarray(data[key].affine)[:3, :3], axis=0)
            sigma = np.maximum(0, (self.spacing / stored - 1) / 2)
            if sigma.max() > 0.05:  # less has no visible effect
                smooth = gaussian_filter(data[key].numpy(), (0, *sigma), mode="nearest", truncate=3)
                volume = data[key]
                data[key] = MetaTensor(
                    torch.from_numpy(smooth), meta=volume.meta, applied_operations=volume.applied_operations
                )
        return data


class SpacingAloned(Spacingd):
    """MONAI's `Spacingd`, applied to an item that contains only its keys.

    `Spacingd` treats other entries that start with a key as metadata, so MONAI Label's text ``image_path`` would be an
    error.
    """

    def __call__(self, data: Mapping[Hashable, Volume], lazy: bool | None = None) -> dict:
        return dict(data) | super().__call__({key: data[key] for key in self.key_iterator(data)}, lazy)


def image_chain(
    spacing: float | Sequence[float] | None,
    reader: ScanReader | None = None,
    intensities: str | None = "percentiles",
    frame: str | None = None,
    window: Sequence[float] | None = None,
    find_no_data: bool = True,
    keep_mask: bool = False,
) -> Compose:
    """``image`` from its file to the working space: (1, H, W, D), RAS, ``spacing`` mm.

    Intensities are normalised on the stored voxels, before resampling, so orientation and obliqueness do not affect
    them. ``intensities`` "percentiles" clips to the 1st and 99.5th percentile and z-normalises; "foreground"
    z-normalises by the voxels above zero (as in the training of SAM-Med3D); None changes nothing. ``spacing`` None
    keeps the stored grid, as published. ``frame`` "world" resamples oblique scans along the world axes; "stored" keeps
    their own axes in the order nearest to RAS, for scans where the patient's pose follows the stored axes. A frame of
    `turns.frame_of` turns the content; the affine is then that of the turned world, and the image is cropped to the box
    of the voxels with data, of which all others get the lowest value. None is
    "stored" for a spacing of three numbers, which is for thick slices, and else "world".

    Args:
        window: lowest and highest intensity to clip to, e.g. in Hounsfield units, instead of percentiles.
        find_no_data: crop to the box of the voxels with data, normalise by these, and give the others the lowest
            value, see `no_data`.
        keep_mask: keep the mask of the voxels with data, (1, H, W, D), as ``has_data``.
    """
    if intensities not in INTENSITIES:
        raise ValueError(f"intensities '{intensities}': expected one of {', '.join(map(str, INTENSITIES))}.")
    if window is not None and not window[0] < window[1]:
        raise UserError(f"window is {list(window)}: expected the lowest intensity first, then the highest.")
    steps: list = [LoadScand(Keys.IMAGE, reader)]
    if find_no_data:
        crop = CropForegroundd(
            [Keys.IMAGE, HAS_DATA], HAS_DATA, start_coord_key=None, end_coord_key=None, allow_missing_keys=True
        )
        steps += [FindDatad(Keys.IMAGE), crop]
    steps.append(NormaliseDatad(Keys.IMAGE, intensities, None if window is None else (window[0], window[1])))
    if (turn := turn_of(frame)) is not None and spacing is not None:
        steps += [Turnd(Keys.IMAGE, turn), *_resampling(Keys.IMAGE, spacing, "world")]
        steps += _resampling(HAS_DATA, spacing, "world", "nearest", "zeros")
        box = CropForegroundd([Keys.IMAGE, HAS_DATA], HAS_DATA, start_coord_key=None, end_coord_key=None)
        steps += [box, LowestOutsided(Keys.IMAGE)]
        return Compose(steps if keep_mask else [*steps, DeleteItemsd(HAS_DATA)])
    if find_no_data and not keep_mask:
        steps.append(DeleteItemsd(HAS_DATA))
    steps += _resampling(Keys.IMAGE, spacing, frame)
    if find_no_data and keep_mask:
        steps += _resampling(HAS_DATA, spacing, frame, "nearest")
    return Compose(steps)


class FindDatad(MapTransform):
    """Adds the mask of the voxels with data, ``has_data``, of the one image of ``keys``: (1, H, W, D), 1 or 0."""

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        data = dict(data)
        for key in self.key_iterator(data):
            lacking = no_data(data[key][0].numpy())
            held = np.ones(data[key].shape[1:], np.uint8) if lacking is None else (~lacking).astype(np.uint8)
            data[HAS_DATA] = MetaTensor(torch.from_numpy(held)[None], meta=dict(data[key].meta))
        return data


class LoadLabeld(MapTransform):
    """Loads the label of an item's ``case``: (1, H, W, D), the channel of each voxel's class, where the scan has data.

    It is on the scan's grid, cropped to `Cohort.data_box` as the image is.
    """

    def __init__(self, keys: KeysCollection, cohort: Cohort):
        super().__init__(keys)
        self.cohort = cohort

    def __call__(self, data: Mapping[Hashable, str]) -> dict:
        case = self.cohort.case(data["case"])
        crop = SpatialCrop(roi_slices=self.cohort.data_box(case))
        volumes = {key: crop(self.cohort.label_volume(case, Path(data[key]))) for key in self.key_iterator(data)}
        return dict(data) | volumes


class FractionalLabeld(MapTransform):
    """A label of channel numbers (1, H, W, D) as one volume a class, resampled: (num_classes, h, w, d).

    So many classes at a time are on the stored grid that they have at most `SLAB` values there.

    Args:
        resample: a chain that changes each channel alone.
    """

    def __init__(self, keys: KeysCollection, num_classes: int, resample: Compose):
        super().__init__(keys)
        self.num_classes, self.resample = num_classes, resample

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        data = dict(data)
        for key in self.key_iterator(data):
            label, parts = data[key], []
            values = label.as_tensor()
            for numbers in torch.arange(self.num_classes).split(max(1, SLAB // values.numel())):
                masks = (values == numbers[:, None, None, None]).float()
                found = MetaTensor(masks, meta=dict(label.meta), applied_operations=list(label.applied_operations))
                parts.append(self.resample({key: found})[key])
            data[key] = parts[0]
            if len(parts) > 1:
                data[key] = MetaTensor(torch.cat([part.as_tensor() for part in parts]), meta=parts[0].meta)
        return data


def label_chain(spacing: float | Sequence[float] | None, cohort: Cohort) -> Compose:
    """``label`` from its file to fractional labels in the working space: (num_classes, H, W, D), summing to 1."""
    resample = Compose(_resampling(Keys.LABEL, spacing))
    return Compose([LoadLabeld(Keys.LABEL, cohort), FractionalLabeld(Keys.LABEL, cohort.num_classes, resample)])


def _resampling(
    key: str,
    spacing: float | Sequence[float] | None,
    frame: str | None = None,
    mode: str = "bilinear",
    padding_mode: str = "border",
) -> list:
    if spacing is None:
        return [EnsureTyped(key, dtype=torch.float32)]
    frame = frame or frame_of(spacing)
    spacing = [float(s) for s in np.broadcast_to(spacing, 3)]
    return [
        Orientationd(key, axcodes="RAS", labels=None),
        *([AntiAliasd(key, spacing)] if mode == "bilinear" else []),
        SpacingAloned(key, pixdim=spacing, diagonal=frame == "world", mode=mode, padding_mode=padding_mode),
        EnsureTyped(key, dtype=torch.float32),
    ]


class PublishedPadd(MapTransform):
    """Zero padding on both sides of every axis of (C, H, W, D), as in the published code before its crop.

    If any side s is at most the patch's side p, every axis is padded by max((p - s) div 2 + 3, 0) on each side.
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


class PublishedRandCropd(Randomizable, MapTransform):
    """A random patch of (C, H, W, D), cropped as in the published code, which never draws the last position of an axis.

    For a side n and a patch side P, the corner is uniform on 0 ... n - P - 1; it is 0 if n = P.
    """

    def __init__(self, keys: KeysCollection, patch_size: Sequence[int]):
        super().__init__(keys)
        self.patch_size = tuple(int(n) for n in patch_size)

    def __call__(self, data: Mapping[Hashable, Volume]) -> dict:
        data = dict(data)
        sides = data[self.first_key(data)].shape[1:]
        starts = [int(self.R.randint(0, max(n - p, 1))) for n, p in zip(sides, self.patch_size)]
        crop = SpatialCrop(roi_start=starts, roi_end=[s + p for s, p in zip(starts, self.patch_size)])
        return data | {key: crop(data[key]) for key in self.key_iterator(data)}


def random_poses(
    keys: KeysCollection,
    spacing: Spacing | None = None,
    prob: float = 0.8,
    turn: float = 0.3,
    shear: float = 0.05,
    scale: float = 0.2,
    shift: float = 5,
    mode: Sequence[str] = ("bilinear", "nearest"),
) -> RandAffined:
    """`RandAffined` of patches with voxels of ``spacing`` mm along R, A, S: rotated, sheared, scaled and shifted.

    MONAI rotates and shears voxel indices. With thick slices (`in_plane`) that would be another change in mm, and a
    turn out of the plane would mix slices that lie far apart. Patches are then rotated and sheared in the plane alone,
    as in nnU-Net.

    Args:
        turn: largest rotation about each axis, radians. shear: largest factor.
        scale: largest change of size along each axis, as a share.
        shift: largest shift in voxels; along an axis with coarser voxels, as many mm as along the finest.
    """
    about, sizes = in_plane(spacing), np.ones(3) if is_isotropic(spacing) else np.asarray(spacing, float)
    pairs = [(row, column) for row in range(3) for column in range(3) if row != column]  # in MONAI's order
    return RandAffined(
        keys,
        prob=prob,
        rotate_range=[turn * inside for inside in about],
        shear_range=[shear * about[3 - row - column] for row, column in pairs],
        scale_range=[scale] * 3,
        translate_range=[float(shift * sizes.min() / size) for size in sizes],
        mode=list(mode),
        padding_mode="border",
    )


def random_flips(keys: KeysCollection, axes: Sequence[int], prob: float = 0.5) -> Compose:
    """`RandFlipd` along each of ``axes``, independently."""
    return Compose([RandFlipd(keys, prob=prob, spatial_axis=axis) for axis in axes])


def chain(parts: Sequence[Compose | Sequence]) -> Compose:
    """Several chains as one flat `Compose`, so that `CacheDataset` can cache its deterministic start."""
    return Compose([step for part in parts for step in (part.transforms if isinstance(part, Compose) else part)])


def keep_largest(label: Volume, classes: Sequence[int]) -> Volume:
    """``label`` (1, H, W, D) reduced to the largest component of each of ``classes``; the rest becomes background."""
    keep = KeepLargestConnectedComponent(list(classes), is_onehot=False)
    return keep(label.clone()) if len(classes) else label  # MONAI's transform works in place


def template_components(cohort: Cohort) -> list[int]:
    """The class numbers that `largest_component_classes` finds in the templates' labels."""
    labels = [cohort.label(case)[None] for case in cohort.templates]
    return [cohort.class_numbers[n] for n in largest_component_classes(labels, cohort.num_classes)]


def largest_component_classes(labels: Sequence[Volume], num_classes: int) -> list[int]:
    """The foreground classes that have one component in each of ``labels`` (1, H, W, D) with them, and occur in one."""
    found = []
    for number in range(1, num_classes):
        present = [label for label in labels if (label == number).any()]
        shares = [float((keep_largest(la, [number]) == number).sum() / (la == number).sum()) for la in present]
        if shares and min(shares) >= ONE_COMPONENT:
            found.append(number)
    return found
