"""Multi-atlas label fusion: propagated labels of similar scans are fused on each scan (pure functions).

Every scan is already aligned to the template, which aligns any two scans to each other. A displacement field refines
this alignment. The errors of single propagations differ between atlases, so fusion reduces them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from semisam_o1.round_0.alignment import distances
from semisam_o1.round_0.displacement import deform
from semisam_o1.round_0.places import AffineMap, centred_points, sample
from semisam_o1.round_0.propagation import emphasis, sample_label
from semisam_o1.types import Probabilities, Tokens

SHARPNESS = 3.0  # of the weights; an atlas at the mean local distance has exp(-3) times the weight of one at distance 0
STRAIGHT = 4.0  # weight of a label of a person relative to one that comes by way of another scan


class Atlas(NamedTuple):
    """A labelled scan: ``tokens`` (C, H', W', D'), ``probabilities`` on them, and its affine map to the template."""

    tokens: Tokens
    probabilities: Probabilities
    to_template: AffineMap


def dissimilarity(
    scan: Tokens, to_template: AffineMap, others: Sequence[tuple[Tokens, AffineMap]], step_mm: float, every: int = 1
) -> torch.Tensor:
    """Descriptor distance of each of ``others`` to ``scan``, aligned through the template: (N,).

    Args:
        scan, to_template: tokens (C, H, W, D), pooled to a few thousand, and the scan's affine map to the template.
        others: the same for each other scan.
        step_mm: of the pooled tokens. every: n, to use every n-th of them.
    """
    values = []
    for tokens, place in others:
        through = to_template.then_back(place)
        values.append(distances(tokens, scan, step_mm, through.matrix[None], through.shift[None], every))
    return torch.cat(values) if values else torch.empty(0)


def carried_from(
    atlas: Atlas, scan: Tokens, to_template: AffineMap, step_mm: float, iterations: Sequence[int] = (20, 20, 10)
) -> tuple[Probabilities, torch.Tensor]:
    """The atlas's label on the scan, (num_classes, H', W', D'), and the squared descriptor distance, (H', W', D')."""
    through = to_template.then_back(atlas.to_template)
    weight = emphasis(atlas.probabilities)
    displacement, _ = deform(atlas.tokens, scan, step_mm, through, tuple(iterations), weight=weight)
    points = through(centred_points(scan.shape[1:], step_mm)) + displacement
    mismatch = (sample(atlas.tokens, points, step_mm) - scan).square().mean(0)
    return sample_label(atlas.probabilities, points, step_mm), mismatch


Carried = tuple[Probabilities, torch.Tensor]  # a label on the scan, and the descriptor distance; see `carried_from`


def fuse(labelled: Sequence[Carried], pool: Sequence[Carried]) -> Probabilities:
    """Labels fused on a scan: (num_classes, H', W', D').

    A label has the weight exp(-SHARPNESS x local mismatch / mean mismatch), with mismatches averaged over 5 x 5 x 5
    tokens. One that comes straight from a labelled scan has `STRAIGHT` times the weight of one that comes by way of
    another scan of the pool.
    """
    mismatches = torch.stack([mismatch for _, mismatch in (*labelled, *pool)])[:, None]
    local = F.avg_pool3d(F.pad(mismatches, (2,) * 6, mode="replicate"), 5, 1)[:, 0]
    weights = torch.exp(-SHARPNESS * local / local.mean().clamp(min=1e-12))
    weights[: len(labelled)] *= STRAIGHT
    labels = torch.stack([label for label, _ in (*labelled, *pool)])
    return torch.einsum("nhwd,nchwd->chwd", weights, labels) / weights.sum(0)
