"""Overlap of two labels: Dice of hard and of fractional labels (pure functions)."""

from __future__ import annotations

import torch

from semisam_o1.types import Probabilities


def mean_dice(one: torch.Tensor, other: torch.Tensor, num_classes: int) -> float:
    """Mean Dice over the foreground classes of two labels (H, W, D); a class missing in both counts as 1."""
    overlaps = []
    for number in range(1, num_classes):
        a, b = one == number, other == number
        total = float(a.sum() + b.sum())
        overlaps.append(2 * float((a & b).sum()) / total if total else 1.0)
    return sum(overlaps) / len(overlaps)


def soft_dice(one: Probabilities, other: Probabilities, overlap: str = "min") -> float:
    """The mean of `soft_dices` over the classes that are there; 1 if there is none."""
    found = soft_dices(one, other, overlap)
    present = ~found.isnan()
    return float(found[present].mean()) if present.any() else 1.0


def soft_dices(one: Probabilities, other: Probabilities, overlap: str = "min") -> torch.Tensor:
    """2 |p and q| / (sum p + sum q) of each foreground class, (num_classes - 1,); NaN for a class missing in both.

    |p and q| is the sum of min(p, q) or, with ``overlap`` "product", of p q: the expected overlap of a hard label with
    a truth given by probabilities.
    """
    both = torch.minimum(one, other) if overlap == "min" else one * other
    total = (one + other)[1:].flatten(1).sum(1)
    found = 2 * both[1:].flatten(1).sum(1) / total.clamp(min=1e-3)
    return torch.where(total > 1e-3, found, torch.nan)
