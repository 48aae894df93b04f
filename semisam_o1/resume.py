"""A killed run goes on where it was: the journal of its steps, its lock, and the state of a training."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from ignite.engine import Engine, Events
from monai.transforms import Compose, Randomizable

from semisam_o1.files import whole, write_json, write_text
from semisam_o1.types import DatasetError

# What may change from one start to the next without making results stale.
FREE = (
    "output_dir",
    "round_dir",
    "judged_dir",
    "num_rounds",
    "most_rounds",
    "least_change",
    "worth_tolerance",
    "checkpoint_seconds",
    "restart_from",
    "threads",
    "device",
    "dataset_dir",
    "imports",
    "initialize",
    "bundle_root",
)
# The first step that a changed id makes stale, by how the id begins; any other id: the first round.
STALE_FROM = (
    (("feature", "encoder", "intensities", "image_key", "spacing", "store", "frame", "data", "cohort"), "features"),
    (("template", "labeled_num", "split"), "features"),  # of other scans; those that are fresh are kept
    (("num_classes", "binary_label", "propagation", "second_pass", "published", "seed"), "propagation"),
    (("view", "overlap", "one_piece"), "round_1/prediction"),
    (("refine", "guard", "least_gain", "unsure", "knn_k", "uncertainty_quantile"), "round_1/refinement"),
)
FIRST_ROUND = "round_1"


class Journal:
    """``RUN/progress.json``: with which settings a run was begun, and which of its steps are whole, in their order.

    Args:
        path: of the file.
        settings: what results depend on, as JSON keeps it; ids in FREE are left out.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]):
        self.path = Path(path)
        self.settings = json.loads(json.dumps({k: v for k, v in settings.items() if k not in FREE}, default=str))
        self.done: list[str] = []
        self.half_done_fits = False  # whether what the first step not done has left may be used

    def open(self, restart_from: str | None = None) -> bool:
        """Take up the steps of an earlier start; False if there is none.

        Raises:
            DatasetError: settings have changed since, which makes finished steps stale, and ``restart_from`` names
                no step early enough.
        """
        if not self.path.exists():
            return False
        kept = json.loads(self.path.read_text(encoding="utf-8"))
        self.done = kept["done"]
        if restart_from is not None:
            if not re.fullmatch(r"(features|propagation|round_[1-9]\d*)(/\w+)?", restart_from):
                raise DatasetError(f"restart_from '{restart_from}': expected features, propagation, round_1, ...")
            if (number := round_of(restart_from)) > round_of(self.done[-1] if self.done else "") + 1:
                raise DatasetError(f"restart_from '{restart_from}': the run has not come to round {number} yet.")
            self.done = self.done[: self._first(restart_from)]
        old = kept["settings"]
        changed = sorted(k for k in {*old, *self.settings} if old.get(k) != self.settings.get(k))
        stale = min((stale_from(name) for name in changed), key=self._first, default=None)
        if stale is not None and self._first(stale) < len(self.done):
            said = "; ".join(
                f"{name} was {short(old.get(name))}, is {short(self.settings.get(name))}" for name in changed
            )
            raise DatasetError(
                f"{self.path.parent} was begun with other settings ({said}), so its results from '{stale}' on do not "
                f"fit. Name another folder, take the old settings, or say --restart-from {stale}."
            )
        self.half_done_fits = restart_from is None and not changed
        self._write()
        return True

    def begin(self) -> None:
        """Forget every step."""
        self.done = []
        self._write()

    def add(self, step: str) -> None:
        self.done.append(step)
        self._write()

    def _first(self, step: str) -> int:
        """How many of the steps done come before ``step`` or its parts ("round_1" of "round_1/training")."""
        parts = (number for number, name in enumerate(self.done) if f"{name}/".startswith(f"{step}/"))
        return next(parts, len(self.done))

    def _write(self) -> None:
        write_json(self.path, {"done": self.done, "settings": self.settings})


def round_of(step: str) -> int:
    """The round that a step belongs to; 0 before the first."""
    return int(step.split("/")[0].removeprefix("round_")) if step.startswith("round_") else 0


def stale_from(name: str) -> str:
    """The first step whose result depends on the id ``name``."""
    return next((step for begins, step in STALE_FROM if name.startswith(begins)), FIRST_ROUND)


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextlib.contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """``folder`` for this process alone; freed with the process, however it ends.

    Raises:
        DatasetError: another process works there; it is named.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / ".holder"
    try:
        with FileLock(folder / ".lock", timeout=0):
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            write_text(holder, f"process {os.getpid()} on {socket.gethostname()}, since {since}")
            try:
                yield
            finally:
                holder.unlink(missing_ok=True)
    except Timeout as error:
        who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise DatasetError(f"{folder} is being worked on by {who}.") from error


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
        path: of the file.
        objects: name -> anything with ``state_dict`` and ``load_state_dict``.
        sampler: with ``state`` and ``set_state``. transform: the dataset's.
        seconds: from one file to the next; at most so much work is lost, and one iteration or validation.
    """

    def __init__(self, path: str | Path, objects: Mapping[str, Any], sampler, transform, seconds: float = 60.0):
        self.path, self.objects, self.sampler, self.seconds = Path(path), dict(objects), sampler, seconds
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
        np.random.set_state(states["numpy"])
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
                "numpy": plain(np.random.get_state()),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
                "transforms": [plain(transform.R.get_state()) for transform in self.transforms],
                "sampler": self.sampler.state(),
            },
        }
        with whole(self.path) as aside:
            torch.save(content, aside)
        self.saved = time.monotonic()


def plain(state: Iterable) -> tuple:
    """A numpy random state without numpy's types: (name, keys, position, has gauss, gauss)."""
    name, keys, *rest = state
    return (str(name), [int(key) for key in keys], int(rest[0]), int(rest[1]), float(rest[2]))
