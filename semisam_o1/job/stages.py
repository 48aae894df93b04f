"""The stages of a job as values: the name, the config ids it depends on, and the function that runs it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from semisam_o1 import processes
from semisam_o1.data.reader import ScanError
from semisam_o1.errors import chain, of_the_machine, plainly
from semisam_o1.job import together
from semisam_o1.round_0.copy_maker import plans
from semisam_o1.round_0.passes import FirstPass
from semisam_o1.round_0.places import is_turned, turn_between
from semisam_o1.round_0.turned_scans import lacks_turned
from semisam_o1.types import Case

if TYPE_CHECKING:
    from semisam_o1.job.job import Job

log = logging.getLogger("semisam_o1")


Cases = Sequence[Case] | None


@dataclass(frozen=True)
class Stage:
    """One step of a job. Stages exchange data only through files in the run folder, so each can be repeated by itself.

    Attributes:
        name: the step's name in ``progress.json`` and for ``--restart-from``.
        title: the step's name in the log and in ``run.json``.
        work: runs the step for a job, a round and some cases; for None, all cases of the step.
        lacking: the cases whose results of the finished step are not on disk; ``later``: also those that only later
            steps need.
        ids: the config ids that ``work`` builds. A change in any id that they depend on makes the step stale.
        round: the round of the step; 0 before the first round.
        wanted: the id of a setting that switches the step on.
    """

    name: str
    title: str
    work: Callable[[Job, int, Cases], None]
    lacking: Callable[[Job, int, bool], list[Case]]
    ids: tuple[str, ...]
    round: int = 0
    wanted: str | None = None

    def needs(self) -> tuple[str, ...]:
        return (*self.ids, self.wanted) if self.wanted else self.ids


# Before the first round.


def features(job: Job, round: int, cases: Cases = None) -> None:
    """Compute the features of every scan; for oblique scans also in their stored axes."""
    cohort, config = job.cohort, job.config
    scans = config.build("feature_cases")
    over_scans(job, "features", scans, lambda cases: config.build("features#evaluator", feature_cases=cases))
    templates = [cohort.grid(case).affine for case in cohort.templates]
    oblique = [
        case
        for case in cohort.split(config.setting("split"))
        if any(is_turned(turn_between(cohort.grid(case).affine, template)) for template in templates)
    ]
    if oblique and config.setting("feature_spacing"):

        def of_stored_axes(cases: list[Case]) -> Any:
            return config.build("features#evaluator", frame="stored", feature_cases=cases)

        over_scans(job, "features", oblique, of_stored_axes)


def lacking_features(job: Job, round: int, later: bool) -> list[Case]:
    cases = [*job.cohort.templates, *labelled_cases(job)]
    return job.config.build("store").missing(cases) if later else []


def first_pass(job: Job, round: int, cases: Cases = None) -> None:
    """Propagate the template's label to every scan. A scan on which this fails is set aside."""
    cases = cases_of_round_0(job) if cases is None else cases
    job.record.fail(over_cases(job, job.config.build("propagation#first_pass"), cases))


def lacking_first_pass(job: Job, round: int, later: bool) -> list[Case]:
    if not job.config.setting("label_fusion") and (found := lacking_labels(job, round, later)):
        return found
    folder = job.run_folder.round(0)
    records, copied = folder.work("first"), folder.copied
    store = job.config.build("store") if later else None

    def whole(case: Case) -> bool:
        if not copied(case.name).is_file() or (later and not records.has(case.name, "uncertainty")):
            return False
        return store is None or not lacks_turned(store, case, FirstPass.load(records, case.name, "frame").frame)

    return [case for case in cases_of_round_0(job) if not whole(case)]


def label_fusion(job: Job, round: int, cases: Cases = None) -> None:
    """Multi-atlas label fusion: fuse each label with those of the most similar scans."""
    over_cases(job, job.config.build("propagation#label_fusion"), cases_of_round_0(job) if cases is None else cases)
    job.record.stale = []
    job.record.write()


def lacking_labels(job: Job, round: int, later: bool) -> list[Case]:
    """Of round 0: labels and confidences, those that corrections made stale included."""
    folder, stale = job.run_folder.round(0), job.record.stale
    files = (folder.label, folder.confidence)
    return [
        case
        for case in cases_of_round_0(job)
        if case.name in stale or not all(file(case.name).is_file() for file in files)
    ]


def copies(job: Job, round: int, cases: Cases = None) -> None:
    """Make and label copies of the template, which calibrate the quality estimate."""
    count, encoder = int(job.config.setting("template_copies")), job.config.build("store").encoder
    if encoder.patch_size > 1:
        log.info("no copies of the template: the encoder's tokens are coarser than voxels, usual factors serve")
        return
    names = [case.name for case in labelled_cases(job)]
    todo = plans(job.run_folder.round(0).work("first"), names, count)
    if todo:
        job.config.build("propagation#copies").run(todo, max_epochs=1, epoch_length=len(todo))


def lacking_copies(job: Job, round: int, later: bool) -> list[Case]:
    """None: copies serve a calibration that is made once."""
    return []


def quality(job: Job, round: int, cases: Cases = None) -> None:
    """Estimate the quality of a round's final labels without truth."""
    cases = judged_cases(job) if cases is None else cases
    if not cases and job.cohort.touched:
        log.info("people gave every label: no quality to estimate")
        return
    over_cases(job, job.config.build("propagation#quality", round), cases)


def lacking_quality(job: Job, round: int, later: bool) -> list[Case]:
    folder = job.run_folder.round(round)
    found = folder.quality.read()
    return [case for case in judged_cases(job) if case.name not in found]


def cases_of_round_0(job: Job) -> list[Case]:
    """The templates, if there are several, and `labelled_cases`: each labelled scan is an atlas for the others."""
    several = len(job.cohort.templates) > 1 and not job.config.setting("published_terms")
    return [*(job.cohort.templates if several else ()), *labelled_cases(job)]


def judged_cases(job: Job) -> list[Case]:
    """`labelled_cases` for which no person gave a label."""
    return [case for case in labelled_cases(job) if case.name not in job.cohort.touched]


def labelled_cases(job: Job) -> list[Case]:
    """The cases of the split that are not set aside."""
    return [case for case in job.cohort.split(job.config.setting("split")) if case.name not in job.record.set_aside]


def over_cases(job: Job, engine: Any, cases: Cases = None) -> dict[str, str]:
    """Run an engine over ``cases``, by default `labelled_cases`; returns the failed cases with reasons."""
    cases = labelled_cases(job) if cases is None else cases
    if not cases:
        raise job.cohort.none_left()
    engine.run(cases, max_epochs=1, epoch_length=len(cases))
    return engine.state.failed


def over_scans(job: Job, what: str, cases: Sequence[Case], build: Callable[[list[Case]], Any]) -> None:
    """Run a MONAI evaluator, built for some cases, over ``cases``. A scan on which it fails is set aside.

    The evaluator is then built for the others and runs again: its handlers write tables when it is done.
    """
    kept = [case for case in cases if case.name not in job.record.set_aside]
    while kept:
        evaluator = build(kept)
        if not len(evaluator.data_loader.dataset):
            return
        try:
            evaluator.run()
        except Exception as error:
            case = _failed_on(error, evaluator, kept)
            if not _set_aside(job, what, error, case):
                raise
            kept = [other for other in kept if other != case]
        else:
            return


def _failed_on(error: Exception, evaluator: Any, cases: Sequence[Case]) -> Case | None:
    """The case on which an evaluator failed: the dataset names it, or it was on its way through the network."""
    batch = getattr(evaluator.state, "batch", None)
    seen = batch["case"][0] if isinstance(batch, dict) and "case" in batch else None
    return _named_by(error, cases) or next((case for case in cases if case.name == seen), None)


def _named_by(error: Exception, cases: Sequence[Case]) -> Case | None:
    """The case that a `ScanError` among an error and its causes names."""
    named = next((part.case for part in chain(error) if isinstance(part, ScanError)), None)
    return next((case for case in cases if case.name == named), None)


def _set_aside(job: Job, what: str, error: Exception, case: Case | None) -> bool:
    """Set a scan aside on which a stage failed; False if the error is no fault of a single scan of the pool."""
    nobodys = any(of_the_machine(part) or isinstance(part, KeyboardInterrupt) for part in chain(error))
    if case is None or case.split == "template" or nobodys:
        return False
    reason = case.scrubbed(plainly(error) or [*chain(error)][-1])
    log.warning("case %s: %s failed and the scan is set aside: %s", case.name, what, reason)
    job.record.fail({case.name: f"{what} failed: {reason}"})
    return True


# Of each round.


def train(job: Job, round: int, cases: Cases = None) -> None:
    """Train a round; continues an interrupted training. A pool scan on which it fails is set aside.

    Several processes cannot set a scan aside once they train.
    """
    while True:
        trains = False
        try:
            parts = together.parts_of(job.config, job.cohort, round)
            trains = True
            if done := parts["state"].resume(parts["trainer"]):
                log.info("training continues from iteration %d", done)
            job.tracking.follow(parts["trainer"], round, resumed=done > 0)
            together.run(parts)
            return
        except Exception as error:
            alone = processes.count() == 1 or not trains
            if not alone or not _set_aside(job, "training", error, _named_by(error, job.cohort.pool)):
                raise
            job.run_folder.round(round).training_state.unlink(missing_ok=True)  # of a training with that scan


def lacking_model(job: Job, round: int, later: bool) -> list[Case]:
    """All templates if the model is gone: it is trained once more."""
    return [] if job.run_folder.round(round).model.is_file() else list(job.cohort.templates)


def predict(job: Job, round: int, cases: Cases = None) -> None:
    """Predict ``cases``; by default all of the pool, validation and test splits."""
    scans = job.config.build("predict#cases") if cases is None else list(cases)
    over_scans(
        job, "prediction", scans, lambda some: job.config.build("predict#evaluator", round, **{"predict#cases": some})
    )
    if cases is None:
        predict_copies(job, round)


def predict_copies(job: Job, round: int) -> None:
    """Predict the copies of the template, which tell how the round's labels compare with those of round 0."""
    folder = job.run_folder.round(0)
    copies = [Case(name, folder.copy(name), None, "copy") for name in folder.work("copies").names()]
    if not copies:
        return
    changed = {
        "predict#cases": copies,
        "predict#evaluator#val_handlers#1#_target_": "semisam_o1.handlers.copy_predictions",
        "predict#evaluator#val_handlers#2#what": "prediction of copies",
        "window": None,  # intensities of copies are normalised
    }
    job.config.build("predict#evaluator", round, **changed).run()


def lacking_predictions(job: Job, round: int, later: bool) -> list[Case]:
    folder = job.run_folder.round(round)
    found, scans = folder.uncertainty.read(), (*job.cohort.pool, *job.cohort.val, *job.cohort.test)
    cases = [case for case in scans if case.name not in job.record.set_aside]
    files, kept = (folder.prediction, folder.uncertainty_map), folder.work("predicted").path

    def whole(case: Case) -> bool:
        there = case.name in found and all(file(case.name).is_file() for file in files)
        return there and (case.split != "pool" or not later or kept(case.name).is_file())

    return [case for case in cases if not whole(case)]


def refine(job: Job, round: int, cases: Cases = None) -> None:
    """Refine the round's predictions where the network is uncertain, all of them: the guard judges them together."""
    off = job.run_folder.refinement_off_before(round)
    if off:
        log.info("refinement stays switched off")
    no_votes = {"_target_": "semisam_o1.refinement.kinds.no_votes", "_mode_": "callable"}
    engine = job.config.build("refinement#engine", round, **({"refinement#propose": no_votes} if off else {}))
    kept = job.run_folder.round(round).refined if cases is not None else None
    pool = [case for case in job.cohort.pool if case.name not in job.record.set_aside]
    pool = [case for case in pool if kept is None or case.name in kept]
    if not pool:
        raise job.cohort.none_left()
    engine.run(pool, max_epochs=1, epoch_length=len(pool))
    untouched = [case for case in pool if case.name not in job.cohort.touched]
    log.info("refinement replaced %d of %d labels", len(engine.state.replaced), len(untouched))


def lacking_refined(job: Job, round: int, later: bool) -> list[Case]:
    """Scans that came after the refinement have none: their labels are the predictions."""
    folder = job.run_folder.round(round)
    pool = [case for case in job.cohort.pool if case.name not in job.record.set_aside]
    if folder.refined is None:
        return pool
    return [case for case in pool if case.name in folder.refined and not folder.label(case.name).is_file()]


# All stages in order.

FIRST, FUSION = "propagation/first", "propagation/fusion"
ROUND_0 = (
    Stage("features", "features", features, lacking_features, ("features#evaluator", "cohort", "split")),
    Stage(
        FIRST, "propagation", first_pass, lacking_first_pass,
        ("propagation#first_pass", "cohort", "seed"),
    ),
    Stage(
        FUSION, "label fusion", label_fusion, lacking_labels,
        ("propagation#label_fusion",), wanted="label_fusion",
    ),
    Stage(
        "propagation/copies", "copies of the template", copies, lacking_copies,
        ("propagation#copies", "template_copies"), wanted="quality_estimate",
    ),
    Stage(
        "propagation/quality", "round 0: quality", quality, lacking_quality,
        ("propagation#quality",), wanted="quality_estimate",
    ),
)  # fmt: skip


def round_stages(number: int, refined: bool = True) -> tuple[Stage, ...]:
    """The stages of round ``number`` (1, 2, ...); ``refined``: whether its predictions are refined."""

    def stage(name: str, work: Callable, lacking: Callable, *ids: str, wanted: str | None = None) -> Stage:
        return Stage(f"round_{number}/{name}", f"round {number}: {name}", work, lacking, ids, number, wanted)

    refinement = [stage("refinement", refine, lacking_refined, "refinement#engine")] if refined else []
    return (
        stage("training", train, lacking_model, "train"),
        stage("prediction", predict, lacking_predictions, "predict#evaluator"),
        *refinement,
        stage("quality", quality, lacking_quality, "propagation#quality", wanted="quality_estimate"),
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


def lacking(job: Job, done: Sequence[str], complete: bool) -> dict[str, list[Case]]:
    """Finished step -> the cases whose results are not on disk, in the order of steps.

    ``complete``: no step is left to do after ``done``, so results that only later steps need may be gone.
    """
    found: dict[str, list[Case]] = {}
    for stage in map(stage_named, reversed(done)):
        wanted = not stage.wanted or job.config.setting(stage.wanted)
        if wanted and (cases := stage.lacking(job, stage.round, bool(found) or not complete)):
            found[stage.name] = cases
    found = {name: found[name] for name in reversed(found)}
    if FIRST in found and FUSION in done and job.config.setting("label_fusion"):  # it replaces the first pass's labels
        found[FUSION] = list(dict.fromkeys([*found[FIRST], *found.get(FUSION, [])]))
    return found
