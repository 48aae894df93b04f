"""In which pose a scan lies relative to the template, which no header tells: turned by any angle, or mirrored.

Pure functions on coarse images. A set of turns that covers all rotations is compared by channels that a turn leaves as
they are, so the image is never turned. The best turns are for `first_pass` to try.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from semisam_o1.encoders.mind_descriptors import box_mean, mind_ssc
from semisam_o1.round_0.alignment import strain
from semisam_o1.round_0.places import POOLED_VOXELS, centred_points, pooled, sample
from semisam_o1.types import Tokens

COARSE_VOXELS = 8 * POOLED_VOXELS  # of the template's coarse image; descriptors are pooled by 2 once more
LEAST_VOXELS = POOLED_VOXELS  # of a template; in fewer, all rotations look alike
TURNS = 600  # that cover all rotations, some 25 degrees apart, besides the 24 right-angled ones
AT_ONCE = 64  # turns evaluated per batch
SOME, MORE, MOST = 600, 1500, 4000  # places of the scan that a pose is compared at: first, then refined, then judged
OUTSIDE = 1.0  # cost of a place outside of the template; unlike places differ by 2, in variances of the template
STRAIN = 0.3  # weight of |A^T A - 1|^2; a scale of 1.1 costs 0.04
QUICK = 40, 40, 0.03  # poses refined, steps and learning rate of Adam
CAREFUL = 8, 60, 0.015
APART = 20  # degrees between poses that count as two; smaller turns are found by any alignment
SQUARE, NEAR = 15, 35  # degrees between a turn and a right-angled one
PROMISING = 0.97  # of the cost without a turn; a turn that costs more is not tried
LIKE = 1.2  # times the cost of the best pose; a turn that costs more is not tried
MOST_TRIED = 3  # turns, besides the right-angled ones near them
MIRRORED = 0.85  # of the cost of the best turn; a mirrored pose that costs less fits clearly better
MIRROR = np.diag([-1.0, 1.0, 1.0])


class Coarse(NamedTuple):
    """A coarse image: ``image`` and ``has_data``, the mask of its data, (1, H, W, D) each, ``step_mm`` mm apart."""

    image: torch.Tensor
    has_data: torch.Tensor
    step_mm: float


class Poses(NamedTuple):
    """``turns`` (3, 3) to try, from the scan's pose to the template's, best first; none if it fits best as it lies.

    ``mirrored``: the cost of the best mirrored pose relative to that of the best turn. ``others``: turns in which it
    fits about as well, to try if its label does not come back to the template.
    """

    turns: list[np.ndarray]
    mirrored: float
    others: Sequence[np.ndarray] = ()


class Pose(NamedTuple):
    """``turn`` (3, 3), the rotation nearest to an affine map from scan to template, and the ``cost`` of that map."""

    turn: np.ndarray
    cost: float


def coarse_factor(template: torch.Tensor) -> int:
    """How many voxels of a template (1, H, W, D) a coarse voxel has per side."""
    return max(1, round((template.numel() / COARSE_VOXELS) ** (1 / 3)))


def coarse_image(image: torch.Tensor, has_data: torch.Tensor, step_mm: float, factor: int) -> Coarse:
    """A coarse copy of ``image`` with the mask ``has_data``, (1, H, W, D) each; empty voxels get the lowest value."""
    factor = min(factor, *image.shape[1:])
    share = pooled(has_data.float(), factor)
    mean = pooled(image * has_data, factor) / share.clamp(min=1e-3)
    return Coarse(torch.where(share > 0.5, mean, image.min()), share > 0.5, step_mm * factor)


def search(template: Coarse, scan: Coarse) -> Poses:
    """The turns to try for a scan, and how well a mirrored pose fits."""
    found = sorted(poses(template, scan), key=lambda pose: pose.cost)
    mirrored = min(pose.cost for pose in poses(template, scan, mirrored=True)) / max(found[0].cost, 1e-6)
    small = [pose.cost for pose in found if angle(pose.turn, np.eye(3)) < APART]
    limit = min([PROMISING * cost for cost in small] + [LIKE * found[0].cost])
    apart: list[Pose] = []
    for pose in found:
        turns = [np.eye(3), *(one.turn for one in apart)]
        if pose.cost < LIKE * found[0].cost and all(angle(pose.turn, turn) >= APART for turn in turns):
            apart.append(pose)
    best, rest = ([pose.turn for pose in apart if (pose.cost < limit) == good][:MOST_TRIED] for good in (True, False))
    return Poses(with_right_angles(best), mirrored, with_right_angles(rest))


def poses(template: Coarse, scan: Coarse, mirrored: bool = False) -> list[Pose]:
    """The best poses of a scan, or of its mirror image: the first began without a turn, the others lie `APART`.

    All turns of `covering` are compared with the middles of the data on each other, the best are refined with Adam, and
    of these again the best.
    """
    moving, fixed = alike(template), alike(scan)
    mean, deviation = moving.flatten(1).mean(1), moving.flatten(1).std(1).clamp(min=1e-4)
    moving, fixed = ((one - mean[:, None, None, None]) / deviation[:, None, None, None] for one in (moving, fixed))
    step = 2 * template.step_mm
    inside_of = pooled(template.has_data.float(), 2)
    moving = torch.cat([moving, inside_of])
    points = centred_points(fixed.shape[1:], step).reshape(-1, 3)
    held = (pooled(scan.has_data.float(), 2) > 0.5).flatten().nonzero()[:, 0]
    held = held[torch.randperm(len(held), generator=torch.Generator().manual_seed(0))]
    if mirrored:
        points = points * torch.tensor(np.diag(MIRROR), dtype=torch.float32)
    half = (torch.tensor(moving.shape[1:], dtype=torch.float32) - 1) / 2 * step

    def costs(matrices: torch.Tensor, shifts: torch.Tensor, count: int) -> torch.Tensor:
        chosen = held[:count]
        where = points[chosen] @ matrices.transpose(1, 2) + shifts[:, None]
        found = sample(moving, where, step)
        inside = (where.abs() <= half + 1e-3).all(-1) * found[-1]
        error = (found[:-1] - fixed.flatten(1)[:, None, chosen]).square().mean(0)
        mismatch = (error * inside).sum(1) / inside.sum(1).clamp(min=1)
        return mismatch + OUTSIDE * (1 - inside.mean(1)) + STRAIN * strain(matrices)

    def refined(matrices: torch.Tensor, shifts: torch.Tensor, count: int, effort: tuple) -> tuple[torch.Tensor, ...]:
        matrices, shifts = (part.detach().clone().requires_grad_() for part in (matrices, shifts))
        groups = [{"params": [matrices], "lr": effort[2]}, {"params": [shifts], "lr": 0.3 * step}]
        optimiser = torch.optim.Adam(groups)
        with torch.enable_grad():
            for _ in range(effort[1]):
                optimiser.zero_grad()
                costs(matrices, shifts, count).sum().backward()
                optimiser.step()
        return matrices.detach(), shifts.detach()

    matrices = torch.tensor(covering(), dtype=torch.float32)
    target = centred_points(inside_of.shape[1:], step).reshape(-1, 3)[inside_of.flatten() > 0.5].mean(0)
    shifts = target - matrices @ points[held].mean(0)
    with torch.no_grad():
        plain = torch.cat([costs(*part, SOME) for part in zip(matrices.split(AT_ONCE), shifts.split(AT_ONCE))])
    first = [0, *(number for number in plain.argsort(stable=True)[: QUICK[0]].tolist() if number)]
    matrices, shifts = refined(matrices[first], shifts[first], SOME, QUICK)
    with torch.no_grad():
        values = costs(matrices, shifts, MORE)
    turns = [nearest_turn(matrix.numpy()) for matrix in matrices]
    kept = [0]
    for number in values.argsort(stable=True).tolist():
        if len(kept) <= CAREFUL[0] and all(angle(turns[number], turns[other]) >= APART for other in kept):
            kept.append(number)
    matrices, shifts = refined(matrices[kept], shifts[kept], MORE, CAREFUL)
    with torch.no_grad():
        values = torch.where(torch.linalg.det(matrices) > 0, costs(matrices, shifts, MOST), torch.inf)
    return [Pose(nearest_turn(matrix.numpy()), float(value)) for matrix, value in zip(matrices, values)]


def alike(scan: Coarse) -> Tokens:
    """Channels that a turn leaves as they are, but for the cubes of their boxes: (9, H/2, W/2, D/2).

    Mean and deviation at several sizes, and the mean of each descriptor of MIND-SSC over its pairs.
    """
    volume = scan.image[None]
    parts = [volume]
    for size in (3, 7):
        mean = box_mean(volume, size)
        parts += [mean, (box_mean(volume * volume, size) - mean * mean).clamp(min=0).sqrt()]
    parts += [2 * mind_ssc(volume, dilation).mean(1, keepdim=True) for dilation in (1, 2)]
    return pooled(torch.cat(parts, 1)[0], 2)


def covering() -> np.ndarray:
    """Turns (N, 3, 3) that no rotation is far from: none, the right-angled ones, and `TURNS` evenly spread ones.

    The even ones are a super-Fibonacci spiral (Alexa, CVPR 2022).
    """
    right = sorted(Rotation.create_group("O").as_matrix(), key=lambda matrix: -np.trace(matrix))
    number = np.arange(TURNS) + 0.5
    inner, outer = np.sqrt(number / TURNS), np.sqrt(1 - number / TURNS)
    one, other = 2 * np.pi * number / np.sqrt(2), 2 * np.pi * number / 1.533751168755204288118041
    spiral = np.stack([inner * np.sin(one), inner * np.cos(one), outer * np.sin(other), outer * np.cos(other)], 1)
    return np.concatenate([np.array(right), Rotation.from_quat(spiral).as_matrix()])


def with_right_angles(turns: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Turns (3, 3), each after the right-angled one that is less than `NEAR` from it, or replaced by it: `SQUARE`.

    Scans that lie turned mostly lie so by right angles, and vary a little as upright ones do. A right-angled turn
    leaves no empty corners.
    """
    found: list[np.ndarray] = []
    for turn in turns:
        right = min(Rotation.create_group("O").as_matrix(), key=lambda one: angle(one, turn))
        known = any(angle(right, other) < 1 for other in (np.eye(3), *found))
        if angle(right, turn) < NEAR and not known:
            found.append(right)
        if angle(right, turn) >= SQUARE:
            found.append(turn)
    return found


def nearest_turn(matrix: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) nearest to a matrix."""
    left, _, right = np.linalg.svd(matrix.astype(float))
    return left @ np.diag([1.0, 1.0, np.linalg.det(left @ right)]) @ right


def angle(one: np.ndarray, other: np.ndarray) -> float:
    """The angle between two rotations, degrees."""
    return float(np.degrees(np.arccos(np.clip((np.trace(one @ other.T) - 1) / 2, -1, 1))))
