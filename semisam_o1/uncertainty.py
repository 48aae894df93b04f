"""Measures of a prediction's uncertainty, voxel by voxel (pure functions).

A measure takes the probabilities of one or more ensemble members, (members, num_classes, H, W, D), and returns
(H, W, D) in [0, 1].
"""

from __future__ import annotations

import math

import torch

from semisam_o1.types import Probabilities


def entropy(probabilities: Probabilities) -> torch.Tensor:
    """-sum_c p_c ln(p_c + 1e-8) in nats: (num_classes, H, W, D) -> (H, W, D)."""
    return -(probabilities * (probabilities + 1e-8).log()).sum(0)


def predictive_entropy(members: torch.Tensor) -> torch.Tensor:
    """Entropy of the members' mean, divided by its maximum ln(num_classes)."""
    mean = members.mean(0)
    return (entropy(mean) / math.log(len(mean))).clamp(0, 1)


def disagreement(members: torch.Tensor) -> torch.Tensor:
    """Mutual information of prediction and member, divided by ln(num_classes): 0 where all members agree.

    Entropy of the mean minus the mean entropy (Gal et al., "Deep Bayesian active learning", ICML 2017).
    """
    each = torch.stack([entropy(member) for member in members]).mean(0) / math.log(members.shape[1])
    return (predictive_entropy(members) - each).clamp(0, 1)


def confidence(probabilities: Probabilities) -> torch.Tensor:
    """1 - entropy / ln(num_classes): (num_classes, ...) -> (...), 0 where all classes are equally likely."""
    return (1 - entropy(probabilities) / math.log(len(probabilities))).clamp(0, 1)
