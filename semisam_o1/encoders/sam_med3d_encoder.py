"""The image encoder of SAM-Med3D, a 3D vision transformer. The user provides its trained weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semisam_o1.data.intensities import normalise_foreground
from semisam_o1.encoders.base import Encoder
from semisam_o1.weights import load_weights

CHECKPOINT = Path("pretrained_ckpt/sam_med3d_turbo.pth")
EPS = 1e-6  # of every LayerNorm


class SAMMed3DEncoder(nn.Module):
    """(B, 1, S, S, S) float -> (B, out_channels, S/p, S/p, S/p); released: S 128, p 16, out_channels 384.

    S is ``image_size`` and p is ``patch_size``, in voxels. Spatial axes (H, W, D) keep their order; token i of an axis
    covers the voxels from p i to p (i + 1) - 1. The released weights were trained at 1.5 mm, on intensities normalised
    by `normalise_foreground`. The defaults are the ViT-B of the released checkpoint; its keys without
    ``image_encoder.`` are the parameter names. Blocks in ``global_blocks`` attend over the grid itself, other blocks
    over the grid zero-padded to ``window`` tokens per side.

    Source: SAM-Med3D (Wang et al., 2023), in the form that its released weights need: see `position_bias`.

    Raises ValueError for inconsistent sizes, and for a volume that is not (B, 1, S, S, S).
    """

    patch_size: int = 16
    input_size: int = 128

    def __init__(
        self,
        image_size: int = 128,
        patch_size: int = 16,
        depth: int = 12,
        width: int = 768,
        heads: int = 12,
        window: int = 14,
        global_blocks: Collection[int] = (2, 5, 8, 11),
        out_channels: int = 384,
        mlp_ratio: int = 4,
    ):
        super().__init__()
        if image_size % patch_size or width % heads:
            raise ValueError(
                f"image_size {image_size} must be a multiple of patch_size {patch_size}, "
                f"and width {width} a multiple of heads {heads}."
            )
        self.input_size, self.patch_size = image_size, patch_size
        side = image_size // patch_size
        if window < side:
            raise ValueError(f"window {window} must be at least the grid's {side} tokens per side.")
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, side, width))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv3d(1, width, patch_size, patch_size)))
        self.blocks = nn.Sequential(
            *(_Block(width, heads, side if i in global_blocks else window, mlp_ratio) for i in range(depth))
        )
        self.neck = nn.Sequential(
            nn.Conv3d(width, out_channels, 1, bias=False),
            _ChannelNorm(out_channels, eps=EPS),
            nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False),
            _ChannelNorm(out_channels, eps=EPS),
        )

    def forward(self, volume: Tensor) -> Tensor:
        expected = (1, *[self.input_size] * 3)
        if volume.ndim != 5 or volume.shape[1:] != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"expected a volume (B, {sizes}), got {tuple(volume.shape)}.")
        tokens = self.patch_embed(volume).movedim(1, -1) + self.pos_embed
        return self.neck(self.blocks(tokens).movedim(-1, 1))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, window: int, mlp_ratio: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = _Attention(width, heads, window)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        hidden = mlp_ratio * width
        self.mlp = nn.Sequential(
            OrderedDict(lin1=nn.Linear(width, hidden), act=nn.GELU(), lin2=nn.Linear(hidden, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    """Attention over the grid, zero-padded to ``window`` tokens per side: (B, g, g, g, width) -> same shape.

    The query, key and value of a padded token are the bias of ``qkv``, so all padded keys are equal. A single key
    replaces them, with the logarithm of their summed weights as its bias. Queries of padded tokens are left out,
    because their results are not used.
    """

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_d, self.rel_pos_h, self.rel_pos_w = (
            nn.Parameter(torch.zeros(2 * window - 1, width // heads)) for _ in "dhw"
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, side, width = x.shape[0], x.shape[1], x.shape[-1]
        query, key, value = self.qkv(x).reshape(batch, side**3, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        padded_query, padded_key, padded_value = self.qkv.bias.reshape(3, self.heads, 1, -1)
        grid = query.unflatten(2, (side, side, side))
        bias = position_bias(grid, padded_query, self.rel_pos_d, self.rel_pos_h, self.rel_pos_w)
        if self.window > side:
            key = torch.cat([key, padded_key.to(key).expand(batch, -1, -1, -1)], 2)
            value = torch.cat([value, padded_value.to(value).expand(batch, -1, -1, -1)], 2)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query))
        return self.proj(out.transpose(1, 2).reshape(batch, side, side, side, width))


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W, D)."""

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous, because on a CPU the next convolution has twice the rounding error with channels last.
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).contiguous()


def position_bias(query: Tensor, padded_query: Tensor, table_d: Tensor, table_h: Tensor, table_w: Tensor) -> Tensor:
    """The bias added to q . k / sqrt(c), for queries (B, n, g, g, g, c): (B, n, g^3, g^3), or with g^3 + 1 keys.

    There are n heads with c channels. ``padded_query`` (n, 1, c) is the query at the grid positions g to K - 1. The
    tables are (2K - 1, c), where K is the window's side. For a query at grid position (d, h, w), a key at
    (d', h', w'), the unscaled query q, and R[i - j] as row i - j + K - 1 of a table:

        q[d, h, w] . R_d[d - w']  +  q[d, h, d'] . R_h[h - w']  +  q[d, h, h'] . R_w[h' - w']

    A relative position by axes would use d - d', h - h' and w - w', each with q[d, h, w]. The published code uses the
    terms above, and its weights were trained with them. The last key exists if K > g. Its bias is the log-sum-exp of
    these terms over all padded keys; for a given w' it separates into sums over d' and over h'.
    """
    batch, side = query.shape[0], query.shape[2]
    window = (table_d.shape[0] + 1) // 2
    whole = torch.arange(window, device=query.device)
    filler = padded_query.to(query)[None, :, None, None].expand(batch, -1, side, side, window - side, -1)
    line = torch.cat([query, filler], 4)

    def rows(table: Tensor, i: Tensor) -> Tensor:
        return table[i[:, None] - whole + window - 1]

    # x, y, z are the key's d', h', w'.
    first = torch.einsum("bndhwc,dzc->bndhwz", query, rows(table_d, whole[:side]))
    second = torch.einsum("bndhxc,hzc->bndhxz", line, rows(table_h, whole[:side]))
    third = torch.einsum("bndhyc,yzc->bndhyz", line, rows(table_w, whole))

    last_two = second[..., :side, None, :side] + third[..., None, :side, :side]
    bias = first[..., None, None, :side] + last_two[:, :, :, :, None]
    bias = bias.flatten(5).flatten(2, 4)
    if window == side:
        return bias

    second_real, second_padded = (part.logsumexp(-2) for part in second.split([side, window - side], -2))
    third_all, third_padded = third.logsumexp(-2), third[..., side:, :].logsumexp(-2)
    mass = torch.where(
        whole < side,  # w' is real: then d' or h' must be padded
        torch.logaddexp(second_padded + third_all, second_real + third_padded),
        torch.logaddexp(second_real, second_padded) + third_all,
    )
    folded = (first + mass[:, :, :, :, None]).logsumexp(-1)
    return torch.cat([bias, folded.flatten(2, 4)[..., None]], -1)


def load_sam_med3d(
    checkpoint: str | Path = CHECKPOINT, device: str | torch.device = "cpu", **architecture: Any
) -> SAMMed3DEncoder:
    """The encoder (B, 1, 128, 128, 128) -> (B, 384, 8, 8, 8) with the weights in ``checkpoint``, in eval mode.

    ``checkpoint`` is a file for `load_weights`: the whole published checkpoint or only the encoder's part.
    ``architecture``: arguments of `SAMMed3DEncoder`, for other sizes than the released one.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: the file cannot be read without executing code from it, or its weights do not fit.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(
            f"No SAM-Med3D weights at {path}. Get {CHECKPOINT.name} from the SAM-Med3D authors' release and "
            f"put it at {CHECKPOINT}, or give its path with --set pretrained_ckpt=FILE. The encoder `mind` needs no "
            "weights."
        )
    with torch.device("meta"):  # saves the time for initial values
        encoder = SAMMed3DEncoder(**architecture)
    load_weights(encoder, path, "image_encoder.", "the SAM-Med3D image encoder")
    return encoder.to(device).eval()


def sam_med3d(
    checkpoint: str | Path = CHECKPOINT,
    normalise: bool = True,
    precision: str = "float32",
    compiled: bool = False,
    **settings: Any,
) -> Encoder:
    """SAM-Med3D as an `Encoder`: one token every 16 voxels, windows of 128 voxels per side.

    ``normalise`` applies `normalise_foreground` to each window. ``precision``, ``compiled``: see `Encoder`.
    ``settings`` and errors: see `load_sam_med3d`.
    """
    network = load_sam_med3d(checkpoint, **settings)
    return Encoder(
        network,
        "sam_med3d",
        network.patch_size,
        network.input_size,
        normalise_foreground if normalise else None,
        precision=precision,
        compiled=compiled,
        trained=True,
    )
