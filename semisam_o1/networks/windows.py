"""Sliding windows as in the published code, which averages probabilities instead of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import Inferer, SlidingWindowInferer
from torch import nn

LEAST = 1e-30  # lower bound of a probability, for a finite logarithm


class ProbabilityWindows(Inferer):
    """Logits (B, C, H, W, D) whose softmax is the mean softmax of all windows, with equal weights.

    Windows start at every multiple of the stride; the last one ends with the volume. A volume smaller than a window is
    padded evenly with zeros, with the smaller half before it.

    Args:
        roi_size: sides of a window. overlap: of neighbouring windows, as a share of a side.
        sw_batch_size: windows per batch.
        keep_padding: return the padded volume, over which the published code averages the uncertainty.
    """

    def __init__(
        self, roi_size: Sequence[int], overlap: float = 0.5, sw_batch_size: int = 1, keep_padding: bool = False
    ):
        super().__init__()
        self.roi_size, self.keep_padding = tuple(roi_size), keep_padding
        self.windows = SlidingWindowInferer(roi_size, sw_batch_size, overlap, mode="constant")

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.keep_padding:
            inputs = F.pad(inputs, even_padding(inputs.shape[2:], self.roi_size))

        def probabilities(window: torch.Tensor, *more: Any, **others: Any) -> torch.Tensor:
            return network(window, *more, **others).softmax(1)

        return self.windows(inputs, probabilities, *args, **kwargs).clamp(min=LEAST).log()


def even_padding(sides: Sequence[int], least: Sequence[int]) -> list[int]:
    """Widths for `torch.nn.functional.pad` that pad each side to at least ``least``, the smaller half first."""
    pads: list[int] = []
    for side, wanted in zip(sides, least, strict=True):
        lack = max(wanted - side, 0)
        pads = [lack // 2, lack - lack // 2, *pads]
    return pads
