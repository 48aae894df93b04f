"""Test-time augmentation: the mean prediction of the original, slightly rotated and mirrored scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from monai.transforms import Rotate
from torch import nn

from semisam_o1.data.grids import Spacing, in_plane

Change = Callable[[torch.Tensor], torch.Tensor]
LEAST = 1e-6  # lower bound of a probability, for a finite logarithm


class Views(Inferer):
    """Logits whose softmax is the mean softmax of ``inferer`` over several views of the volume.

    The views are the original volume, its rotations by ``turn`` and -``turn`` about each axis through its middle, and
    its mirror images. With thick slices the rotations are those in the plane alone, as in training.

    Args:
        inferer: volume (B, C, H, W, D) -> logits (B, num_classes, H, W, D).
        turn: radians; 0 for no rotations.
        flips: axes to mirror, 0, 1, 2 for H, W, D.
        spacing: of the volume, mm, one number or three.
    """

    def __init__(self, inferer: Inferer, turn: float = 0.0, flips: Sequence[int] = (), spacing: Spacing | None = None):
        super().__init__()
        if not set(flips) <= {0, 1, 2}:
            raise ValueError(f"flips {list(flips)}: expected axes of 0, 1 and 2")
        self.inferer = inferer
        axes = [axis for axis, inside in enumerate(in_plane(spacing)) if inside]
        angles = [[sign * turn * (axis == own) for own in range(3)] for axis in axes for sign in (1, -1) if turn]
        self.views = [(turned(angle), turned([-a for a in angle])) for angle in angles]
        self.views += [(flipped(axis), flipped(axis)) for axis in flips]

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = self.inferer(inputs, network, *args, **kwargs)
        if not self.views:
            return logits
        total = logits.softmax(1)
        plain = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        for forth, back in self.views:
            total = total + back(self.inferer(forth(plain), network, *args, **kwargs).softmax(1))
        return (total / (1 + len(self.views))).clamp(min=LEAST).log()


def turned(angle: Sequence[float]) -> Change:
    """Rotation of a volume (B, C, H, W, D) by angles (radians) about H, W, D, with border padding."""
    rotate = Rotate(angle, keep_size=True, padding_mode="border", dtype=torch.float32)

    def change(volume: torch.Tensor) -> torch.Tensor:
        return rotate(volume.flatten(0, 1)).as_tensor().reshape(volume.shape)

    return change


def flipped(axis: int) -> Change:
    return lambda volume: volume.flip(2 + axis)
