"""The moving average of a network's weights, which is used for prediction."""

from __future__ import annotations

from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from torch import nn


class WeightAverage:
    """Handler: Ignite's `EMAHandler` with alpha = min(1 - 1/(i+1), ``alpha``), i from 0, as in mean teacher.

    With ``horizon``, alpha is also at most 1 - 1/(horizon x I), I being the number of iterations. In a short training,
    an average over 100 iterations would still contain the first weights.

    ``start``: the network whose weights the average has before the first iteration; by default ``network``.
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
        """The objects with state, by name; each has ``state_dict`` and ``load_state_dict``."""
        return {"average": self.teacher}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.set_momentum)  # runs before the average is updated
        self.average.attach(engine, name="ema_momentum", event=Events.ITERATION_COMPLETED)

    def set_momentum(self, engine: Engine) -> None:
        # Ignite's momentum is the weight of the new values: 1 - alpha.
        share = max(1 / engine.state.iteration, 1 - self.alpha)
        if self.horizon is not None:
            iterations = engine.state.max_epochs * engine.state.epoch_length
            share = max(share, min(1.0, 1 / (self.horizon * iterations)))
        engine.state.ema_momentum = share
