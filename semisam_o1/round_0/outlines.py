"""How people outline differs from how labels are carried over: a factor a class, learned from labelled scans (pure).

Each labelled scan also has a label that was carried to it from the others alone. Where these labels are too large or
too small by a habit of the template's outline, a factor on the probability of a class moves its borders. It is used
only if it improves labels of scans that it was not learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from semisam_o1.report.overlap import soft_dices
from semisam_o1.round_0.quality import hard
from semisam_o1.types import Probabilities

FACTORS = np.exp(np.linspace(-0.8, 0.8, 17))  # of a class's probability that are tried
LEAST_GAIN = 0.002  # of mean Dice on scans left out, over all classes and for the class itself; less is chance
TIE = 1e-6  # Dice that a factor of e has to win


class Outlined(NamedTuple):
    """A labelled scan: ``probabilities`` carried to it from others, and ``truth``, class shares of its own label.

    Both are (num_classes, H', W', D').
    """

    probabilities: Probabilities
    truth: Probabilities


class Outlines(NamedTuple):
    """factors: of each foreground class. gain: of mean Dice on labelled scans left out; None if nothing was learned."""

    factors: tuple[float, ...]
    gain: float | None


def applied(probabilities: Probabilities, factors: Sequence[float]) -> Probabilities:
    """Probabilities with the classes weighted by ``factors``, background by 1."""
    weights = torch.tensor([1.0, *factors], dtype=probabilities.dtype)[:, None, None, None]
    found = probabilities * weights
    return found / found.sum(0).clamp(min=1e-9)


def learn(scans: Sequence[Outlined]) -> Outlines:
    """Factors that improve the labels of ``scans``, each of which is left out once; 1 where they do not.

    With fewer than two scans nothing can be left out, and nothing is learned.
    """
    if not scans:
        return Outlines((), None)
    classes = len(scans[0].truth) - 1
    table = np.stack([_dices(scan) for scan in scans])  # (scans, factors, classes)
    plain = table[:, len(FACTORS) // 2]
    if len(scans) < 2:
        return Outlines((1.0,) * classes, None)
    each = range(len(scans))
    gains = np.stack([table[i, _best(np.delete(table, i, 0)), np.arange(classes)] - plain[i] for i in each])
    known = ~np.isnan(gains)
    gain = float(gains[known].mean()) if known.any() else 0.0
    of_class = np.where(known, gains, 0).sum(0) / known.sum(0).clip(min=1)
    if gain < LEAST_GAIN:
        return Outlines((1.0,) * classes, gain)
    factors = np.where(of_class < LEAST_GAIN, 1.0, FACTORS[_best(table)])
    return Outlines(tuple(factors.tolist()), gain)


def _best(table: np.ndarray) -> np.ndarray:
    """The index of each class's best factor, (classes,), of (scans, factors, classes); of equal ones, nearest to 1."""
    return (np.nan_to_num(table).mean(0) - TIE * np.abs(np.log(FACTORS))[:, None]).argmax(0)


def _dices(scan: Outlined) -> np.ndarray:
    """The Dice of each class if its factor is changed alone, (factors, classes); NaN for a class that is nowhere."""
    truth, rows = hard(scan.truth), np.empty((len(FACTORS), len(scan.truth) - 1))
    for i, factor in enumerate(FACTORS):
        for number in range(1, len(scan.truth)):
            factors = [1.0] * (len(scan.truth) - 1)
            factors[number - 1] = factor
            label = applied(scan.probabilities, factors).argmax(0) == number
            one, other = (torch.stack([~mask, mask]).float() for mask in (label, truth[number] > 0.5))
            rows[i, number - 1] = float(soft_dices(one, other)[0])
    return rows


def border_shift_mm(probabilities: Probabilities, factor: float, number: int, step_mm: float) -> float:
    """By how many mm the border of a class moves outwards by its factor: the change of volume over the surface."""
    factors = [1.0] * (len(probabilities) - 1)
    factors[number - 1] = factor
    before, after = (p.argmax(0) == number for p in (probabilities, applied(probabilities, factors)))
    faces = sum(float((before.float().diff(dim=axis)).abs().sum()) for axis in range(3)) / 1.5  # of a sphere: 1.5 areas
    return float(after.sum() - before.sum()) / max(faces, 1.0) * step_mm
