"""The validation Dice of the published code, as a MONAI metric."""

from __future__ import annotations

from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric, compute_dice


class PublishedValidationDice(CumulativeIterationMetric):
    """Dice, averaged over cases, then over foreground classes; 0 if truth or prediction has no voxel of a class.

    Called with one-hot volumes (B, C, H, W, D), prediction first.
    """

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        dice = compute_dice(y_pred, y, include_background=False, ignore_empty=False)
        present = (y_pred.flatten(2).sum(2) > 0) & (y.flatten(2).sum(2) > 0)
        return dice * present[:, 1:]

    def aggregate(self) -> torch.Tensor:
        return self.get_buffer().mean(0).mean()
