"""Where a scan lies in the template: an affine map found from seeded starts, judged on descriptors (pure functions).

Positions are RAS mm from the middle of each token grid, so that neither origin nor field of view matters.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from semisam_o1.types import Affine, Tokens

POOLED_VOXELS = 6000  # enough to tell a good start from a bad one, few enough to try hundreds in a second
AT_ONCE = 32  # starts that are tried in one go,
TRIED = 5  # each on every fifth place
PARTS = 4  # of the points, sampled in parallel
OUTSIDE_COST = 0.15  # of a place that falls outside the template, beside a squared descriptor distance of 0.05 to 0.2


class AffineMap(NamedTuple):
    """Scan position (mm, centred) -> template position (mm, centred): ``matrix`` (3, 3) x + ``shift`` (3,)."""

    matrix: torch.Tensor
    shift: torch.Tensor

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        """(..., 3) -> (..., 3)."""
        return points @ self.matrix.T + self.shift

    def then_back(self, other: AffineMap) -> AffineMap:
        """By this map, then by ``other`` the other way: from one scan to another through the template of both."""
        back = torch.linalg.inv(other.matrix)
        return AffineMap(back @ self.matrix, back @ (self.shift - other.shift))


def centred_points(shape, step_mm) -> torch.Tensor:
    """The grid's points in mm from its middle: (H, W, D, 3) for ``shape`` (H, W, D), ``step_mm`` a number or three."""
    steps = np.broadcast_to(step_mm, 3)
    axes = [(torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * float(s) for n, s in zip(shape, steps)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def sample(volume: torch.Tensor, points: torch.Tensor, step_mm, padding: str = "border") -> torch.Tensor:
    """``volume`` (C, h, w, d) at centred ``points`` (..., 3) in mm, trilinear: (C, ...)."""
    half = (torch.tensor(volume.shape[1:], dtype=torch.float32) - 1) / 2 * torch.as_tensor(step_mm, dtype=torch.float32)
    where = (points / half.clamp(min=1e-6)).flip(-1).reshape(-1, 3)
    part = -(-len(where) // PARTS)  # grid_sample's threads share out a batch, never the points of one volume
    parts = F.pad(where, (0, 0, 0, part * PARTS - len(where))).reshape(PARTS, part, 1, 1, 3)
    volumes = volume[None].expand(PARTS, *volume.shape)
    found = F.grid_sample(volumes, parts, padding_mode=padding, align_corners=True)
    return found.transpose(0, 1).reshape(len(volume), -1)[:, : len(where)].reshape(-1, *points.shape[:-1])


def rotation(vector: torch.Tensor) -> torch.Tensor:
    """The rotation matrix (3, 3) of a rotation vector (3,), radians."""
    x, y, z = (float(v) for v in vector)
    return torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]]))


def frame_rotation(affine: Affine) -> torch.Tensor:
    """How a scan's stored axes are turned against the nearest RAS axes: a rotation matrix (3, 3).

    Identity where they stand upright, and where two of them are nearest to the same one.
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
    """The rotation (3, 3) from scan to template positions if both were stored in the same pose, whatever they say."""
    return frame_rotation(template) @ frame_rotation(scan).T


def is_turned(turn: torch.Tensor) -> bool:
    """Whether a rotation (3, 3) is one to speak of: more than about a degree."""
    return not torch.allclose(turn, torch.eye(3), atol=0.02)


def pooled(tokens: Tokens, factor: int) -> Tokens:
    """Mean over cubes of ``factor`` tokens a side, the grid's middle kept: (C, H, W, D) -> (C, H/f, W/f, D/f)."""
    if factor == 1:
        return tokens
    crop = [((n % factor) // 2, n // factor * factor) for n in tokens.shape[1:]]
    (x, h), (y, w), (z, d) = crop
    return F.avg_pool3d(tokens[:, x : x + h, y : y + w, z : z + d], factor)


class Basis(NamedTuple):
    """An affine change of descriptors: ``rows`` (C', C) of (tokens - ``mean`` (C, 1))."""

    rows: torch.Tensor
    mean: torch.Tensor

    def __call__(self, tokens: Tokens) -> Tokens:
        """(C, H, W, D) -> (C', H, W, D)."""
        return (self.rows @ (tokens.flatten(1) - self.mean)).reshape(len(self.rows), *tokens.shape[1:])


def principal(template: Tokens, channels: int) -> Basis:
    """The ``channels`` directions in which the template's tokens vary most; distances hardly change in them."""
    flat = template.flatten(1)
    mean = flat.mean(1, keepdim=True)
    if len(template) <= channels:
        return Basis(torch.eye(len(template)), mean)
    _, vectors = torch.linalg.eigh((flat - mean) @ (flat - mean).T)
    return Basis(vectors[:, -channels:].T.contiguous(), mean)


def coarse(tokens: Tokens, like: Tokens) -> tuple[Tokens, int]:
    """``tokens`` pooled by the factor that leaves about 6,000 places of ``like``, and the factor."""
    factor = max(1, round((like[0].numel() / POOLED_VOXELS) ** (1 / 3)))
    return pooled(tokens, factor), factor


def distances(moving: Tokens, fixed: Tokens, step_mm: float, matrices, shifts, every: int = 1) -> torch.Tensor:
    """Mean squared descriptor distance under each of N affine maps, and what falls outside: (N,).

    Args:
        moving, fixed: (C, H, W, D) each, on grids of ``step_mm`` mm.
        matrices, shifts: (N, 3, 3) and (N, 3) mm, from positions in ``fixed`` to positions in ``moving``.
        every: of so many places, look at one.
    """
    points = centred_points(fixed.shape[1:], step_mm).reshape(-1, 3)[::every]
    half = (torch.tensor(moving.shape[1:], dtype=torch.float32) - 1) / 2 * step_mm
    where = points @ matrices.transpose(1, 2) + shifts[:, None]
    inside = (where.abs() <= half + 1e-3).all(-1).float()
    error = (sample(moving, where, step_mm) - fixed.flatten(1)[:, None, ::every]).square().mean(0)
    return (error * inside).sum(1) / inside.sum(1).clamp(min=1) + OUTSIDE_COST * (1 - inside.mean(1))


def align(
    template: Tokens,
    scan: Tokens,
    step_mm: float,
    turn: torch.Tensor | None = None,
    starts: int = 320,
    refined: int = 4,
    iterations: int = 50,
    seed: int = 0,
) -> tuple[AffineMap, float]:
    """The affine map from scan to template with the smallest descriptor distance, and that distance.

    Every start is a turn (normal, 0.12 rad), a shift (normal, 6% of the template's extent) and a size (log-normal,
    0.1), tried on descriptors pooled to about 6,000 places; the best few are refined by Adam.

    Args:
        template, scan: (C, H, W, D) each, on grids of ``step_mm`` mm.
        turn: (3, 3); another pose to start from, see `turn_between`: the stored axes may tell more than the world's.
        starts, refined, iterations, seed: how many are drawn, kept, the steps for each, and the draw.
    """
    moving, factor = coarse(template, template)
    fixed, step = pooled(scan, factor), step_mm * factor
    half = (torch.tensor(moving.shape[1:], dtype=torch.float32) - 1) / 2 * step
    draw = np.random.RandomState(seed)
    turns = [torch.eye(3)] + ([turn] if turn is not None and is_turned(turn) else [])
    matrices, shifts = list(turns), [torch.zeros(3)] * len(turns)
    for index in range(starts):
        shifts.append(torch.tensor(draw.randn(3), dtype=torch.float32) * 0.12 * half)
        matrix = rotation(draw.randn(3) * 0.12) * float(np.exp(draw.randn() * 0.1))
        matrices.append(matrix @ turns[index % len(turns)])
    matrices, shifts = torch.stack(matrices), torch.stack(shifts)
    with torch.no_grad():
        pairs = zip(matrices.split(AT_ONCE), shifts.split(AT_ONCE))
        values = torch.cat([distances(moving, fixed, step, *pair, every=TRIED) for pair in pairs])
    best = values.argsort(stable=True)[:refined]
    matrices, shifts = (part[best].clone().requires_grad_() for part in (matrices, shifts))
    optimiser = torch.optim.Adam([{"params": [matrices], "lr": 0.01}, {"params": [shifts], "lr": 0.15 * step}])
    with torch.enable_grad():
        for _ in range(iterations):
            optimiser.zero_grad()
            distances(moving, fixed, step, matrices, shifts).sum().backward()
            optimiser.step()
    with torch.no_grad():
        values = distances(moving, fixed, step, matrices, shifts)
    best = int(values.argmin())
    return AffineMap(matrices[best].detach(), shifts[best].detach()), float(values[best])


def smoothed(field: torch.Tensor) -> torch.Tensor:
    """Two passes of a 3-cubed mean, borders replicated: (1, 3, H, W, D) -> the same, close to a cubic B-spline."""
    return F.avg_pool3d(F.avg_pool3d(F.pad(field, (2,) * 6, mode="replicate"), 3, 1), 3, 1)


def deform(
    template: Tokens,
    scan: Tokens,
    step_mm: float,
    to_template: AffineMap,
    iterations: tuple[int, ...] = (40, 40, 30),
    stiffness: float = 0.1,
) -> tuple[torch.Tensor, float]:
    """A smooth displacement on top of ``to_template`` that lowers the descriptor distance further, and that distance.

    Coarse to fine on pooled descriptors, a control point every second place; minimised by Adam:
    mean (template(A x + u(x)) - scan(x))^2 + stiffness x mean |grad u|^2, u counted in tokens.

    Args:
        template, scan: (C, H, W, D) each, on grids of ``step_mm`` mm.
        iterations, stiffness: Adam's steps at each level, the coarsest first; what a strain costs.

    Returns:
        (H, W, D, 3) mm for every token of the scan, and the mean squared descriptor distance reached.
    """
    fine = 2 if template[0].numel() > 20 * POOLED_VOXELS else 1
    field, value = torch.zeros(1, 3, 1, 1, 1), 0.0
    for level, steps in enumerate(iterations, start=1):
        factor = fine * 2 ** (len(iterations) - level)
        moving, fixed, step = pooled(template, factor), pooled(scan, factor), step_mm * factor
        points = to_template(centred_points(fixed.shape[1:], step))
        shape = [max(2, n // 2 + 1) for n in fixed.shape[1:]]
        control = F.interpolate(field, shape, mode="trilinear", align_corners=True).clone().requires_grad_()
        optimiser = torch.optim.Adam([control], lr=0.3)
        with torch.enable_grad():
            for _ in range(steps):
                optimiser.zero_grad()
                moved = F.interpolate(smoothed(control), fixed.shape[1:], mode="trilinear", align_corners=True)
                where = points + moved[0].permute(1, 2, 3, 0) * step_mm
                distance = (sample(moving, where, step) - fixed).square().mean()
                strain = sum((moved.diff(dim=axis) / factor).square().mean() for axis in (2, 3, 4))
                (distance + stiffness * strain).backward()
                optimiser.step()
        field, value = smoothed(control.detach()), float(distance.detach())
    dense = F.interpolate(field, scan.shape[1:], mode="trilinear", align_corners=True)
    return dense[0].permute(1, 2, 3, 0) * step_mm, value
