"""Mean teacher (Tarvainen and Valpola, NeurIPS 2017): the student agrees with its own running average."""

from __future__ import annotations

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys
from torch import nn

from semisam_o1.methods.two_stream import TwoStreamLoss


class MeanTeacherLoss(TwoStreamLoss):
    """`TwoStreamLoss` with mean (softmax(student) - softmax(teacher))^2 over the pool scans of the batch."""

    teacher_logits: torch.Tensor | None = None  # (pool scans, C, H, W, D), set by `MeanTeacher` each iteration

    def consistency_term(self, logits: torch.Tensor, labelled: torch.Tensor) -> torch.Tensor | None:
        if self.teacher_logits is None or not len(self.teacher_logits):
            return None
        return (logits[~labelled].softmax(1) - self.teacher_logits.softmax(1)).square().mean()


class MeanTeacher:
    """Handler: a teacher that follows the student, and sees each pool scan with noise clip(N(0, 0.1), +-0.2) added.

    The teacher is Ignite's `EMAHandler` with alpha = min(1 - 1/(i+1), ``alpha``), i from 0, in train mode (its
    dropout acts) as published. After training it is the averaged network that predicts: see ``teacher``.

    Where ``horizon`` is given, alpha is at most 1 - 1/(horizon x I) too, I the iterations to run: in a short training
    an average over the last 100 of them still holds the beginner.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: MeanTeacherLoss,
        alpha: float = 0.99,
        noise: float = 0.1,
        horizon: float | None = None,
    ):
        self.loss, self.alpha, self.noise, self.horizon = loss, alpha, noise, horizon
        self.average = EMAHandler(network, momentum=1 - alpha, handle_buffers="ema_train")

    @property
    def teacher(self) -> nn.Module:
        return self.average.ema_model

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.teach)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.set_momentum)  # before the average is updated
        self.average.attach(engine, name="ema_momentum", event=Events.ITERATION_COMPLETED)

    def teach(self, engine: Engine) -> None:
        image, labelled = engine.state.output[Keys.IMAGE], engine.state.output[Keys.LABEL]["labelled"]
        pool = image[~labelled]
        if not len(pool):
            self.loss.teacher_logits = None
            return
        noise = (torch.randn_like(pool) * self.noise).clamp(-2 * self.noise, 2 * self.noise)
        with torch.no_grad():
            self.loss.teacher_logits = engine.inferer(pool + noise, self.teacher)

    def set_momentum(self, engine: Engine) -> None:
        # Ignite's momentum is the new weights' share: 1 - alpha.
        share = max(1 / engine.state.iteration, 1 - self.alpha)
        if self.horizon is not None:
            iterations = engine.state.max_epochs * engine.state.epoch_length
            share = max(share, min(1.0, 1 / (self.horizon * iterations)))
        engine.state.ema_momentum = share
