"""What people gave since the last start of a run: it is taken in, and what it makes stale is done again, no more.

A label of a person makes the round 0 of those scans stale whose atlases it changes, and calls for one more round of
training from the last weights. Features and alignments stay.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from semisam_o1.files import checksum, remove
from semisam_o1.job.stages import FUSION, cases_of_round_0
from semisam_o1.review.corrections import Corrections, mark
from semisam_o1.round_0.label_fusion import LabelFusion
from semisam_o1.round_0.passes import Fused
from semisam_o1.types import Case

if TYPE_CHECKING:
    from semisam_o1.job.job import Job

log = logging.getLogger("semisam_o1")
NOTHING: dict[str, Any] = {"labels": {}, "rejected": []}


def take_in(job: Job) -> dict[str, Any]:
    """Take in what people gave: the cohort knows it from here on. Returns it, for `RunRecord.corrections`."""
    corrections = Corrections(job.run_folder, job.cohort)
    if folder := job.config.setting("reviewed"):
        for entry in corrections.import_from(folder, job.record.imported):
            log.info("case %s: %s, from %s", entry.case, entry.what, folder)
            job.record.imported[entry.case] = mark(entry)
    for entry in corrections.take_saved()[0]:
        log.info("case %s: your label in pseudo_labels is taken as %s", entry.case, entry.what)
    labels, rejected = corrections.usable(), corrections.reviewed.rejected()
    job.config.cohort = job.cohort.with_reviewed(labels, rejected)
    used = {name: checksum(path) for name, path in labels.items() if name in job.cohort.touched}
    return {"labels": used, "rejected": rejected}


def is_new(job: Job, given: dict[str, Any]) -> bool:
    """Whether people gave anything, or took it back, since the last start. ``given``: see `take_in`."""
    before = learned_before(job)
    return any(given[key] != before[key] for key in NOTHING)


def learned_before(job: Job) -> dict[str, Any]:
    return job.record.corrections[-1] if job.record.corrections else NOTHING


def learn(job: Job, given: dict[str, Any], done: Sequence[str], complete: bool) -> None:
    """Remove the results that what people gave makes stale, and plan one more round if no other one is to train.

    The stale scans of round 0 stand in the record until their labels are fused again.

    Args:
        given: see `take_in`; it is new. done: the finished steps; complete: all are.
    """
    record, before = job.record, learned_before(job)
    last = max((int(step.split("/")[0][6:]) for step in done if step.startswith("round_")), default=0)
    changed = {name for name, found in before["labels"].items() if given["labels"].get(name, found) != found}
    stale = stale_scans(job, changed) if FUSION in done and job.config.setting("label_fusion") else []
    all_trained = not job.auto and last == record.rounds and f"round_{last}/training" in done
    trained = last > 0 and (complete or all_trained)
    say_plan(job, given, before, stale, last + 1 if trained else None)
    folder = job.run_folder.round(0)
    for case in stale:  # before it is recorded: a start that is killed here finds them stale again
        for path in (folder.work("fused").path(case.name), folder.label(case.name)):
            remove(path)
    if done:
        for path in (folder.quality.path, folder.calibration):
            remove(path)
    record.corrections.append({**given, "after_round": last, "round": last + 1 if trained else None})
    if trained:
        record.more_rounds += 1
        record.rounds = record.best_round = last + 1
    record.stale = sorted({*record.stale, *(case.name for case in stale)})
    record.write()


def stale_scans(job: Job, changed: Collection[str] = ()) -> list[Case]:
    """The scans of round 0 whose atlases are other ones than those that their labels come from.

    ``changed``: labelled scans that have another label since.
    """
    folder, config = job.run_folder.round(0), job.config
    pool, labelled = (int(config.build(f"propagation#label_fusion#{name}")) for name in ("atlases", "labelled_atlases"))
    cases = job.cohort.split(config.setting("split"))
    fusion = LabelFusion(config.build("store"), folder.work("first"), job.cohort, cases, pool, labelled)
    fused, stale = folder.work("fused"), []
    for case in cases_of_round_0(job):
        if not folder.work("first").has(case.name, "alignments"):
            continue
        chosen = fusion.choose(fusion.scan(case.name), {case.name})
        known = Fused.atlases_of(fused, case.name) if fused.path(case.name).is_file() else ([], [])
        if known != (chosen.labelled, chosen.pool) or not {*changed}.isdisjoint(chosen.labelled):
            stale.append(case)
    return stale


def say_plan(job: Job, given: dict, before: dict, stale: Sequence[Case], round: int | None) -> None:
    """Say what is new, what will be done, and how long that takes by the times of this run."""
    new = [name for name, found in given["labels"].items() if before["labels"].get(name) != found]
    gone = [name for name in before["labels"] if name not in given["labels"]]
    rejected = [name for name in given["rejected"] if name not in before["rejected"]]
    parts = {"labels of people": new, "taken back": gone, "rejected": rejected}
    news = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)
    seconds = {stage["stage"]: stage["seconds"] for stage in job.record.stages}
    scans = max(1, len(cases_of_round_0(job)))
    expected = seconds.get("label fusion", 0) * len(stale) / scans + seconds.get("round 0: quality", 0)
    steps = [f"label fusion again for {len(stale)} of {scans} scans"] if stale else []
    if round is not None:
        expected += sum(value for name, value in seconds.items() if name.startswith(f"round {round - 1}:"))
        steps.append(f"round {round} of training, from the weights of round {round - 1}")
    log.info("new from review: %s", news or "another order")
    log.info("to do: %s; some %.0f min", ", then ".join(steps) or "the rounds that are left", max(1, expected / 60))
