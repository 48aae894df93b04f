"""A displacement field on top of an affine map, which minimises the descriptor distance.

Pure functions. Positions are RAS mm from the middle of each token grid, see `places`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from semisam_o1.round_0.places import POOLED_VOXELS, AffineMap, centred_points, pooled, sample
from semisam_o1.types import Tokens

MARGIN = 4  # tokens around the part of a scan that is aligned at full resolution
LEAST_VOLUME = 0.4  # of a place, relative to what the affine map gives it, below which it costs
SQUEEZED_COST = 3.0  # weight of that cost, see `squeezed`


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
