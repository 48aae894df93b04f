"""Frames of features in which a scan's content is turned, because its header does not tell how it lies."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy.spatial.transform import Rotation

from semisam_o1.data.intensities import HAS_DATA
from semisam_o1.types import Affine

FOLDER = "turned"  # of the features in such frames
PREFIX = "turned by "


def frame_of(turn: np.ndarray) -> str:
    """The name of the frame of features turned by a rotation (3, 3): its rotation vector, degrees to R, A, S."""
    return PREFIX + " ".join(f"{value:.2f}" for value in Rotation.from_matrix(turn).as_rotvec(degrees=True))


def turn_of(frame: str | None) -> np.ndarray | None:
    """The rotation (3, 3) from the scan's pose to that of a frame; None for a frame of another kind."""
    if frame is None or not frame.startswith(PREFIX):
        return None
    vector = [float(value) for value in frame.removeprefix(PREFIX).split()]
    return Rotation.from_rotvec(vector, degrees=True).as_matrix()


def turned(affine: Affine, turn: np.ndarray) -> Affine:
    """The affine (4, 4) with the world turned by ``turn`` (3, 3) about its origin."""
    place = np.eye(4)
    place[:3, :3] = turn
    return place @ np.asarray(affine, float)


class Turnd(MapTransform):
    """Turns the world of ``keys``, (1, H, W, D) each, and of the mask ``has_data``; an item without gets one of ones.

    The voxels stay; a resampling along the world axes then turns the content by ``turn`` (3, 3).
    """

    def __init__(self, keys: KeysCollection, turn: np.ndarray):
        super().__init__(keys)
        self.turn = turn

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        data = dict(data)
        for key in self.key_iterator(data):
            affine = torch.as_tensor(turned(data[key].affine, self.turn))
            held = data[HAS_DATA].as_tensor() if HAS_DATA in data else torch.ones(data[key].shape, dtype=torch.uint8)
            data |= {HAS_DATA: MetaTensor(held, affine=affine), key: MetaTensor(data[key].as_tensor(), affine=affine)}
        return data


class LowestOutsided(MapTransform):
    """Gives the voxels of ``keys``, (1, H, W, D) each, outside of the mask ``has_data`` the lowest value of the others.

    A resampling of a turned scan repeats its border there.
    """

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        data = dict(data)
        held = data[HAS_DATA].as_tensor() > 0.5
        for key in self.key_iterator(data):
            volume = data[key].clone()
            volume[~held] = volume[held].min()
            data[key] = volume
        return data
