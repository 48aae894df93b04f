"""Registration of a scan to the template: an affine map from seeded random starts, then a displacement field.

Both minimise the descriptor distance. Pure functions. Positions are RAS mm from the middle of each token grid, so
neither the origin nor the field of view matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from semisam_o1.types import Affine, Tokens

CHANNELS = 16  # principal components of the descriptors: a third of the time, almost the same labels
POOLED_VOXELS = 6000  # enough to compare starts, few enough to test hundreds per second
STRAIN_COSTS = (0.0, 0.1)  # weights of |A^T A - 1|^2, one per half of the refined maps; a scale of 1.1 costs 0.013
ALIKE = 0.1  # of the extent; maps whose corners all differ by less are treated as equal
SIMILAR = 1.1  # times the cost of the best map; of those, the one that fits best near the label is selected
AT_ONCE = 32  # starts evaluated per batch
TRIED = 5  # a start is evaluated on every fifth point
PARTS = 4  # of the points, sampled in parallel
MARGIN = 4  # tokens around the part of a scan that is aligned at full resolution
LEAST_VOLUME = 0.4  # of a place, relative to what the affine map gives it, below which it costs
SQUEEZED_COST = 3.0  # weight of that cost, see `squeezed`
OUTSIDE_COST = 0.15  # of a point outside the template; squared descriptor distances are 0.05 to 0.2


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
    """Mean over cubes of ``factor`` tokens per side, with the same middle: (C, H, W, D) -> (C, H/f, W/f, D/f)."""
    if factor == 1:
        return tokens
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


def distances(
    moving: Tokens, fixed: Tokens, step_mm: float, matrices, shifts, every: int = 1, strain_cost=0.0
) -> torch.Tensor:
    """The cost of each of N affine maps: mean squared descriptor distance + costs of points outside and strain: (N,).

    Args:
        moving, fixed: (C, H, W, D) each, on grids of ``step_mm`` mm.
        matrices, shifts: (N, 3, 3) and (N, 3) mm, from positions in ``fixed`` to positions in ``moving``.
        every: n, to use every n-th point. strain_cost: weight of |A^T A - 1|^2, one number or (N,).
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
    """Find affine maps from scan to template with small descriptor distance; returns maps and distances, best first.

    A start is a random rotation (normal, 0.12 rad), shift (normal, 6% of the template's extent) and scale (log-normal,
    0.1). All starts are evaluated on descriptors pooled to about 6,000 tokens. The best ones are refined with Adam in
    several stages. Half of them are selected and refined with a cost of strain, because a scan may otherwise shrink
    into a uniform corner of the template; half without. Nearly equal maps are merged, which usually leaves one to
    three.

    Args:
        template, scan: (C, H, W, D) each, on grids of ``step_mm`` mm.
        turn: (3, 3); a second pose to start from, see `turn_between`: the stored axes may fit better than the world's.
        starts, seed: the number of random starts, and their seed.
        refined: (number of maps kept, Adam steps for each, n to use every n-th point) of each stage.
    """
    moving, factor = coarse(template, template)
    fixed, step = pooled(scan, factor), step_mm * factor
    half = (torch.tensor(moving.shape[1:], dtype=torch.float32) - 1) / 2 * step
    draw = np.random.RandomState(seed)
    turns = [torch.eye(3)] + ([turn] if turn is not None and is_turned(turn) else [])
    started, moved = list(turns), [torch.zeros(3)] * len(turns)
    for index in range(starts):
        moved.append(torch.tensor(draw.randn(3), dtype=torch.float32) * 0.12 * half)
        matrix = rotation(draw.randn(3) * 0.12) * float(np.exp(draw.randn() * 0.1))
        started.append(matrix @ turns[index % len(turns)])
    matrices, shifts = torch.stack(started), torch.stack(moved)
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
        differences = [((candidate(corners) - other(corners)).abs() / (2 * half)).max() for other, _ in found]
        if all(difference > ALIKE for difference in differences):
            found.append((candidate, float(plain[index])))
    return found


def strain(matrices: torch.Tensor) -> torch.Tensor:
    """|A^T A - 1|^2 of each matrix: (N, 3, 3) -> (N,); 0 for a rotation."""
    return (matrices.transpose(1, 2) @ matrices - torch.eye(3)).square().sum((1, 2))


def smoothed(field: torch.Tensor) -> torch.Tensor:
    """Two passes of a 3 x 3 x 3 mean, borders replicated, close to a cubic B-spline: (1, 3, H, W, D) -> same shape."""
    return F.avg_pool3d(F.avg_pool3d(F.pad(field, (2,) * 6, mode="replicate"), 3, 1), 3, 1)


def squeezed(points: torch.Tensor, affine: AffineMap, step_mm: float) -> torch.Tensor:
    """The cost of a displacement that squeezes or folds the space, which may tear neighbouring classes apart.

    The mean of (`LEAST_VOLUME` - v)^2 over the cells with v < `LEAST_VOLUME`, where v is the volume of a mapped cell
    relative to that under the affine map, negative where the space is folded.

    Args:
        points: (H, W, D, 3) mm, the mapped places of a grid of ``step_mm`` mm. affine: the map without displacement.
    """
    if min(points.shape[:3]) < 2:
        return points.new_zeros(())
    x, y, z = (points.diff(dim=axis) for axis in range(3))
    volume = (x[:, :-1, :-1] * torch.linalg.cross(y[:-1, :, :-1], z[:-1, :-1])).sum(-1)
    volume = volume / (torch.linalg.det(affine.matrix) * step_mm**3)
    return (LEAST_VOLUME - volume).clamp(min=0).square().mean()


def finest(template: Tokens) -> int:
    """Tokens per side that `deform` pools at its finest level: 2 for large grids, where 1 takes 8 times as long."""
    return 2 if template[0].numel() > 20 * POOLED_VOXELS else 1


def deform(
    template: Tokens,
    scan: Tokens,
    step_mm: float,
    to_template: AffineMap,
    iterations: tuple[int, ...] = (40, 40, 30),
    stiffness: float = 0.1,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """Find a smooth displacement field on top of ``to_template`` that reduces the descriptor distance.

    Adam minimises, coarse to fine on pooled descriptors, with a control point at every second token:
    mean w (template(A x + u(x)) - scan(x))^2 + stiffness x mean |grad u|^2 + the cost of `squeezed`, with u in tokens.

    Args:
        template, scan: (C, H, W, D) each, on grids of ``step_mm`` mm.
        iterations: Adam steps at each level, coarsest first; 0 skips a level.
        stiffness: weight of the squared gradient of the field.
        weight: (H', W', D') on the template's tokens, the weight w of a distance there; 1 by default.

    Returns:
        (H, W, D, 3) mm for every token of the scan, and the final mean squared descriptor distance, unweighted.
    """
    fine = finest(template)
    field, value = torch.zeros(1, 3, 1, 1, 1), 0.0
    for level, steps in enumerate(iterations, start=1):
        factor = min(fine * 2 ** (len(iterations) - level), *template.shape[1:], *scan.shape[1:])
        moving, fixed, step = pooled(template, factor), pooled(scan, factor), step_mm * factor
        points = to_template(centred_points(fixed.shape[1:], step))
        shape = [max(2, n // 2 + 1) for n in fixed.shape[1:]]
        control = F.interpolate(field, shape, mode="trilinear", align_corners=True).clone().requires_grad_()
        optimiser = torch.optim.Adam([control], lr=0.3)

        def moved_by(control: torch.Tensor, points=points, fixed=fixed) -> tuple[torch.Tensor, torch.Tensor]:
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
                rough = stiffness * bent + SQUEEZED_COST * squeezed(where, to_template, step)
                ((counts * distance).mean() + rough).backward()
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
    """`align`, then `deform`: the affine map, the displacement field (H, W, D, 3) mm, the remaining distance.

    If `align` finds several maps, coarse displacement fields in both directions judge them: a wrong map leaves a
    larger distance or needs a rougher field, above all in the reverse direction. Without ``weight``, the best is
    selected. With it, of the maps that cost at most `SIMILAR` times as much as the best, the one is selected that
    leaves the smallest distance, after its whole displacement, at the places of the largest weight. For the arguments
    see `align` and `deform`.
    """
    maps = [candidate for candidate, _ in align(template, scan, step_mm, turn, seed=seed)]
    if len(maps) > 1:
        early = (*iterations[:-1], 0)

        def cost(moving: Tokens, fixed: Tokens, place: AffineMap) -> float:
            trial, distance = deform(moving, fixed, step_mm, place, early, stiffness)
            bent = sum(trial.diff(dim=axis).square().mean() for axis in range(3)) / step_mm**2
            return distance + stiffness * float(bent)

        costs = [cost(template, scan, place) + cost(scan, template, place.inverse()) for place in maps]
        most = min(costs) * (1 if weight is None else SIMILAR)
        maps = [place for place, value in zip(maps, costs) if value <= most]
    found = [(place, *deform(template, scan, step_mm, place, iterations, stiffness, weight)) for place in maps]
    if weight is None or len(found) == 1:
        return found[0]
    close = (weight == weight.max()).float()[None]

    def misfit(place: AffineMap, displacement: torch.Tensor, distance: float) -> float:
        points = place(centred_points(scan.shape[1:], step_mm)) + displacement
        counts = sample(close, points, step_mm)[0]
        left = (counts * (sample(template, points, step_mm) - scan).square().mean(0)).sum()
        return float(left / counts.sum()) if counts.any() else float("inf")

    return min(found, key=lambda one: misfit(*one))


def sharpen(
    template: Tokens,
    scan: Tokens,
    step_mm: float,
    to_template: AffineMap,
    points: torch.Tensor,
    weight: torch.Tensor,
    near: torch.Tensor,
    iterations: int = 20,
    stiffness: float = 0.25,
) -> torch.Tensor:
    """``points`` moved by one more displacement field, at full resolution, in the box of the scan that sees ``near``.

    `deform` stops at half resolution on large grids, where small structures are two or three tokens wide. Minimises as
    `deform` does, with a field that begins at zero.

    Args:
        template, scan: (C, H, W, D) each, on grids of ``step_mm`` mm. to_template: the affine map in ``points``.
        points: (H, W, D, 3) centred mm, the position of each token of the scan in the template.
        weight: (H', W', D') on the template's tokens, of a distance there.
        near: (H', W', D') on the template's tokens: True where the detail matters.

    Returns:
        (H, W, D, 3) centred mm; the same as ``points`` outside of the box.
    """
    seen = sample(near[None].float(), points, step_mm)[0] > 0.5
    places = seen.nonzero()
    if not len(places):
        return points
    begins = (places.amin(0) - MARGIN).clamp(min=0).tolist()
    ends = (places.amax(0) + MARGIN + 1).tolist()
    box = tuple(slice(begin, end) for begin, end in zip(begins, ends))
    fixed, start = scan[(slice(None), *box)], points[box]
    control = torch.zeros(1, 3, *(max(2, n // 2 + 1) for n in fixed.shape[1:])).requires_grad_()
    optimiser = torch.optim.Adam([control], lr=0.3)
    counts = sample(weight[None], start, step_mm)[0]

    def moved_by(control: torch.Tensor) -> torch.Tensor:
        return F.interpolate(smoothed(control), fixed.shape[1:], mode="trilinear", align_corners=True)

    with torch.enable_grad():
        for _ in range(iterations):
            optimiser.zero_grad()
            moved = moved_by(control)
            where = start + moved[0].permute(1, 2, 3, 0) * step_mm
            distance = (sample(template, where, step_mm) - fixed).square().mean(0)
            bent = sum(moved.diff(dim=axis).square().mean() for axis in (2, 3, 4))
            rough = stiffness * bent + SQUEEZED_COST * squeezed(where, to_template, step_mm)
            ((counts * distance).mean() + rough).backward()
            optimiser.step()
    found = points.clone()
    found[box] = start + moved_by(control.detach())[0].permute(1, 2, 3, 0) * step_mm
    return found
