"""The training state, from which an interrupted training continues bit-identically."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.transforms import Compose, Randomizable

from semisam_o1 import processes
from semisam_o1.files import write_torch
from semisam_o1.runfolder import RunFolder
from semisam_o1.weights import read_checkpoint


def randomizables(transform: Any) -> Iterator[Randomizable]:
    """Every transform in a chain that has its own random state, including the chain itself."""
    if isinstance(transform, Randomizable):
        yield transform
    if isinstance(transform, Compose):
        for part in transform.transforms:
            yield from randomizables(part)
    for part in vars(transform).values() if hasattr(transform, "__dict__") else ():
        if isinstance(part, Randomizable) and part is not transform:
            yield from randomizables(part)


class TrainingState:
    """Handler: writes the full training state to one file every ``seconds``, for a bit-identical continuation.

    The file contains weights and optimisers under ``objects``, the iteration, the random states of Python, numpy, torch
    and every transform, and the sampler's position. It is deleted after training. This must be the last handler of the
    trainer, so that it saves a complete state. Before the trainer runs, `resume` sets its first iteration. Of several
    processes, the first saves its state; a continuation has other batches in the others.

    Args:
        output_dir, round: the run's folder and the round.
        method: saves its ``objects``, name -> object with ``state_dict`` and ``load_state_dict``.
        objects: further objects to save.
        sampler: with ``state`` and ``set_state``. transform: of the dataset.
        seconds: between two saves; at most this much work is lost, plus one iteration or validation.
    """

    def __init__(
        self,
        output_dir: str | Path,
        round: int,
        method,
        objects: Mapping[str, Any],
        sampler,
        transform,
        seconds: float = 60.0,
    ):
        self.path = RunFolder(output_dir).round(round).training_state
        self.objects, self.sampler, self.seconds = {**method.objects, **objects}, sampler, seconds
        self.transforms = list(randomizables(transform))
        self.kept: dict | None = None
        self.saved = time.monotonic()

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.first_batch)
        if processes.number():
            return
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)
        engine.add_event_handler(Events.COMPLETED, lambda engine: self.path.unlink(missing_ok=True))

    def resume(self, engine: Engine) -> int:
        """Read the file and set the iteration from which ``engine`` continues; returns it, 0 if there is no file."""
        if not self.path.exists():
            return 0
        self.kept = read_checkpoint(self.path)
        engine.state.iteration = self.kept["iteration"]
        engine.state.epoch = self.kept["iteration"] // engine.state.epoch_length
        return engine.state.iteration

    def started(self, engine: Engine) -> None:
        self.saved = time.monotonic()
        if self.kept is not None:
            for name, thing in self.objects.items():
                thing.load_state_dict(self.kept["objects"][name])
            if getattr(engine, "scaler", None) is not None and self.kept["scaler"]:
                engine.scaler.load_state_dict(self.kept["scaler"])

    def first_batch(self, engine: Engine) -> None:
        """Set the random states as late as possible, because components draw random numbers while they are built."""
        if self.kept is None:
            return
        states, self.kept = self.kept["random"], None
        random.setstate((states["python"][0], tuple(states["python"][1]), states["python"][2]))
        np.random.set_state(states["numpy"])  # noqa: NPY002 - MONAI draws from it
        torch.set_rng_state(states["torch"])
        for device, state in enumerate(states["cuda"]):
            torch.cuda.set_rng_state(state, device)
        for transform, state in zip(self.transforms, states["transforms"], strict=True):
            transform.R.set_state(state)
        self.sampler.set_state(states["sampler"])

    def iteration_completed(self, engine: Engine) -> None:
        if engine.state.iteration % engine.state.epoch_length:
            self.save(engine)

    def epoch_completed(self, engine: Engine) -> None:
        """Save after an epoch's last iteration and its handlers, e.g. validation; if interrupted, both are repeated."""
        if engine.state.epoch < engine.state.max_epochs:
            self.save(engine)

    def save(self, engine: Engine) -> None:
        """Write the file if ``seconds`` have passed."""
        if time.monotonic() - self.saved < self.seconds:
            return
        python = random.getstate()
        scaler = getattr(engine, "scaler", None)
        content = {
            "iteration": engine.state.iteration,
            "objects": {name: thing.state_dict() for name, thing in self.objects.items()},
            "scaler": {} if scaler is None else scaler.state_dict(),
            "random": {
                "python": [python[0], list(python[1]), python[2]],
                "numpy": plain(np.random.get_state()),  # noqa: NPY002
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
                "transforms": [plain(transform.R.get_state()) for transform in self.transforms],
                "sampler": self.sampler.state(),
            },
        }
        write_torch(self.path, content)
        self.saved = time.monotonic()


def plain(state: Iterable) -> tuple:
    """A numpy random state as plain Python types: (name, keys, position, has gauss, gauss)."""
    name, keys, *rest = state
    return (str(name), [int(key) for key in keys], int(rest[0]), int(rest[1]), float(rest[2]))
