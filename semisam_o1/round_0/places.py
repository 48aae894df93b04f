"""Places in token grids, what their descriptors are there, and affine maps between them.

Pure functions. Positions are RAS mm from the middle of each token grid, so neither the origin nor the field of view
matters.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from semisam_o1.types import Affine, Tokens

CHANNELS = 16  # principal components of the descriptors: a third of the time, almost the same labels
POOLED_VOXELS = 6000  # enough to compare starts, few enough to test hundreds per second
PARTS = 4  # of the points, sampled in parallel


class AffineMap(NamedTuple):
    """Scan position (mm, centred) -> template position (mm, centred): ``matrix`` (3, 3) x + ``shift`` (3,)."""

    matrix: torch.Tensor
    shift: torch.Tensor

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        """(..., 3) -> (..., 3)."""
        return points @ self.matrix.T + self.shift

    def then_back(self, other: AffineMap) -> AffineMap:
        """This map followed by the inverse of ``other``: from one scan to another through their common template."""
        back = other.inverse()
        return AffineMap(back.matrix @ self.matrix, back(self.shift))

    def inverse(self) -> AffineMap:
        """Template position -> scan position."""
        back = torch.linalg.inv(self.matrix)
        return AffineMap(back, -back @ self.shift)


def centred_points(shape, step_mm) -> torch.Tensor:
    """A grid's points in mm from its middle: (H, W, D, 3) for ``shape`` (H, W, D); ``step_mm``: one number or three."""
    steps = np.broadcast_to(step_mm, 3)
    axes = [(torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * float(s) for n, s in zip(shape, steps)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def sample(volume: torch.Tensor, points: torch.Tensor, step_mm, padding: str = "border") -> torch.Tensor:
    """``volume`` (C, h, w, d) at centred ``points`` (..., 3) in mm, trilinear: (C, ...)."""
    half = (torch.tensor(volume.shape[1:], dtype=torch.float32) - 1) / 2 * torch.as_tensor(step_mm, dtype=torch.float32)
    where = (points / half.clamp(min=1e-6)).flip(-1).reshape(-1, 3)
    part = -(-len(where) // PARTS)  # grid_sample is parallel over a batch, not over the points of one volume
    parts = F.pad(where, (0, 0, 0, part * PARTS - len(where))).reshape(PARTS, part, 1, 1, 3)
    volumes = volume[None].expand(PARTS, *volume.shape)
    found = F.grid_sample(volumes, parts, padding_mode=padding, align_corners=True)
    return found.transpose(0, 1).reshape(len(volume), -1)[:, : len(where)].reshape(-1, *points.shape[:-1])


def in_grid(shape, points: torch.Tensor, step_mm: float) -> torch.Tensor:
    """Whether centred ``points`` (..., 3) in mm lie in the field of view of a grid of ``shape`` (H, W, D): (...)."""
    return (points.abs() <= torch.tensor(shape) / 2 * step_mm).all(-1)


def rotation(vector: torch.Tensor | np.ndarray) -> torch.Tensor:
    """The rotation matrix (3, 3) of a rotation vector (3,), radians."""
    x, y, z = (float(v) for v in vector)
    return torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]]))


def frame_rotation(affine: Affine) -> torch.Tensor:
    """The rotation (3, 3) of a scan's stored axes relative to the nearest RAS axes.

    Identity if they are parallel to these, and if two stored axes are nearest to the same RAS axis.
    """
    directions = np.asarray(affine, float)[:3, :3] / np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0)
    order = np.argmax(np.abs(directions), axis=0)
    if sorted(order) != [0, 1, 2]:
        return torch.eye(3)
    upright = np.zeros((3, 3))
    upright[:, order] = directions * np.sign(directions[order, range(3)])
    u, _, v = np.linalg.svd(upright)
    return torch.tensor(u @ v, dtype=torch.float32)


def turn_between(scan: Affine, template: Affine) -> torch.Tensor:
    """The rotation (3, 3) from scan to template positions if both have the same pose in their stored axes."""
    return frame_rotation(template) @ frame_rotation(scan).T


def is_turned(turn: torch.Tensor) -> bool:
    """Whether a rotation (3, 3) is larger than about one degree."""
    return not torch.allclose(turn, torch.eye(3), atol=0.02)


def pooled(tokens: Tokens, factor: int) -> Tokens:
    """Mean over cubes of ``factor`` tokens per side, with the same middle: (C, H, W, D) -> (C, H/f, W/f, D/f).

    One token is left of an axis with fewer than ``factor``.
    """
    if factor == 1:
        return tokens
    for axis, n in enumerate(tokens.shape[1:], start=1):
        if n < factor:
            tokens = tokens.mean(axis, keepdim=True).repeat_interleave(factor, axis)
        elif n % factor % 2:  # no crop has the same middle: the mean of neighbours has, with one token less
            tokens = (tokens.narrow(axis, 0, n - 1) + tokens.narrow(axis, 1, n - 1)) / 2
    crop = [((n % factor) // 2, n // factor * factor) for n in tokens.shape[1:]]
    (x, h), (y, w), (z, d) = crop
    return F.avg_pool3d(tokens[:, x : x + h, y : y + w, z : z + d], factor)


class Basis(NamedTuple):
    """A linear projection of descriptors: ``rows`` (C', C) times (tokens - ``mean`` (C, 1))."""

    rows: torch.Tensor
    mean: torch.Tensor

    def __call__(self, tokens: Tokens) -> Tokens:
        """(C, H, W, D) -> (C', H, W, D)."""
        return (self.rows @ (tokens.flatten(1) - self.mean)).reshape(len(self.rows), *tokens.shape[1:])


def principal(template: Tokens, channels: int) -> Basis:
    """The first ``channels`` principal components of the template's tokens; they nearly preserve distances."""
    flat = template.flatten(1)
    mean = flat.mean(1, keepdim=True)
    if len(template) <= channels:
        return Basis(torch.eye(len(template)), mean)
    _, vectors = torch.linalg.eigh((flat - mean) @ (flat - mean).T)
    return Basis(vectors[:, -channels:].T.contiguous(), mean)


def coarse(tokens: Tokens, like: Tokens) -> tuple[Tokens, int]:
    """``tokens`` pooled by the factor that leaves about 6,000 tokens of ``like``, and that factor."""
    factor = max(1, round((like[0].numel() / POOLED_VOXELS) ** (1 / 3)))
    return pooled(tokens, factor), factor
