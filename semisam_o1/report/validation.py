"""The Dice by which the published code chooses a state in validation, as a MONAI metric."""

from __future__ import annotations

from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric, compute_dice


class PublishedValidationDice(CumulativeIterationMetric):
    """Mean over cases, then over the foreground classes, of Dice; 0 where truth, prediction or both lack a class.

    Called with one-hot volumes (B, C, H, W, D), prediction first.
    """

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        dice = compute_dice(y_pred, y, include_background=False, ignore_empty=False)
        there = (y_pred.flatten(2).sum(2) > 0) & (y.flatten(2).sum(2) > 0)
        return dice * there[:, 1:]

    def aggregate(self) -> torch.Tensor:
        return self.get_buffer().mean(0).mean()
