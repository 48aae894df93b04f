"""The running average of a network's weights, which predicts in its place."""

from __future__ import annotations

from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from torch import nn


class WeightAverage:
    """Handler: Ignite's `EMAHandler` with alpha = min(1 - 1/(i+1), ``alpha``), i from 0, as mean teachers have it.

    Where ``horizon`` is given, alpha is at most 1 - 1/(horizon x I) too, I the iterations to run: in a short training
    an average over the last 100 of them still holds the beginner.

    ``start``: a network whose weights the average has until the first step; those of ``network`` if not given.
    """

    def __init__(
        self, network: nn.Module, alpha: float = 0.99, horizon: float | None = None, start: nn.Module | None = None
    ):
        self.alpha, self.horizon = alpha, horizon
        self.average = EMAHandler(network, momentum=1 - alpha, handle_buffers="ema_train")
        if start is not None:
            self.teacher.load_state_dict(start.state_dict())

    @property
    def teacher(self) -> nn.Module:
        """The averaged network."""
        return self.average.ema_model

    @property
    def objects(self) -> dict:
        """What holds state, by name: each with ``state_dict`` and ``load_state_dict``."""
        return {"average": self.teacher}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.set_momentum)  # before the average is updated
        self.average.attach(engine, name="ema_momentum", event=Events.ITERATION_COMPLETED)

    def set_momentum(self, engine: Engine) -> None:
        # Ignite's momentum is the new weights' share: 1 - alpha.
        share = max(1 / engine.state.iteration, 1 - self.alpha)
        if self.horizon is not None:
            iterations = engine.state.max_epochs * engine.state.epoch_length
            share = max(share, min(1.0, 1 / (self.horizon * iterations)))
        engine.state.ema_momentum = share
