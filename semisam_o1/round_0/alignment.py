"""Registration of a scan to the template: an affine map from seeded random starts, then a displacement field.

Both minimise the descriptor distance. Pure functions. Positions are RAS mm from the middle of each token grid, see
`places`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from semisam_o1.round_0.displacement import deform
from semisam_o1.round_0.places import (
    AffineMap,
    centred_points,
    coarse,
    is_turned,
    pooled,
    rotation,
    sample,
)
from semisam_o1.types import Tokens

STRAIN_COSTS = (0.0, 0.1)  # weights of |A^T A - 1|^2, one per half of the refined maps; a scale of 1.1 costs 0.013
LARGER = 1.5  # times the extent: beyond, the smaller of two grids may lie anywhere in the larger one
MOST_PLACES = 150  # of the middle of the smaller one that are tried
ALIKE = 0.1  # of the extent; maps whose corners all differ by less are treated as equal
SIMILAR = 1.1  # times the cost of the best map; of those, the one that fits best near the label is selected
AT_ONCE = 32  # starts evaluated per batch
TRIED = 5  # a start is evaluated on every fifth point
OUTSIDE_COST = 0.15  # of a point outside the template; squared descriptor distances are 0.05 to 0.2


def distances(
    moving: Tokens,
    fixed: Tokens,
    step_mm: float,
    matrices,
    shifts,
    every: int = 1,
    strain_cost=0.0,
    outside_cost: float = OUTSIDE_COST,
) -> torch.Tensor:
    """The cost of each of N affine maps: mean squared descriptor distance + costs of points outside and strain: (N,).

    Args:
        moving, fixed: (C, H, W, D) each, on grids of ``step_mm`` mm.
        matrices, shifts: (N, 3, 3) and (N, 3) mm, from positions in ``fixed`` to positions in ``moving``.
        every: n, to use every n-th point. strain_cost: weight of |A^T A - 1|^2, one number or (N,). outside_cost: of a
            point of ``fixed`` outside of ``moving``.
    """
    points = centred_points(fixed.shape[1:], step_mm).reshape(-1, 3)[::every]
    half = (torch.tensor(moving.shape[1:], dtype=torch.float32) - 1) / 2 * step_mm
    where = points @ matrices.transpose(1, 2) + shifts[:, None]
    inside = (where.abs() <= half + 1e-3).all(-1).float()
    error = (sample(moving, where, step_mm) - fixed.flatten(1)[:, None, ::every]).square().mean(0)
    mismatch = (error * inside).sum(1) / inside.sum(1).clamp(min=1)
    return mismatch + outside_cost * (1 - inside.mean(1)) + strain_cost * strain(matrices)


def align(
    template: Tokens,
    scan: Tokens,
    step_mm: float,
    turn: torch.Tensor | None = None,
    starts: int = 320,
    refined: Sequence[tuple[int, int, int]] = ((24, 40, 3), (8, 20, 1)),
    seed: int = 0,
) -> list[tuple[AffineMap, float]]:
    """Find affine maps from scan to template with small descriptor distance; returns maps and distances, best first.

    A start is a random rotation (normal, 0.12 rad), shift (normal, 6% of the template's extent) and scale (log-normal,
    0.1). All starts are evaluated on descriptors pooled to about 6,000 tokens. The best ones are refined with Adam in
    several stages. Half of them are selected and refined with a cost of strain, because a scan may otherwise shrink
    into a uniform corner of the template; half without. Nearly equal maps are merged, which usually leaves one to
    three. If one of the two is much larger, starts with the smaller one in each of its parts are added.

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
    of_template, of_scan = (torch.tensor(one.shape[1:], dtype=torch.float32) * step for one in (moving, fixed))
    for place in middles(of_scan, of_template):  # the template in a larger scan, or the scan in a larger template
        started, moved = [*started, *turns], [*moved, *(-turn @ place for turn in turns)]
    for place in middles(of_template, of_scan):
        started, moved = [*started, *turns], [*moved, *([place] * len(turns))]
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


def middles(large: torch.Tensor, small: torch.Tensor) -> list[torch.Tensor]:
    """Where the middle of a grid of extent ``small`` (3,) mm may lie in one of extent ``large``: (3,) centred mm each.

    A quarter of its extent apart, as far as `MOST_PLACES` go; none along axes on which ``large`` is less than `LARGER`
    times as long.
    """
    room = torch.where(large > LARGER * small, (large - small) / 2, 0.0)
    if not room.any():
        return []
    spacing = small / 4
    while (counts := (room / spacing).floor().int() * 2 + 1).prod() > MOST_PLACES:
        spacing = 1.2 * spacing
    steps = [torch.arange(int(n)) - n // 2 for n in counts]
    return list(torch.cartesian_prod(*steps).float() * spacing)


def strain(matrices: torch.Tensor) -> torch.Tensor:
    """|A^T A - 1|^2 of each matrix: (N, 3, 3) -> (N,); 0 for a rotation."""
    return (matrices.transpose(1, 2) @ matrices - torch.eye(3)).square().sum((1, 2))


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
