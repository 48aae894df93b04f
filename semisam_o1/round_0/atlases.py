"""Multi-atlas label fusion: labelled scans become atlases for those that look like them (pure functions).

Every scan has been aligned to the template once, so any two are aligned to each other through it; a displacement
between the two does the rest. Errors of single propagations differ from atlas to atlas and are outvoted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from semisam_o1.round_0.alignment import AffineMap, centred_points, deform, distances, sample
from semisam_o1.round_0.propagation import emphasis, sample_label
from semisam_o1.types import Probabilities, Tokens

SHARPNESS = 3.0  # of the weights: an atlas with twice the mean local distance counts exp(-3) of one with none


class Atlas(NamedTuple):
    """A labelled scan: ``tokens`` (C, H', W', D'), ``probabilities`` on them, and its place in the template."""

    tokens: Tokens
    probabilities: Probabilities
    to_template: AffineMap


def dissimilarity(
    scan: Tokens, to_template: AffineMap, others: Sequence[tuple[Tokens, AffineMap]], step_mm: float
) -> torch.Tensor:
    """Descriptor distance of each of ``others`` to ``scan``, aligned through the template: (N,).

    Args:
        scan, to_template: tokens (C, H, W, D), pooled to some thousand places, and the scan's place in the template.
        others: the same of each.
        step_mm: of the pooled tokens.
    """
    values = []
    for tokens, place in others:
        through = to_template.then_back(place)
        values.append(distances(tokens, scan, step_mm, through.matrix[None], through.shift[None]))
    return torch.cat(values) if values else torch.empty(0)


def carried_from(
    atlas: Atlas, scan: Tokens, to_template: AffineMap, step_mm: float, iterations: Sequence[int] = (20, 20, 10)
) -> tuple[Probabilities, torch.Tensor]:
    """The atlas's label on the scan, (num_classes, H', W', D'), and how ill they match there, (H', W', D')."""
    through = to_template.then_back(atlas.to_template)
    weight = emphasis(atlas.probabilities)
    displacement, _ = deform(atlas.tokens, scan, step_mm, through, tuple(iterations), weight=weight)
    points = through(centred_points(scan.shape[1:], step_mm)) + displacement
    mismatch = (sample(atlas.tokens, points, step_mm) - scan).square().mean(0)
    return sample_label(atlas.probabilities, points, step_mm), mismatch


def fuse(
    own: Probabilities, carried: Sequence[Probabilities], mismatches: Sequence[torch.Tensor]
) -> tuple[Probabilities, Probabilities]:
    """The scan's own label and its atlases' as one, and the atlases' without it: (num_classes, H', W', D') each.

    An atlas counts exp(-SHARPNESS x local mismatch / mean mismatch), mismatches meaned over a 5-cube; the scan's own
    label counts as the best atlas of the place.
    """
    local = F.avg_pool3d(F.pad(torch.stack(list(mismatches))[:, None], (2,) * 6, mode="replicate"), 5, 1)[:, 0]
    weights = torch.exp(-SHARPNESS * local / local.mean().clamp(min=1e-12))
    others = torch.einsum("nhwd,nchwd->chwd", weights, torch.stack(list(carried)))
    best, total = weights.amax(0), weights.sum(0)
    return (others + best * own) / (total + best), others / total
