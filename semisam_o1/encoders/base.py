"""What an encoder is: a frozen network, the window it takes, the step of its tokens, and how it wants intensities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from semisam_o1.types import Volume


class Encoder(nn.Module):
    """(B, 1, H, W, D) -> tokens (B, C, H/p, W/p, D/p), p the patch size, for any network of that form.

    Args:
        network: what does it; put into eval mode and frozen.
        name: how the feature store calls it.
        patch_size: voxels from one token to the next.
        input_size: side of the cubic window that the network is bound to; None where it takes a whole volume.
        normalise: applied to the window's (B, 1, H, W, D) intensities, which arrive z-normalised; None leaves them.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        patch_size: int = 1,
        input_size: int | None = None,
        normalise: Callable[[Volume], Volume] | None = None,
    ):
        super().__init__()
        if input_size is not None and input_size % patch_size:
            raise ValueError(f"encoder {name}: input_size {input_size} is not a multiple of patch_size {patch_size}.")
        self.network = network.eval().requires_grad_(False)
        self.name, self.patch_size, self.input_size, self.normalise = name, patch_size, input_size, normalise

    @torch.no_grad()
    def forward(self, volume: Volume) -> torch.Tensor:
        return self.network(volume if self.normalise is None else self.normalise(volume))
