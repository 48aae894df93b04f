"""Where a scan lies in the template: an affine map found from seeded starts, judged on descriptors (pure functions).

Positions are RAS mm from the middle of each token grid, so that neither origin nor field of view matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from semisam_o1.types import Affine, Tokens

CHANNELS = 16  # of the descriptors, by principal components: a third of the time, labels hardly change
POOLED_VOXELS = 6000  # enough to tell a good start from a bad one, few enough to try hundreds in a second
STRAIN_COSTS = (0.0, 0.1)  # of |A^T A - 1|^2, one for each half of those refined; a size of 1.1 costs 0.013
ALIKE = 0.1  # of the extent: maps of which no corner lies further apart are one
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
        back = other.inverse()
        return AffineMap(back.matrix @ self.matrix, back(self.shift))

    def inverse(self) -> AffineMap:
        """Template position -> scan position."""
        back = torch.linalg.inv(self.matrix)
        return AffineMap(back, -back @ self.shift)


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


def distances(
    moving: Tokens, fixed: Tokens, step_mm: float, matrices, shifts, every: int = 1, strain_cost=0.0
) -> torch.Tensor:
    """Mean squared descriptor distance under each of N affine maps, what falls outside, and their strain: (N,).

    Args:
        moving, fixed: (C, H, W, D) each, on grids of ``step_mm`` mm.
        matrices, shifts: (N, 3, 3) and (N, 3) mm, from positions in ``fixed`` to positions in ``moving``.
        every: of so many places, look at one. strain_cost: of |A^T A - 1|^2, one number or (N,).
    """
    points = centred_points(fixed.shape[1:], step_mm).reshape(-1, 3)[::every]
    half = (torch.tensor(moving.shape[1:], dtype=torch.float32) - 1) / 2 * step_mm
    where = points @ matrices.transpose(1, 2) + shifts[:, None]
    inside = (where.abs() <= half + 1e-3).all(-1).float()
    error = (sample(moving, where, step_mm) - fixed.flatten(1)[:, None, ::every]).square().mean(0)
    mismatch = (error * inside).sum(1) / inside.sum(1).clamp(min=1)
    return mismatch + OUTSIDE_COST * (1 - inside.mean(1)) + strain_cost * strain(matrices)


def align(
    template: Tokens,
    scan: Tokens,
    step_mm: float,
    turn: torch.Tensor | None = None,
    starts: int = 320,
    refined: Sequence[tuple[int, int, int]] = ((12, 40, 3), (4, 20, 1)),
    seed: int = 0,
) -> list[tuple[AffineMap, float]]:
    """The affine maps from scan to template with small descriptor distance, and that distance; the smallest first.

    Every start is a turn (normal, 0.12 rad), a shift (normal, 6% of the template's extent) and a size (log-normal,
    0.1), tried on descriptors pooled to about 6,000 places; the best few are refined by Adam, and the best of those.
    Half of those are chosen and refined at a cost of strain, since a scan may shrink into a dull corner of the
    template, half without. Maps that hardly differ are given once: most often one to three are left.

    Args:
        template, scan: (C, H, W, D) each, on grids of ``step_mm`` mm.
        turn: (3, 3); another pose to start from, see `turn_between`: the stored axes may tell more than the world's.
        starts, seed: how many are drawn, and the draw.
        refined: (how many of the best are kept, Adam's steps for each, of so many places one is looked at), in turn.
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
        plain = torch.cat([distances(moving, fixed, step, *pair, every=TRIED) for pair in pairs])
    values = torch.stack([plain + cost * strain(matrices) for cost in STRAIN_COSTS])
    number = torch.arange(len(matrices)).expand_as(values)
    for kept, iterations, every in refined:
        best = values.argsort(dim=1, stable=True)[:, : kept // len(STRAIN_COSTS)]
        chosen = number.gather(1, best).flatten()
        costs = torch.tensor(STRAIN_COSTS).repeat_interleave(best.shape[1])
        matrices, shifts = (part.detach()[chosen].clone().requires_grad_() for part in (matrices, shifts))
        optimiser = torch.optim.Adam([{"params": [matrices], "lr": 0.01}, {"params": [shifts], "lr": 0.15 * step}])
        with torch.enable_grad():
            for _ in range(iterations):
                optimiser.zero_grad()
                distances(moving, fixed, step, matrices, shifts, every, costs).sum().backward()
                optimiser.step()
        with torch.no_grad():
            plain = distances(moving, fixed, step, matrices, shifts)
            values = (plain + costs * strain(matrices)).reshape(len(STRAIN_COSTS), -1)
        number = torch.arange(values.numel()).reshape(values.shape)
    found: list[tuple[AffineMap, float]] = []
    corners = centred_points((2, 2, 2), fixed.shape[1:] * np.array(step))
    for index in plain.argsort(stable=True):
        candidate = AffineMap(matrices[index].detach(), shifts[index].detach())
        apart = [((candidate(corners) - other(corners)).abs() / (2 * half)).max() for other, _ in found]
        if all(distance > ALIKE for distance in apart):
            found.append((candidate, float(plain[index])))
    return found


def strain(matrices: torch.Tensor) -> torch.Tensor:
    """|A^T A - 1|^2 of each: (N, 3, 3) -> (N,); 0 for a turn."""
    return (matrices.transpose(1, 2) @ matrices - torch.eye(3)).square().sum((1, 2))


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
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """A smooth displacement on top of ``to_template`` that lowers the descriptor distance further, and that distance.

    Coarse to fine on pooled descriptors, a control point every second place; minimised by Adam:
    mean w (template(A x + u(x)) - scan(x))^2 + stiffness x mean |grad u|^2, u counted in tokens.

    Args:
        template, scan: (C, H, W, D) each, on grids of ``step_mm`` mm.
        iterations, stiffness: Adam's steps at each level, the coarsest first, 0 to leave it out; what a strain costs.
        weight: (H', W', D') of the template's places, what a distance there counts; 1 everywhere if not given.

    Returns:
        (H, W, D, 3) mm for every token of the scan, and the mean squared descriptor distance reached, unweighted.
    """
    fine = 2 if template[0].numel() > 20 * POOLED_VOXELS else 1
    field, value = torch.zeros(1, 3, 1, 1, 1), 0.0
    for level, steps in enumerate(iterations, start=1):
        factor = min(fine * 2 ** (len(iterations) - level), *template.shape[1:], *scan.shape[1:])
        moving, fixed, step = pooled(template, factor), pooled(scan, factor), step_mm * factor
        points = to_template(centred_points(fixed.shape[1:], step))
        shape = [max(2, n // 2 + 1) for n in fixed.shape[1:]]
        control = F.interpolate(field, shape, mode="trilinear", align_corners=True).clone().requires_grad_()
        optimiser = torch.optim.Adam([control], lr=0.3)

        def moved_by(control: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            moved = F.interpolate(smoothed(control), fixed.shape[1:], mode="trilinear", align_corners=True)
            return moved, points + moved[0].permute(1, 2, 3, 0) * step_mm

        counts = torch.ones(1)
        if weight is not None:
            counts = sample(pooled(weight[None], factor), moved_by(control.detach())[1], step)[0]
        with torch.enable_grad():
            for _ in range(steps):
                optimiser.zero_grad()
                moved, where = moved_by(control)
                distance = (sample(moving, where, step) - fixed).square().mean(0)
                bent = sum((moved.diff(dim=axis) / factor).square().mean() for axis in (2, 3, 4))
                ((counts * distance).mean() + stiffness * bent).backward()
                optimiser.step()
        if steps:
            field, value = smoothed(control.detach()), float(distance.detach().mean())
    dense = F.interpolate(field, scan.shape[1:], mode="trilinear", align_corners=True)
    return dense[0].permute(1, 2, 3, 0) * step_mm, value


def register(
    template: Tokens,
    scan: Tokens,
    step_mm: float,
    turn: torch.Tensor | None = None,
    seed: int = 0,
    iterations: tuple[int, ...] = (40, 40, 30),
    stiffness: float = 0.1,
    weight: torch.Tensor | None = None,
) -> tuple[AffineMap, torch.Tensor, float]:
    """`align`, then `deform`: the affine map, the displacement on top (H, W, D, 3) mm, the distance left.

    Where `align` finds several maps, displacements on top of each, there and back, at coarse levels, tell which is
    right: a wrong one leaves more, or must bend more, most of all on the way back. For the arguments see there.
    """
    maps = [candidate for candidate, _ in align(template, scan, step_mm, turn, seed=seed)]
    if len(maps) > 1:
        early = (*iterations[:-1], 0)

        def cost(moving: Tokens, fixed: Tokens, place: AffineMap) -> float:
            trial, distance = deform(moving, fixed, step_mm, place, early, stiffness)
            bent = sum(trial.diff(dim=axis).square().mean() for axis in range(3)) / step_mm**2
            return distance + stiffness * float(bent)

        costs = [cost(template, scan, place) + cost(scan, template, place.inverse()) for place in maps]
        maps = [maps[int(np.argmin(costs))]]
    return maps[0], *deform(template, scan, step_mm, maps[0], iterations, stiffness, weight)
