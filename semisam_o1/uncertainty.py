"""How unsure a prediction is, voxel by voxel (pure functions).

A measure of uncertainty is called with the predictions of one or more members, probabilities (members, num_classes, H,
W, D), and gives (H, W, D) in [0, 1].
"""

from __future__ import annotations

import math

import torch

from semisam_o1.types import Probabilities


def entropy(probabilities: Probabilities) -> torch.Tensor:
    """-sum_c p_c ln(p_c + 1e-8) in nats: (num_classes, H, W, D) -> (H, W, D)."""
    return -(probabilities * (probabilities + 1e-8).log()).sum(0)


def predictive_entropy(members: torch.Tensor) -> torch.Tensor:
    """Entropy of the members' mean, a share of its largest, ln(num_classes)."""
    mean = members.mean(0)
    return (entropy(mean) / math.log(len(mean))).clamp(0, 1)


def disagreement(members: torch.Tensor) -> torch.Tensor:
    """Mutual information of prediction and member, a share of ln(num_classes): 0 where all members say the same.

    Entropy of the mean less the mean entropy (Gal et al., "Deep Bayesian active learning", ICML 2017).
    """
    each = torch.stack([entropy(member) for member in members]).mean(0) / math.log(members.shape[1])
    return (predictive_entropy(members) - each).clamp(0, 1)


def confidence(probabilities: Probabilities) -> torch.Tensor:
    """1 - entropy / ln(num_classes): (num_classes, ...) -> (...), from 0 where all classes are alike to 1."""
    return (1 - entropy(probabilities) / math.log(len(probabilities))).clamp(0, 1)
