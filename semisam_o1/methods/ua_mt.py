"""Uncertainty-aware mean teacher (Yu et al., MICCAI 2019): consistency only where the teacher is certain."""

from __future__ import annotations

import math

import torch
from ignite.engine import Engine

from semisam_o1.methods.mean_teacher import MeanTeacher, MeanTeacherLoss
from semisam_o1.methods.two_stream import gaussian_ramp

EPSILON = 1e-6  # inside the entropy's logarithm, as published


class UncertaintyAwareLoss(MeanTeacherLoss):
    """`MeanTeacherLoss` over the voxels where the teacher's entropy is below a rising threshold:

        sum (mask x (softmax(student) - softmax(teacher))^2) / (2 x sum mask + 1e-16)
        mask = entropy < (0.75 + 0.25 exp(-5 (1 - i/I)^2)) ln C

    The published threshold uses ln 2 for any C (``threshold_classes`` 2); ln C is the largest possible entropy.
    """

    def __init__(self, *args, threshold_classes: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.threshold_classes = threshold_classes

    teacher_entropy: torch.Tensor | None = None  # (pool scans, H, W, D), nats, set by `UncertaintyAwareTeacher`

    def threshold(self, num_classes: int) -> float:
        """The threshold in nats at the current iteration."""
        return (0.75 + 0.25 * gaussian_ramp(self.iteration / self.iterations)) * math.log(
            self.threshold_classes or num_classes
        )

    def consistency_term(self, logits: torch.Tensor, labelled: torch.Tensor) -> torch.Tensor | None:
        if self.teacher_logits is None or not len(self.teacher_logits):
            return None
        distance = (logits[~labelled].softmax(1) - self.teacher_logits.softmax(1)).square()
        mask = (self.teacher_entropy < self.threshold(logits.shape[1])).float()[:, None]
        return (mask * distance).sum() / (2 * mask.sum() + 1e-16)


class UncertaintyAwareTeacher(MeanTeacher):
    """Handler: `MeanTeacher` that also computes the teacher's entropy from ``passes`` further noisy predictions."""

    def __init__(self, *args, passes: int = 8, **kwargs):
        super().__init__(*args, **kwargs)
        self.passes = passes

    def noisy(self, engine: Engine, pool: torch.Tensor) -> torch.Tensor:
        logits = super().noisy(engine, pool)
        total = super().noisy(engine, pool).softmax(1)
        for _ in range(self.passes - 1):
            total = total + super().noisy(engine, pool).softmax(1)
        mean = total / self.passes
        self.loss.teacher_entropy = -(mean * (mean + EPSILON).log()).sum(1)
        return logits
