"""A 2D network as an encoder of volumes: applied slice by slice in three planes; its tokens are put back in space."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from semisam_o1.types import Tokens, Volume


class SlicesInThreePlanes(nn.Module):
    """(B, 1, H, W, D) -> (B, 3 C, H/p, W/p, D/p), using a network (N, channels, h, w) -> (N, C, h', w').

    The network processes every ``every``-th slice of each plane. Its tokens are resampled to a step of p voxels in the
    plane, and averaged over each p slices across it. The channels are C of the slices along the first axis, then C
    along the second and C along the third. The sides of the volume must be multiples of p.

    Args:
        network: any 2D network that keeps the aspect ratio of its input; a vision transformer must return a token map.
        patch_size: p, voxels.
        size: resample slices to ``size`` x ``size`` pixels first, if the network needs this size; else None.
        channels: of the network's input; the slice is repeated (3 for networks trained on photographs).
        every: n, to use every n-th slice; at most p. batch: slices per batch.
    """

    def __init__(
        self,
        network: nn.Module,
        patch_size: int,
        size: int | None = None,
        channels: int = 1,
        every: int = 1,
        batch: int = 32,
    ):
        super().__init__()
        if not 1 <= every <= patch_size:
            raise ValueError(f"every {every}: expected 1 to patch_size {patch_size}.")
        self.network = network
        self.patch_size, self.size, self.channels, self.every, self.batch = patch_size, size, channels, every, batch

    def forward(self, volume: Volume) -> Tokens:
        sides = torch.tensor(volume.shape[2:]) // self.patch_size
        planes = []
        for axis in range(3):
            stack = volume[:, 0].movedim(1 + axis, 1)  # (B, n, h, w)
            picked = torch.arange(stack.shape[1]) // self.patch_size  # the token that each slice belongs to
            chosen = torch.arange((self.every - 1) // 2, stack.shape[1], self.every)
            maps = self._maps(stack[:, chosen].flatten(0, 1)[:, None]).unflatten(0, (len(volume), -1))
            in_plane = [int(n) for i, n in enumerate(sides) if i != axis]
            maps = F.interpolate(maps.flatten(0, 1), in_plane, mode="bilinear", antialias=True)
            maps = maps.unflatten(0, (len(volume), -1))
            share = F.one_hot(picked[chosen], int(sides[axis])).float().to(maps)
            share = share / share.sum(0).clamp(min=1)
            planes.append(torch.einsum("bnchw,nt->bcthw", maps, share).movedim(2, 2 + axis))
        return torch.cat(planes, 1)

    def _maps(self, slices: torch.Tensor) -> torch.Tensor:
        parts = []
        for part in slices.split(self.batch):
            if self.size is not None:
                part = F.interpolate(part, (self.size, self.size), mode="bilinear", align_corners=False)
            parts.append(self.network(part.expand(-1, self.channels, -1, -1)))
        return torch.cat(parts)
