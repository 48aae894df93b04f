"""How good a propagated label is, judged without truth (pure functions).

Three witnesses: the label carried back to the template by an alignment of its own must fall on the template's; it
must agree with what the most similar scans say; and the scan must look like those that its label comes from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from semisam_o1.report.overlap import soft_dice
from semisam_o1.round_0.alignment import CHANNELS, centred_points, principal, register
from semisam_o1.round_0.propagation import Reference, sample_label
from semisam_o1.types import Probabilities, Tokens

# Of the prediction: measured on left atria and hippocampi, see docs/results/propagation.md.
ERROR_PER_DOUBT = 0.84
SOUND_BACK, SOUND_AGREEMENT = 0.6, 0.7  # below these the label itself, and not its borders alone, is in question


class Quality(NamedTuple):
    """What is known of a label without truth; each is a column of quality.csv.

    predicted_dice: what the others come to. reverse_consistency: soft Dice of the label, carried back to the template,
    with the template's. agreement: soft Dice with the probabilities of round 0. dissimilarity: descriptor distance to
    the scans that the label came from. back_residual: the distance that the way back leaves. nonpositive_jacobian: the
    share of the label that the way back turns
    inside out (its Jacobian is not positive). roughness: surface over volume, per token.
    """

    predicted_dice: float
    reverse_consistency: float
    agreement: float
    dissimilarity: float
    back_residual: float
    nonpositive_jacobian: float
    roughness: float


class WayBack(NamedTuple):
    """Where each of the template's places lies in a scan: ``points`` (H, W, D, 3) in mm, and the distance left."""

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
    """From template to scan by an alignment of its own, from its own starts.

    Never the inverse of the way forth, which would agree with itself. ``turn``: from template to scan, see `align`.
    """
    basis = principal(template, channels)
    fixed, moving = basis(template), basis(scan)
    to_scan, displacement, residual = register(moving, fixed, step_mm, turn, seed, (40, 30, 15))
    return WayBack(to_scan(centred_points(fixed.shape[1:], step_mm)) + displacement, residual)


def nonpositive_jacobian(points: torch.Tensor, weight: torch.Tensor) -> float:
    """The share of ``weight`` (H, W, D) where a map of the grid, ``points`` (H, W, D, 3), is turned inside out."""
    steps = [torch.gradient(points, dim=axis)[0] for axis in range(3)]
    turned = torch.linalg.det(torch.stack(steps, -1)) <= 0
    return float((weight * turned).sum() / weight.sum().clamp(min=1e-6))


def roughness(label: Probabilities) -> float:
    """Surface over volume of the foreground classes, per token, by total variation along the axes."""
    surface = sum(label[1:].diff(dim=axis).abs().sum() for axis in (1, 2, 3))
    return float(surface / label[1:].sum().clamp(min=1))


def estimate_quality(
    template: Reference,
    label: Probabilities,
    propagated: Probabilities,
    back: WayBack,
    step_mm: float,
    dissimilarity: float,
) -> Quality:
    """All that can be said of ``label`` (num_classes, H', W', D'), shares on the scan's tokens.

    The error of a sound label is in proportion to doubt, the geometric mean of (1 - agreement), roughness,
    dissimilarity and the residual of the way back: how thick the border's uncertainty is, times how much border
    there is.

    Args:
        template: with its label, on its own tokens. propagated: the probabilities that round 0 came to.
        back: see `back_propagate`. dissimilarity: see `Quality`.
    """
    hard = F.one_hot(label.argmax(0), len(label)).movedim(-1, 0).float()
    agreement = soft_dice(hard, propagated, "product")
    reverse_consistency = soft_dice(sample_label(label, back.points, step_mm), template.label)
    rough = roughness(label)
    doubt = (max(1 - agreement, 1e-6) * rough * dissimilarity * back.residual) ** 0.25
    sound = min(1.0, reverse_consistency / SOUND_BACK) * min(1.0, agreement / SOUND_AGREEMENT)
    predicted = max(0.0, 1 - ERROR_PER_DOUBT * doubt) * sound
    folded = nonpositive_jacobian(back.points, 1 - template.label[0])
    return Quality(predicted, reverse_consistency, agreement, dissimilarity, back.residual, folded, rough)
