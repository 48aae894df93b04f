"""Estimated quality of a label without truth (pure functions).

The expected Dice error of a class, if its label is compared with the probabilities of round 0, is scaled to true errors
with a factor that copies of the template give (see the modules `copies` and `calibration`). Two measures of the scan
relative to the others of the pool modify it: the dissimilarity to the scans that its label comes from, and the error of
reverse consistency (the label, warped back to the template by an independent alignment, against the template's label).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from semisam_o1.report.overlap import soft_dice, soft_dices
from semisam_o1.round_0.alignment import register
from semisam_o1.round_0.displacement import deform
from semisam_o1.round_0.places import CHANNELS, AffineMap, centred_points, principal
from semisam_o1.round_0.propagation import Reference, sample_label
from semisam_o1.runfolder import CANNOT_TELL, ODD, class_column
from semisam_o1.types import Probabilities, Tokens

ITERATIONS = (40, 30, 15)  # of the reverse displacement
LEAST_ERROR = 0.01  # of reverse consistency; smaller ones are rounding


class Quality(NamedTuple):
    """The quality of a label, estimated without truth; the fields up to ``classes`` are columns of quality.csv.

    predicted_dice: the mean of ``classes``. low, high: the interval that contains the true Dice of four in five labels.
    reverse_consistency: soft Dice between the label, warped back to the template, and the template's label. agreement:
    soft Dice with the probabilities of round 0. dissimilarity: descriptor distance to the scans that the label comes
    from. back_residual: descriptor distance after the reverse alignment. nonpositive_jacobian: share of the template's
    label where the reverse map folds (its Jacobian determinant is not positive). roughness: surface over volume, per
    token. classes: the predicted Dice of each foreground class; NaN for one that neither label nor template has. doubt:
    why nobody can tell how good the label is, in a few words; "" if the predicted Dice counts. odd: class -> what is
    odd about its volume or its place against the pool, by its index among the foreground classes.
    """

    predicted_dice: float
    low: float
    high: float
    reverse_consistency: float
    agreement: float
    dissimilarity: float
    back_residual: float
    nonpositive_jacobian: float
    roughness: float
    classes: tuple[float, ...] = ()
    doubt: str = ""
    odd: Mapping[int, str] = MappingProxyType({})

    def row(self, class_numbers: Sequence[int]) -> dict[str, Any]:
        """The row of quality.csv: None where a number is not known, and in place of each predicted Dice in doubt."""
        dice = {"predicted_dice": self.predicted_dice, "low": self.low, "high": self.high}
        dice |= {class_column(number): value for number, value in zip(class_numbers[1:], self.classes)}
        others = {
            name: value for name, value in self._asdict().items() if name not in (*dice, "classes", "doubt", "odd")
        }
        found = others | (dict.fromkeys(dice, math.nan) if self.doubt else dice)
        known = {name: None if math.isnan(value) else value for name, value in found.items()}
        odd = "; ".join(f"{class_numbers[1 + index]}: {text}" for index, text in self.odd.items())
        return known | {CANNOT_TELL: self.doubt or None, ODD: odd or None}


class Evidence(NamedTuple):
    """What is known of a label: for each foreground class (classes,) and for the scan.

    agreement: soft Dice with the probabilities of round 0. reverse_consistency: see `Quality`. Both NaN for a class
    that is nowhere; the second also for one outside of the scan's field of view, and for one that the template lacks.
    volume: logarithm of its volume over that of the template's class, after the way back to the template; -inf if
    nothing is left. shift: distance of its centre from the template's, in radii of the class; NaN if nothing is left.
    look: distance of its mean descriptor from that of the template's class; NaN if it has no token. The others: see
    `Quality`.
    """

    agreement: np.ndarray
    reverse_consistency: np.ndarray
    dissimilarity: float
    back_residual: float
    nonpositive_jacobian: float
    roughness: float
    volume: np.ndarray | None = None
    shift: np.ndarray | None = None
    look: np.ndarray | None = None


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
    to_scan, displacement, residual = register(moving, fixed, step_mm, turn, seed, ITERATIONS)
    return WayBack(to_scan(centred_points(fixed.shape[1:], step_mm)) + displacement, residual)


def back_from(template: Tokens, scan: Tokens, step_mm: float, to_template: AffineMap) -> WayBack:
    """The reverse alignment that starts from the inverse of the forward one, ``to_template``.

    It is not independent of the forward alignment. It tells whether an independent one has failed: then it leaves the
    smaller distance.
    """
    basis, place = principal(template, CHANNELS), to_template.inverse()
    displacement, residual = deform(basis(scan), basis(template), step_mm, place, ITERATIONS)
    return WayBack(place(centred_points(template.shape[1:], step_mm)) + displacement, residual)


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


def evidence(
    template: Reference,
    scan: Reference,
    propagated: Probabilities,
    back: WayBack,
    step_mm: float,
    dissimilarity: float,
    small: Sequence[int] = (),
) -> Evidence:
    """Evidence of the quality of the label of ``scan``.

    Args:
        template: with its label, on its own tokens. propagated: the final probabilities of round 0.
        back: see `back_propagate`. dissimilarity: see `Quality`.
        small: channels of classes that may be the largest in no token; their shares are taken as they are.
    """
    label = hard(scan.label)
    label[list(small)] = scan.label[list(small)].float()
    warped = sample_label(label, back.points, step_mm)
    consistency = soft_dices(warped, template.label).numpy()
    consistency[(template.label[1:].sum((1, 2, 3)) == 0).numpy()] = np.nan  # it comes from another template
    return Evidence(
        soft_dices(label, propagated, "product").numpy(),
        consistency,
        dissimilarity,
        back.residual,
        nonpositive_jacobian(back.points, 1 - template.label[0]),
        roughness(scan.label),
        *shape_of_classes(warped, template.label),
        look_of_classes(Reference(scan.tokens, label), template),
    )


def look_of_classes(scan: Reference, template: Reference) -> np.ndarray:
    """``look`` of `Evidence`, (classes,): the descriptors hold intensities and texture at several sizes."""
    means = []
    for one in (scan, template):
        weights = one.label[1:].flatten(1)
        means.append(weights @ one.tokens.flatten(1).T.float() / weights.sum(1, keepdim=True))
    return (means[0] - means[1]).norm(dim=1).numpy()


def shape_of_classes(warped: Probabilities, label: Probabilities) -> tuple[np.ndarray, np.ndarray]:
    """``volume`` and ``shift`` of `Evidence` of a label that is ``warped`` to the template, whose own is ``label``."""
    volumes, centres = zip(*(_volume_and_centre(one) for one in (warped, label)))
    radius = (3 * volumes[1] / (4 * math.pi)).clamp(min=1e-6) ** (1 / 3)
    shift = (centres[0] - centres[1]).norm(dim=1) / radius
    ratio = volumes[0] / volumes[1].clamp(min=1e-6)
    return ratio.log().numpy(), torch.where(volumes[0] > 0, shift, torch.nan).numpy()


def _volume_and_centre(label: Probabilities) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each foreground class: its volume in tokens, (classes,), and its centre in tokens, (classes, 3)."""
    places = centred_points(label.shape[1:], 1.0).reshape(-1, 3)
    weights = label[1:].flatten(1)
    volumes = weights.sum(1)
    return volumes, weights @ places / volumes[:, None].clamp(min=1e-6)
