"""Handcrafted descriptors without weights: MIND-SSC at several dilations and local statistics at several sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from semisam_o1.encoders.base import Encoder

# The six nearest neighbours, and the twelve pairs of them that are not opposite.
NEIGHBOURS = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
PAIRS = tuple((i, j) for i in range(6) for j in range(i) if i // 2 != j // 2)


def box_mean(volume: torch.Tensor, size: int) -> torch.Tensor:
    """Mean over a cube of ``size`` voxels per side, borders replicated; (B, C, H, W, D) -> same shape."""
    for axis in range(3):
        kernel, padding = [1, 1, 1], [0] * 6
        kernel[axis] = size
        padding[2 * (2 - axis)] = padding[2 * (2 - axis) + 1] = size // 2
        volume = F.avg_pool3d(F.pad(volume, padding, mode="replicate"), kernel, 1)
    return volume


def mind_ssc(volume: torch.Tensor, dilation: int, has_data: torch.Tensor | None = None) -> torch.Tensor:
    """The self-similarity context of a volume: (B, 1, H, W, D) -> (B, 12, H, W, D) in (0, 1].

    exp(-d_ij / v), where d_ij is the squared difference of the neighbours i and j at ``dilation`` voxels, averaged over
    3 x 3 x 3 voxels, minus the smallest of the twelve; v is their mean, clipped to 0.1 to 10 times its mean over the
    volume, or, given ``has_data`` (B, 1, H, W, D), over the voxels that see no edge of the
    data.
    Heinrich et al., "Towards realtime multimodal fusion ... self-similarities", MICCAI 2013.
    """
    padded = F.pad(volume, (dilation,) * 6, mode="replicate")
    size = volume.shape[2:]
    corners = [[dilation * (1 + step) for step in neighbour] for neighbour in NEIGHBOURS]
    shifted = [padded[:, :, x : x + size[0], y : y + size[1], z : z + size[2]] for x, y, z in corners]
    distance = box_mean(torch.cat([(shifted[i] - shifted[j]) ** 2 for i, j in PAIRS], 1), 3)
    distance = distance - distance.amin(1, keepdim=True)
    variance = distance.mean(1, keepdim=True)
    typical = variance.mean(dim=(2, 3, 4), keepdim=True)
    if has_data is not None:  # only voxels whose neighbours all have data, as the edge of the data is no tissue
        reach = dilation + 1
        inner = 1 - F.max_pool3d(1 - has_data.to(variance), 2 * reach + 1, 1, reach)
        share = inner.mean((2, 3, 4), True)
        typical = torch.where(share > 0, (variance * inner).mean((2, 3, 4), True) / share.clamp(min=1e-9), typical)
    typical = typical.clamp(min=1e-6)
    return torch.exp(-distance / variance.clamp(typical * 0.1, typical * 10))


class MIND(nn.Module):
    """(B, 1, H, W, D), z-normalised -> (B, 12 x dilations + 2 x boxes, H, W, D).

    Args:
        dilations: in voxels; each gives one MIND-SSC descriptor.
        boxes: sides in voxels of the cubes for mean and standard deviation.
        statistics_weight: factor of mean and standard deviation; values of MIND-SSC are in (0, 1].
    """

    def __init__(
        self, dilations: Sequence[int] = (1, 2, 4), boxes: Sequence[int] = (3, 7, 15), statistics_weight: float = 0.5
    ):
        super().__init__()
        self.dilations, self.boxes, self.statistics_weight = tuple(dilations), tuple(boxes), statistics_weight

    def forward(self, volume: torch.Tensor, has_data: torch.Tensor | None = None) -> torch.Tensor:
        parts = [mind_ssc(volume, dilation, has_data) for dilation in self.dilations]
        for size in self.boxes:
            mean = box_mean(volume, size)
            deviation = (box_mean(volume * volume, size) - mean * mean).clamp(min=0).sqrt()
            parts += [self.statistics_weight * mean, self.statistics_weight * deviation]
        return torch.cat(parts, 1)


def mind(**settings) -> Encoder:
    """The default encoder: one token per voxel, no weights, any volume size. ``settings``: arguments of `MIND`."""
    return Encoder(MIND(**settings), name="mind", takes_mask=True)
