"""Mean teacher (Tarvainen and Valpola, NeurIPS 2017): consistency of the student with its moving average."""

from __future__ import annotations

import torch
from ignite.engine import Engine
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys
from torch import nn

from semisam_o1.methods.average import WeightAverage
from semisam_o1.methods.two_stream import TwoStreamLoss


class MeanTeacherLoss(TwoStreamLoss):
    """`TwoStreamLoss` plus mean (softmax(student) - softmax(teacher))^2 over the pool scans of the batch."""

    teacher_logits: torch.Tensor | None = None  # (pool scans, C, H, W, D), set by `MeanTeacher` each iteration

    def consistency_term(self, logits: torch.Tensor, labelled: torch.Tensor) -> torch.Tensor | None:
        if self.teacher_logits is None or not len(self.teacher_logits):
            return None
        return (logits[~labelled].softmax(1) - self.teacher_logits.softmax(1)).square().mean()


class MeanTeacher(WeightAverage):
    """Handler: the average is the teacher. Its input is each pool scan plus noise clip(N(0, 0.1), +-0.2).

    It is in train mode (with active dropout), as published. ``alpha``, ``horizon``, ``start``: see `WeightAverage`.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: MeanTeacherLoss,
        alpha: float = 0.99,
        noise: float = 0.1,
        horizon: float | None = None,
        start: nn.Module | None = None,
    ):
        super().__init__(network, alpha, horizon, start)
        self.loss, self.noise = loss, noise

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.teach)
        super().attach(engine)

    def teach(self, engine: Engine) -> None:
        image, labelled = engine.state.output[Keys.IMAGE], engine.state.output[Keys.LABEL]["labelled"]
        pool = image[~labelled]
        self.loss.teacher_logits = self.noisy(engine, pool) if len(pool) else None

    def noisy(self, engine: Engine, pool: torch.Tensor) -> torch.Tensor:
        """The teacher's logits (N, C, H, W, D) for ``pool`` (N, 1, H, W, D) with new noise."""
        noise = (torch.randn_like(pool) * self.noise).clamp(-2 * self.noise, 2 * self.noise)
        with torch.no_grad():
            return engine.inferer(pool + noise, self.teacher)
