"""All that a training needs to go on to the bit after it was killed."""

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

from semisam_o1.files import atomic_write
from semisam_o1.runfolder import RunFolder


def randomizables(transform: Any) -> Iterator[Randomizable]:
    """Every transform with a random state of its own in a chain, the chain itself too."""
    if isinstance(transform, Randomizable):
        yield transform
    if isinstance(transform, Compose):
        for part in transform.transforms:
            yield from randomizables(part)
    for part in vars(transform).values() if hasattr(transform, "__dict__") else ():
        if isinstance(part, Randomizable) and part is not transform:
            yield from randomizables(part)


class TrainingState:
    """Handler: all that a training needs to go on to the bit, in one file every ``seconds``; gone when it has ended.

    Weights and optimisers under ``objects``; the iteration; the random states of Python, numpy, torch and of every
    transform; the sampler's place. Comes last of a trainer's handlers, so that what it keeps is whole. Before the
    trainer runs, `resume` tells it where to begin.

    Args:
        output_dir, round: whose training it is.
        method: its ``objects`` are kept, name -> anything with ``state_dict`` and ``load_state_dict``.
        objects: what else is, beside those.
        sampler: with ``state`` and ``set_state``. transform: the dataset's.
        seconds: from one file to the next; at most so much work is lost, and one iteration or validation.
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
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)
        engine.add_event_handler(Events.COMPLETED, lambda engine: self.path.unlink(missing_ok=True))

    def resume(self, engine: Engine) -> int:
        """From which iteration on ``engine`` will run; 0 where there is no file."""
        if not self.path.exists():
            return 0
        self.kept = torch.load(self.path, map_location="cpu", weights_only=True)
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
        """Random states are set as late as can be: whatever was built until now has drawn from them."""
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
        """An epoch's last iteration is kept with what follows it, such as a validation, or done again with it."""
        if engine.state.epoch < engine.state.max_epochs:
            self.save(engine)

    def save(self, engine: Engine) -> None:
        """Write the file, if it is time."""
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
        with atomic_write(self.path) as aside:
            torch.save(content, aside)
        self.saved = time.monotonic()


def plain(state: Iterable) -> tuple:
    """A numpy random state without numpy's types: (name, keys, position, has gauss, gauss)."""
    name, keys, *rest = state
    return (str(name), [int(key) for key in keys], int(rest[0]), int(rest[1]), float(rest[2]))
