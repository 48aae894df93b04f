"""Selection of uncertain pseudo-labels, and votes of similar certain volumes or tokens (pure functions)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from semisam_o1.neighbours import nearest
from semisam_o1.types import Tokens

LEAST_WEIGHT = 1e-8  # least sum of the weights of all votes, as published


def uncertain(uncertainties: Sequence[float], quantile: float) -> np.ndarray:
    """Which volumes are uncertain, (N,) bool: u_n >= the ``quantile`` quantile of all u_n, as published."""
    values = np.asarray(uncertainties, float)
    return values >= np.quantile(values, quantile)


def volume_votes(
    descriptors: np.ndarray, certain: np.ndarray, query: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` certain volumes most similar to a volume, and the weight of each: max(cosine, 0).

    Args:
        descriptors: (N, C) of unit length, including templates. certain: (N,) bool. query: (C,) of unit length.

    Returns:
        Indices (k,) into ``descriptors``, most similar first, and weights (k,). Both are empty if fewer than k volumes
        are certain or the weights sum to less than LEAST_WEIGHT; then the label stays as it is.
    """
    candidates = np.flatnonzero(certain)
    if len(candidates) < k:
        return np.empty(0, int), np.empty(0)
    cosine = descriptors[candidates] @ query
    order = np.argsort(-cosine, kind="stable")[:k]
    weights = np.maximum(cosine[order], 0)
    if weights.sum() < LEAST_WEIGHT:
        return np.empty(0, int), np.empty(0)
    return candidates[order], weights


def vote_labels(
    labels: Sequence[torch.Tensor], weights: Sequence[float], shape: Sequence[int], num_classes: int
) -> torch.Tensor:
    """The class with the largest weight at each voxel of a volume of ``shape`` (H, W, D), as published.

    Each neighbour's label (h, w, d) is resampled to ``shape`` (nearest neighbour) without alignment, so the vote blurs
    differing anatomy.
    """
    total = torch.zeros(num_classes, *shape)
    for label, weight in zip(labels, weights):
        resized = F.interpolate(label[None, None].float(), tuple(shape), mode="nearest")[0, 0].long()
        total.scatter_add_(0, resized[None], torch.full((1, *shape), float(weight)))
    return total.argmax(0)


class Voters(NamedTuple):
    """Voting tokens: ``vectors`` (n, d), class ``shares`` (n, num_classes), ``confidence`` (n,)."""

    vectors: torch.Tensor
    shares: torch.Tensor
    confidence: torch.Tensor


def place_vectors(tokens: Tokens, points: torch.Tensor, position_weight: float) -> torch.Tensor:
    """The vectors for comparing tokens: feature and weighted position, (H W D, C + 3).

    Args:
        tokens: (C, H, W, D). points: (H, W, D, 3), positions in the template, mm. position_weight: per mm.
    """
    return torch.cat([tokens.flatten(1).T, position_weight * points.reshape(-1, 3)], 1)


def voxel_votes(voters: Voters, queries: torch.Tensor, k: int, cells: int = 0, seed: int = 0) -> torch.Tensor:
    """Class shares of each query by a vote of its ``k`` nearest voters: (m, num_classes), summing to 1.

    A voter at squared distance d votes for its class shares with the weight exp(-d / median d) x confidence.

    Args:
        queries: (m, d), see `place_vectors`. cells: of an approximate index, see `neighbours.nearest`.
    """
    distance, indices = nearest(voters.vectors.numpy(), queries.numpy(), k, cells, seed=seed)
    found = torch.from_numpy(indices)
    votes = torch.from_numpy(np.exp(-distance / max(float(np.median(distance)), 1e-12))) * voters.confidence[found]
    total = votes.sum(1, keepdim=True).clamp(min=1e-12)
    return torch.einsum("mk,mkc->mc", votes, voters.shares[found]) / total
