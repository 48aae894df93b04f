"""MONAI's U-Net for any number of classes: its cost at full resolution does not grow with their square."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.networks.blocks import ADN
from monai.networks.layers import Conv
from monai.networks.nets import UNet
from torch import nn


class ManyClassUNet(UNet):
    """MONAI's `UNet`; with more classes than the first of ``channels``, a convolution of 1 voxel gives their logits.

    The last level of MONAI's `UNet` has as many channels as there are classes: with 38 classes it takes more than half
    of the time. Here it has at most ``channels[0]``. With fewer classes, the network is MONAI's, weights included.

    Args:
        channels: of each level. The others: see MONAI's `UNet`.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, channels: Sequence[int], **others: Any):
        width = min(out_channels, channels[0])
        super().__init__(spatial_dims, in_channels, width, channels, **others)
        if width < out_channels:
            adn = ADN("NA", width, act=self.act, norm=self.norm, norm_dim=spatial_dims)
            classes: type[nn.Module] = Conv[Conv.CONV, spatial_dims]
            self.model.extend([adn, classes(width, out_channels, kernel_size=1)])
