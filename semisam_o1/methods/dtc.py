"""Dual-task consistency (Luo et al., AAAI 2021) between a signed-distance head and a segmentation head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from monai.networks.utils import one_hot
from monai.transforms.utils import distance_transform_edt
from torch import nn

from semisam_o1.methods.two_stream import TwoStreamLoss

STEEPNESS = 1500  # of the sigmoid that turns a signed distance into a mask


def signed_distance(masks: torch.Tensor) -> torch.Tensor:
    """The normalised signed distance to the border of each mask (B, C, H, W, D): -1 to 0 inside, 0 to 1 outside.

    Distances are in voxels, divided by the largest distance inside or outside. Zero for an empty or full mask. The
    result has the masks' shape.
    """
    result = torch.zeros(masks.shape, dtype=torch.float32, device=masks.device)
    for index in torch.cartesian_prod(torch.arange(masks.shape[0]), torch.arange(masks.shape[1])).tolist():
        mask = masks[tuple(index)] > 0.5
        if mask.any() and not mask.all():
            inside, outside = (
                torch.as_tensor(distance_transform_edt(part.float()[None])[0], device=masks.device).float()
                for part in (mask, ~mask)
            )
            edge = mask & (inside <= 1)  # the mask's own border voxels
            signed = outside / outside.max() - inside / inside.max()
            result[tuple(index)] = signed.masked_fill(edge, 0)
    return result


def squared_dice(probabilities: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Dice loss of probabilities (B, C, H, W, D) against one mask (B, 1, H, W, D) for all channels, as published.

    1 - (2 sum p t + 1e-5) / (sum p^2 + sum t + 1e-5). The sums of p t and p^2 include all channels, the sum of the
    mask t has one channel.
    """
    overlap = 2 * (probabilities * mask).sum() + 1e-5
    return 1 - overlap / (probabilities.square().sum() + mask.sum() + 1e-5)


class PublishedSegmentation(nn.Module):
    """(0.01 CE + `squared_dice` of sigmoid(logits) against the mask y = 1) / 2."""

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        dice = squared_dice(logits.sigmoid(), (label == 1).to(logits))
        return (0.01 * F.cross_entropy(logits, label[:, 0].long()) + dice) / 2


class DualTaskLoss(TwoStreamLoss):
    """For networks that return (signed distance sdf, logits), both (B, C, H, W, D); sdf is negative inside.

    L_cons = mean (sigmoid(-1500 sdf) - sigmoid(logits))^2 over the whole batch and all channels.

    - ``published``: L_sup and L_pseudo are `PublishedSegmentation`; on the labelled half, `squared_dice` of
      sigmoid(-1500 sdf) is added with weight 1.
    - else, for any C: L_sup and L_pseudo are those of `TwoStreamLoss`, with a Dice for each class; on the labelled
      half, the Dice of sigmoid(-1500 sdf) for each class and ``distance_weight`` x mean |sdf - signed distance of the
      label| are added.
    """

    def __init__(self, *args, published: bool = False, distance_weight: float = 0.3, **kwargs):
        super().__init__(*args, **kwargs)
        self.published, self.distance_weight = published, distance_weight
        self.dice_a_class = DiceLoss(squared_pred=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5, reduction="none")
        if published:
            self.segmentation = PublishedSegmentation()
        self._sdf: torch.Tensor | None = None

    def consistency_term(self, logits: torch.Tensor, labelled: torch.Tensor) -> torch.Tensor | None:
        return ((-STEEPNESS * self._sdf).sigmoid() - logits.sigmoid()).square().mean()

    def forward(  # type: ignore[override]
        self, outputs: tuple[torch.Tensor, torch.Tensor], target: dict
    ) -> torch.Tensor:
        """outputs: (sdf, logits); target: see `prepare_batch`."""
        self._sdf, logits = outputs
        total, labelled = super().forward(logits, target), target["labelled"]
        if not labelled.any():
            return total
        sdf, label = self._sdf[labelled], target["label"][labelled]
        soft = (-STEEPNESS * sdf).sigmoid()
        if self.published:
            extra = squared_dice(soft, (label == 1).to(soft))
        else:
            masks = one_hot(label, logits.shape[1])
            present = masks.sum((0, 2, 3, 4)) > 0
            extra = self.dice_a_class(soft, masks).flatten()[present].mean()
            extra = extra + self.distance_weight * (sdf - signed_distance(masks)).abs().mean()
        self.weighted["distance"] = float(extra.detach())
        return total + extra
