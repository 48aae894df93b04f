"""The 3D U-Net of the published one-label method, and its variant with two heads."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (16, 32, 64, 128, 256)
STRIDES = (2, 2, 2, 2)


class UNet3D(nn.Module):
    """(B, C_in, H, W, D) float -> logits (B, num_classes, H, W, D) float, before softmax.

    Five levels with two 3x3x3 convolutions each, with InstanceNorm (not affine) and ReLU; max-pooling on the way down,
    trilinear interpolation and concatenation on the way up; dropout after the bottleneck and before the 1x1x1 head;
    Kaiming initialisation. Source: the network of the published one-label method. The parameter names are the same, so
    its checkpoints load. Any voxel size; the spatial axes keep their order.

    Sides need not be divisible by the strides. Pooling drops a last odd plane; on the way up, its neighbour is repeated
    in its place, so voxels keep their positions.

    ``features`` are the five widths, from the full resolution to the bottleneck. ``strides`` are the four factors of
    pooling, as published 2 along every axis; one may be a list of three, for H, W, D.

    Raises ``ValueError`` if there are not five ``features`` and four ``strides``, if a side is below the product p of
    its strides (16), or if all sides are below 2 p (32), because InstanceNorm has no variance over a bottleneck of one
    voxel.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        features: Sequence[int] = WIDTHS,
        dropout: float = 0.3,
        strides: Sequence[int | Sequence[int]] = STRIDES,
    ) -> None:
        super().__init__()
        if len(features) != len(WIDTHS):
            raise ValueError(f"features must be {len(WIDTHS)} widths, got {tuple(features)}")
        if len(strides) != len(STRIDES):
            raise ValueError(f"strides must be {len(STRIDES)}, got {list(strides)}")
        s1, s2, s3, s4 = pooled = [(s,) * 3 if isinstance(s, int) else tuple(s) for s in strides]
        self.least = [math.prod(axis) for axis in zip(*pooled)]
        least, longest = (_text([n * p for p in self.least]) for n in (1, 2))
        self.needed = f"sides of at least {least} voxels and one of at least {longest}"
        w1, w2, w3, w4, w5 = features
        self.conv1 = _ConvPair(in_channels, w1)
        self.conv2 = _ConvPair(w1, w2)
        self.conv3 = _ConvPair(w2, w3)
        self.conv4 = _ConvPair(w3, w4)
        self.center = _ConvPair(w4, w5)
        self.up_concat4 = _UpConcat(w5, w4, s4)
        self.up_concat3 = _UpConcat(w4, w3, s3)
        self.up_concat2 = _UpConcat(w3, w2, s2)
        self.up_concat1 = _UpConcat(w2, w1, s1)
        self.final = nn.Conv3d(w1, num_classes, 1)
        self.pool1, self.pool2, self.pool3, self.pool4 = (nn.MaxPool3d(stride) for stride in pooled)
        self.dropout = nn.Dropout(dropout)
        self.apply(_kaiming)

    def decode(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W, D) -> the input of the heads, (B, features[0], H, W, D)."""
        sides = x.shape[2:]
        fits, longest = len(sides) == 3, False
        for side, least in zip(sides, self.least):
            fits, longest = fits and side >= least, longest or side >= 2 * least
        if not fits or not longest:
            raise ValueError(
                f"expected (B, C, H, W, D) with {self.needed}, got {list(x.shape)}: "
                "pad the volume or take a larger patch"
            )
        level1 = self.conv1(x)
        level2 = self.conv2(self.pool1(level1))
        level3 = self.conv3(self.pool2(level2))
        level4 = self.conv4(self.pool3(level3))
        up = self.dropout(self.center(self.pool4(level4)))
        up = self.up_concat4(level4, up)
        up = self.up_concat3(level3, up)
        up = self.up_concat2(level2, up)
        return self.dropout(self.up_concat1(level1, up))

    def forward(self, x: Tensor) -> Tensor:
        return self.final(self.decode(x))


class UNet3DSDF(UNet3D):
    """(B, C_in, H, W, D) float -> (signed distance, logits), both (B, num_classes, H, W, D) float.

    The signed distance is normalised, between -1 and 1 (tanh) and negative inside the class. It has its own 1x1x1
    head, `final2`. Source: dual-task consistency, as in the published one-label method. Sizes, initialisation and
    errors as in :class:`UNet3D`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        features: Sequence[int] = WIDTHS,
        dropout: float = 0.3,
        strides: Sequence[int | Sequence[int]] = STRIDES,
    ) -> None:
        super().__init__(in_channels, num_classes, features, dropout, strides)
        self.final2 = nn.Conv3d(features[0], num_classes, 1)
        _kaiming(self.final2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        shared = self.decode(x)
        return torch.tanh(self.final2(shared)), self.final(shared)


class LogitsAlone(nn.Module):
    """The last output, the logits, of a network with several outputs; weights keep that network's names.

    ``dropout``: the rate of all its dropout layers; None leaves them. MONAI Label sets it to score scans.
    """

    def __init__(self, network: nn.Module, dropout: float | None = None) -> None:
        super().__init__()
        self.network = network
        for layer in network.modules() if dropout is not None else ():
            if isinstance(layer, nn.modules.dropout._DropoutNd):
                layer.p = float(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[-1]

    def state_dict(self, *args, **kwargs):
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.network.load_state_dict(*args, **kwargs)


class _ConvPair(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm_relu(in_channels, out_channels)
        self.conv2 = _conv_norm_relu(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class _UpConcat(nn.Module):
    def __init__(self, deep_channels: int, skip_channels: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.factors = [float(n) for n in stride]
        self.conv = _ConvPair(deep_channels + skip_channels, skip_channels)

    def forward(self, skip: Tensor, deep: Tensor) -> Tensor:
        deep = F.interpolate(deep, scale_factor=self.factors, mode="trilinear", align_corners=False)
        lost = [skip.shape[axis] - deep.shape[axis] for axis in (2, 3, 4)]
        if max(lost) > 0:
            deep = F.pad(deep, [0, lost[2], 0, lost[1], 0, lost[0]], mode="replicate")
        return self.conv(torch.cat([skip, deep], dim=1))


def _text(sides: Sequence[int]) -> str:
    """One number for three equal sides."""
    return str(sides[0]) if len(set(sides)) == 1 else " x ".join(map(str, sides))


def _conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, 3, padding=1),
        nn.InstanceNorm3d(out_channels),
        nn.ReLU(inplace=True),
    )


def _kaiming(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight)
