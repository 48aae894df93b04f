"""Smooth volumes and known maps between them."""

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from semisam_o1.round_0.places import AffineMap, centred_points

STEP = 2.0
SIDES = (18, 17, 16)
IDENTITY = AffineMap(torch.eye(3), torch.zeros(3))


def smooth_volume(seed, shape=SIDES, channels=3, sigma=2.0):
    """(C, H, W, D) float32 of unit variance that varies over some ``sigma`` tokens."""
    noise = np.random.default_rng(seed).standard_normal((channels, *shape))
    smooth = np.stack([gaussian_filter(channel, sigma) for channel in noise])
    return torch.tensor(smooth / smooth.std((1, 2, 3), keepdims=True), dtype=torch.float32)


def seen_at(volume, points):
    """``volume`` at centred mm positions (H, W, D, 3) by scipy's linear interpolation, borders continued."""
    index = points / STEP + (np.array(volume.shape[1:]) - 1) / 2
    index = np.moveaxis(np.asarray(index, float), -1, 0)
    return torch.tensor(
        np.stack([map_coordinates(channel.numpy(), index, order=1, mode="nearest") for channel in volume])
    )


def known_map(degrees, scale=1.08, shift=(3.0, -2.5, 1.5)):
    turn = Rotation.from_rotvec(np.deg2rad(degrees) * np.array([1, 2, 2]) / 3).as_matrix()
    return AffineMap(torch.tensor(scale * turn, dtype=torch.float32), torch.tensor(shift))


def furthest_in_the_middle(found, truth):
    """The largest distance (mm) between two maps over the middle half of the grid."""
    points = centred_points(SIDES, STEP / 2)
    return float((found(points) - truth(points)).norm(dim=-1).max())
