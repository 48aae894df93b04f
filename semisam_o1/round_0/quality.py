"""Estimated quality of a propagated label without truth (pure functions).

It combines three measures: reverse consistency (the label, warped back to the template by an independent alignment,
overlaps the template's label), agreement with the fused labels of the most similar scans, and the dissimilarity of the
scan to the scans that its label comes from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from semisam_o1.report.overlap import soft_dice
from semisam_o1.round_0.alignment import CHANNELS, centred_points, principal, register
from semisam_o1.round_0.propagation import Reference, sample_label
from semisam_o1.types import Probabilities, Tokens

# Constants of the predicted Dice, fitted on left atria and hippocampi, see docs/results/propagation.md.
ERROR_PER_DOUBT = 0.84
SOUND_BACK, SOUND_AGREEMENT = 0.6, 0.7  # below these the whole label is doubtful, not only its borders


class Quality(NamedTuple):
    """The quality of a label, estimated without truth; each field is a column of quality.csv.

    predicted_dice: computed from the other fields. reverse_consistency: soft Dice between the label, warped back to the
    template, and the template's label. agreement: soft Dice with the probabilities of round 0. dissimilarity:
    descriptor distance to the scans that the label comes from. back_residual: descriptor distance after the reverse
    alignment. nonpositive_jacobian: share of the template's label where the reverse map folds (its Jacobian determinant
    is not positive). roughness: surface over volume, per token.
    """

    predicted_dice: float
    reverse_consistency: float
    agreement: float
    dissimilarity: float
    back_residual: float
    nonpositive_jacobian: float
    roughness: float


class WayBack(NamedTuple):
    """The reverse alignment: ``points`` (H, W, D, 3) mm, the position in the scan of each template token, and the
    remaining descriptor distance ``residual``."""

    points: torch.Tensor
    residual: float


def back_propagate(
    template: Tokens,
    scan: Tokens,
    step_mm: float,
    channels: int = CHANNELS,
    seed: int = 1,
    turn: torch.Tensor | None = None,
) -> WayBack:
    """Align template to scan independently of the forward alignment, with other random starts.

    The inverse of the forward alignment would always be consistent. ``turn``: from template to scan, see `align`.
    """
    basis = principal(template, channels)
    fixed, moving = basis(template), basis(scan)
    to_scan, displacement, residual = register(moving, fixed, step_mm, turn, seed, (40, 30, 15))
    return WayBack(to_scan(centred_points(fixed.shape[1:], step_mm)) + displacement, residual)


def nonpositive_jacobian(points: torch.Tensor, weight: torch.Tensor) -> float:
    """The share of ``weight`` (H, W, D) where the map ``points`` (H, W, D, 3) of the grid folds."""
    steps = [torch.gradient(points, dim=axis)[0] for axis in range(3)]
    folded = torch.linalg.det(torch.stack(steps, -1)) <= 0
    return float((weight * folded).sum() / weight.sum().clamp(min=1e-6))


def roughness(label: Probabilities) -> float:
    """Surface over volume of the foreground classes, per token, by total variation along the axes."""
    surface = sum(label[1:].diff(dim=axis).abs().sum() for axis in (1, 2, 3))
    return float(surface / label[1:].sum().clamp(min=1))


def hard(probabilities: Probabilities) -> Probabilities:
    """One-hot of the largest of ``probabilities`` (num_classes, H', W', D')."""
    return F.one_hot(probabilities.argmax(0), len(probabilities)).movedim(-1, 0).float()


def reverse_consistency(label: Probabilities, template: Reference, back: WayBack, step_mm: float) -> float:
    """Soft Dice between a scan's ``label``, warped back to the template, and the template's label."""
    return soft_dice(sample_label(label, back.points, step_mm), template.label)


def estimate_quality(
    template: Reference,
    label: Probabilities,
    propagated: Probabilities,
    back: WayBack,
    step_mm: float,
    dissimilarity: float,
) -> Quality:
    """Estimate the quality of ``label`` (num_classes, H', W', D'), class shares on the scan's tokens.

    The Dice error of a mostly correct label is proportional to ``doubt``, the geometric mean of (1 - agreement),
    roughness, dissimilarity and the residual of the reverse alignment. These reflect the width of the uncertain border
    and the amount of border. Low reverse consistency or agreement scales the predicted Dice down.

    Args:
        template: with its label, on its own tokens. propagated: the final probabilities of round 0.
        back: see `back_propagate`. dissimilarity: see `Quality`.
    """
    agreement = soft_dice(hard(label), propagated, "product")
    consistency = reverse_consistency(label, template, back, step_mm)
    rough = roughness(label)
    doubt = (max(1 - agreement, 1e-6) * rough * dissimilarity * back.residual) ** 0.25
    sound = min(1.0, consistency / SOUND_BACK) * min(1.0, agreement / SOUND_AGREEMENT)
    predicted = max(0.0, 1 - ERROR_PER_DOUBT * doubt) * sound
    folded = nonpositive_jacobian(back.points, 1 - template.label[0])
    return Quality(predicted, consistency, agreement, dissimilarity, back.residual, folded, rough)
