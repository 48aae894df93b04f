"""The stages of a job as values: the name, the config ids it depends on, and the function that runs it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from semisam_o1.round_0.alignment import is_turned, turn_between
from semisam_o1.types import Case, DatasetError

if TYPE_CHECKING:
    from semisam_o1.job.job import Job

log = logging.getLogger("semisam_o1")


@dataclass(frozen=True)
class Stage:
    """One step of a job. Stages exchange data only through files in the run folder, so each can be repeated by itself.

    Attributes:
        name: the step's name in ``progress.json`` and for ``--restart-from``.
        title: the step's name in the log and in ``run.json``.
        work: runs the step for a job and a round.
        ids: the config ids that ``work`` builds. A change in any id that they depend on makes the step stale.
        round: the round of the step; 0 before the first round.
        wanted: the id of a setting that switches the step on.
    """

    name: str
    title: str
    work: Callable[[Job, int], None]
    ids: tuple[str, ...]
    round: int = 0
    wanted: str | None = None

    def needs(self) -> tuple[str, ...]:
        return (*self.ids, self.wanted) if self.wanted else self.ids


# Before the first round.


def features(job: Job, round: int) -> None:
    """Compute the features of every scan; for oblique scans also in their stored axes."""
    cohort, config = job.cohort, job.config
    evaluators = [config.build("features#evaluator")]
    templates = [cohort.grid(case).affine for case in cohort.templates]
    oblique = [
        case
        for case in cohort.split(config.setting("split"))
        if any(is_turned(turn_between(cohort.grid(case).affine, template)) for template in templates)
    ]
    if oblique and config.setting("feature_spacing"):
        evaluators.append(config.build("features#evaluator", frame="stored", feature_cases=oblique))
    for evaluator in evaluators:
        if len(evaluator.data_loader.dataset):
            evaluator.run()


def first_pass(job: Job, round: int) -> None:
    """Propagate the template's label to every scan. A scan on which this fails is set aside."""
    job.record.set_aside |= over_cases(job, job.config.build("propagation#first_pass"))


def label_fusion(job: Job, round: int) -> None:
    """Multi-atlas label fusion: fuse each label with those of the most similar scans."""
    over_cases(job, job.config.build("propagation#label_fusion"))


def quality(job: Job, round: int) -> None:
    """Estimate the quality of a round's final labels without truth."""
    over_cases(job, job.config.build("propagation#quality", round))


def over_cases(job: Job, engine: Any) -> dict[str, str]:
    """Run an engine over the cases of the split that are not set aside; returns the failed cases with reasons."""
    aside = job.record.set_aside
    cases = [case for case in job.cohort.split(job.config.setting("split")) if case.name not in aside]
    if not cases:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(aside.items())[:3])
        raise DatasetError(f"No usable scan is left ({reasons}).")
    engine.run(cases, max_epochs=1, epoch_length=len(cases))
    return engine.state.failed


# Of each round.


def train(job: Job, round: int) -> None:
    """Train a round; continues an interrupted training."""
    parts = job.config.build("train", round)
    if done := parts["state"].resume(parts["trainer"]):
        log.info("training continues from iteration %d", done)
    parts["trainer"].run()


def predict(job: Job, round: int, cases: Sequence[Case] | None = None) -> None:
    """Predict ``cases``; by default all of the pool, validation and test splits."""
    changed = {} if cases is None else {"predict#cases": list(cases)}
    job.config.build("predict#evaluator", round, **changed).run()


def refine(job: Job, round: int) -> None:
    """Refine the round's predictions where the network is uncertain."""
    off = job.run_folder.refinement_off_before(round)
    if off:
        log.info("refinement stays switched off")
    no_votes = {"_target_": "semisam_o1.refinement.kinds.no_votes", "_mode_": "callable"}
    engine = job.config.build("refinement#engine", round, **({"refinement#propose": no_votes} if off else {}))
    cases = [case for case in job.cohort.pool if case.name not in job.record.set_aside]
    engine.run(cases, max_epochs=1, epoch_length=len(cases))
    log.info("refinement replaced %d of %d labels", len(engine.state.replaced), len(cases))


# All stages in order.

ROUND_0 = (
    Stage("features", "features", features, ("features#evaluator", "cohort", "split")),
    Stage("propagation/first", "propagation", first_pass, ("propagation#first_pass", "cohort", "seed")),
    Stage("propagation/fusion", "label fusion", label_fusion, ("propagation#label_fusion",), wanted="label_fusion"),
    Stage("propagation/quality", "round 0: quality", quality, ("propagation#quality",), wanted="quality_estimate"),
)


def round_stages(number: int, refined: bool = True) -> tuple[Stage, ...]:
    """The stages of round ``number`` (1, 2, ...); ``refined``: whether its predictions are refined."""

    def stage(name: str, work: Callable, *ids: str, wanted: str | None = None) -> Stage:
        return Stage(f"round_{number}/{name}", f"round {number}: {name}", work, ids, number, wanted)

    refinement = [stage("refinement", refine, "refinement#engine")] if refined else []
    return (
        stage("training", train, "train"),
        stage("prediction", predict, "predict#evaluator"),
        *refinement,
        stage("quality", quality, "propagation#quality", wanted="quality_estimate"),
    )


def stage_named(name: str) -> Stage:
    """The stage with the name of a step in ``progress.json``."""
    number = name.split("/")[0].removeprefix("round_")
    stages = round_stages(int(number)) if number.isdigit() else ROUND_0
    return next(stage for stage in stages if stage.name == name)


# Ids that only the end of a job reads. The journal does not record that step, so these ids make no step stale.
FINISH_IDS = (
    "metric_definition",
    "num_rounds",
    "most_rounds",
    "least_change",
    "quality_tolerance",
    "refine_last",
)


def remove_stale(job: Job, done: Sequence[str], half_done_fits: bool) -> None:
    """Remove results of steps that the journal does not list, so that they cannot be taken for results of this run.

    The partial results of an interrupted step stay if they fit the settings.
    """
    run = job.run_folder
    for path in (run.report, run.review, run.metrics):
        path.unlink(missing_ok=True)
    stale = [run.pseudo_labels, run.bundle]
    if "propagation/first" not in done and not half_done_fits:
        stale.append(run.round(0).path)
    for number in filter(None, run.rounds()):
        folder = run.round(number)
        half_done = folder.training_state.exists() and half_done_fits
        if f"round_{number}/training" not in done and not half_done:
            stale.append(folder.path)
    for path in stale:
        if path.is_dir():
            log.info("removing %s of an earlier run", path)
            shutil.rmtree(path)
