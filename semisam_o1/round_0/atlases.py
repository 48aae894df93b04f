"""Multi-atlas label fusion: propagated labels of similar scans are fused on each scan (pure functions).

Every scan is already aligned to the template, which aligns any two scans to each other. A displacement field refines
this alignment. The errors of single propagations differ between atlases, so fusion reduces them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from semisam_o1.round_0.alignment import OUTSIDE_COST, distances
from semisam_o1.round_0.displacement import deform
from semisam_o1.round_0.places import AffineMap, centred_points, in_grid, sample
from semisam_o1.round_0.propagation import emphasis, sample_label
from semisam_o1.types import Probabilities, Tokens

SHARPNESS = 3.0  # of the weights; an atlas at the mean local distance has exp(-3) times the weight of one at distance 0
STRAIGHT = 4.0  # weight of a label of a person relative to one that comes by way of another scan


class Carried(NamedTuple):
    """A label that is carried to a scan: its ``probabilities`` (num_classes, H', W', D').

    mismatch: (H', W', D'), the squared descriptor distance. inside: (H', W', D'), True where the atlas reaches: beyond
    its field of view it knows no class.
    """

    probabilities: Probabilities
    mismatch: torch.Tensor
    inside: torch.Tensor


class Atlas(NamedTuple):
    """A labelled scan: ``tokens`` (C, H', W', D'), ``probabilities`` on them, and its affine map to the template."""

    tokens: Tokens
    probabilities: Probabilities
    to_template: AffineMap


def dissimilarity(
    scan: Tokens,
    to_template: AffineMap,
    others: Sequence[tuple[Tokens, AffineMap]],
    step_mm: float,
    every: int = 1,
    outside_cost: float = OUTSIDE_COST,
) -> torch.Tensor:
    """Descriptor distance of each of ``others`` to ``scan``, aligned through the template: (N,).

    Args:
        scan, to_template: tokens (C, H, W, D), pooled to a few thousand, and the scan's affine map to the template.
        others: the same for each other scan.
        step_mm: of the pooled tokens. every: n, to use every n-th of them. outside_cost: see `distances`.
    """
    values = []
    for tokens, place in others:
        through = to_template.then_back(place)
        values.append(
            distances(tokens, scan, step_mm, through.matrix[None], through.shift[None], every, 0.0, outside_cost)
        )
    return torch.cat(values) if values else torch.empty(0)


def carried_from(
    atlas: Atlas, scan: Tokens, to_template: AffineMap, step_mm: float, iterations: Sequence[int] = (20, 20, 10)
) -> Carried:
    """The atlas's label on the scan."""
    through = to_template.then_back(atlas.to_template)
    weight = emphasis(atlas.probabilities)
    displacement, _ = deform(atlas.tokens, scan, step_mm, through, tuple(iterations), weight=weight)
    points = through(centred_points(scan.shape[1:], step_mm)) + displacement
    mismatch = (sample(atlas.tokens, points, step_mm) - scan).square().mean(0)
    reached = in_grid(atlas.tokens.shape[1:], points, step_mm)
    return Carried(sample_label(atlas.probabilities, points, step_mm), mismatch, reached)


def fuse(labelled: Sequence[Carried], pool: Sequence[Carried]) -> Probabilities:
    """Labels fused on a scan: (num_classes, H', W', D').

    A label has the weight exp(-SHARPNESS x local mismatch / mean mismatch), with mismatches averaged over 5 x 5 x 5
    tokens. One that comes straight from a labelled scan has `STRAIGHT` times the weight of one that comes by way of
    another scan of the pool. One that does not reach a place has none there; the first one has to reach each.
    """
    carried = (*labelled, *pool)
    reached = torch.stack([one.inside for one in carried])
    mismatches = torch.stack([one.mismatch for one in carried])[:, None]
    local = F.avg_pool3d(F.pad(mismatches, (2,) * 6, mode="replicate"), 5, 1)[:, 0]
    mean = (local * reached).sum() / reached.sum().clamp(min=1)
    scores = -SHARPNESS * local / mean.clamp(min=1e-12)
    scores[: len(labelled)] += math.log(STRAIGHT)
    weights = scores.masked_fill(~reached, -math.inf).softmax(0)
    labels = torch.stack([one.probabilities for one in carried])
    return torch.einsum("nhwd,nchwd->chwd", weights, labels)
