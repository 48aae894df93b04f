"""The training of a round on one or several processes of torchrun: the first runs the job, the others train along."""

from __future__ import annotations

import math
from typing import Any

from ignite.engine import Events
from monai.utils import set_determinism

from semisam_o1 import processes
from semisam_o1.data.cohort import Cohort
from semisam_o1.job.config import JobConfig
from semisam_o1.literals import as_config

APART = 10007  # between the seeds of two processes, so that each draws batches of its own


class Helper:
    """In place of the `Job` in every process but the first: trains along in each round, until the first ends."""

    def run(self) -> None:
        while (told := processes.from_first()) is not None:
            raw, cohort, round = told
            config = JobConfig(raw | {"device": as_config(processes.device())})
            config.cohort = cohort
            set_determinism(seed_of(config) + round)
            try:
                parts = everywhere(config, round)
            except Exception:  # noqa: BLE001, S112 - the first process says why, or goes on without a scan
                continue
            run(parts)

    propagate = run

    def alone(self, name: str, round: int = 0) -> None:
        self.run()


def parts_of(config: JobConfig, cohort: Cohort, round: int) -> dict[str, Any]:
    """The parts of the id ``train`` for a round, in this process and in the others, which begin to wait for `run`."""
    if processes.count() > 1:
        processes.from_first((config.raw, cohort, round))
    return everywhere(config, round)


def everywhere(config: JobConfig, round: int) -> dict[str, Any]:
    """The parts of the id ``train``: of several processes each has batches and a share of the iterations of its own.

    Raises:
        Exception: building failed in a process; the others raise then, too.
    """
    if processes.count() == 1:
        return config.build("train", round)
    parts, failure = {}, None
    try:
        iterations = shared_length(config.build("iterations", round), processes.count())
        parts = config.build("train", round, iterations=iterations, seed=seed_of(config))
    except Exception as error:  # noqa: BLE001 - it is raised below, when the others know
        failure = error
    found = processes.of_all(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    if others := [f"process {number}: {text}" for number, text in enumerate(found) if text is not None]:
        raise RuntimeError("; ".join(others))
    return parts


def run(parts: dict[str, Any]) -> None:
    """Run the trainer of ``parts``. Several processes start from the first one's state and average their gradients."""
    trainer = parts["trainer"]
    network = trainer.network
    if processes.count() > 1:
        position = trainer.state.iteration, trainer.state.epoch
        trainer.state.iteration, trainer.state.epoch = processes.from_first(position)
        trainer.network = processes.shared(network)
        trainer.add_event_handler(Events.STARTED, lambda: processes.same_states(parts["state"].objects))
    trainer.run()
    trainer.network = network


def shared_length(iterations: int, count: int) -> int:
    """The iterations of each of ``count`` processes, which see as many patches together as one process does alone.

    Above 10 they are rounded to a multiple of 10, because a prime number would have epochs of one iteration.
    """
    share = math.ceil(iterations / count)
    return round(share / 10) * 10 if share > 10 else share


def seed_of(config: JobConfig) -> int:
    """The seed of this process."""
    return int(config.setting("seed")) + APART * processes.number()
