"""The command ``semisam-o1 review RUN``: the steps that people take, what they gave, and who is next and why."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.folders import composed, match
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.features import FeatureStore
from semisam_o1.job.claim import recover
from semisam_o1.job.reopen import cohort_of
from semisam_o1.lock import lock_folder
from semisam_o1.review.corrections import Corrections
from semisam_o1.review.ranking import DEFAULT, REASONS, Known, known_of, order
from semisam_o1.reviewed import REJECTED, Entry, Reviewed
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import DatasetError, UserError

log = logging.getLogger("semisam_o1")
NEXT = "next: "  # before the name of the scan to look at next
HELPS = "helps N other scans: so many resemble this scan more than they resemble any labelled scan"


def review(
    run_dir: str | Path,
    accept: Sequence[str] = (),
    take: Sequence[str | Path] = (),
    case: str | None = None,
    reject: Sequence[str] = (),
    undo: Sequence[str] = (),
    submitted: Sequence[Path] = (),
    pseudonyms: str | Path | None = None,
    strategy: str = DEFAULT,
    dataset_dir: str | Path | None = None,
    finals: Sequence[Path] = (),
) -> tuple[str, bool]:
    """Take the steps, then the table of all scans of the pool; and whether every step could be taken.

    A step that cannot be taken is named in a warning, and the others are taken. Labels that were saved in place are
    taken too.

    Args:
        accept: cases whose label is right as it is. take: files of corrected labels; ``case``: whose the one file is,
            if its name does not say it. reject: cases that leave the pool. undo: cases whose last step is taken back.
        submitted: labels that a person submitted in MONAI Label, in files named after their cases. finals: the same in
            a studies folder, where all of them stay; one that was given before is not taken again.
        pseudonyms: the key of a run under pseudonyms. dataset_dir: where the data set is now, if it was moved.

    Raises:
        DatasetError: there is no run, it is being worked on, or its data set is not there; or two of the steps
            contradict each other. Nothing is done then.
    """
    run = RunFolder(run_dir)
    if case is not None and len(take) != 1:
        raise DatasetError(f"--as {case} names the case of one file; --take has {len(take)}.")
    case = composed(case) if case else None
    cohort = cohort_of(run, dataset_dir, pseudonyms, check=False)
    cohort = cohort.without(run.read_record().get("failed", {}))
    accept, reject, undo = ([composed(name) for name in names] for names in (accept, reject, undo))
    named = [(case or match(Path(path).name, [one.name for one in cohort.cases]), f"--take {path}") for path in take]
    for option, names in (("accept", accept), ("reject", reject), ("undo", undo)):
        named += [(name, f"--{option} {name}") for name in dict.fromkeys(names)]
    refuse_contradictions(named)
    with lock_folder(run.path):
        recover(run)
        corrections, refused = Corrections(run, cohort), 0
        steps = [("accept", name, None) for name in accept] + [("take", path, case) for path in take]
        steps += [("take", path, None) for path in submitted] + [("take new", path, None) for path in finals]
        steps += [("reject", name, None) for name in reject] + [("undo", name, None) for name in undo]
        saved, unfit = corrections.take_saved(but={str(name) for name in undo})  # first: a step is a later word
        for entry in saved:
            log.info("case %s: your label in pseudo_labels is taken as %s", entry.case, said(entry))
        for what, of, whose in steps:
            try:
                _step(corrections, what, of, whose)
            except UserError as error:
                log.warning("%s", error)
                refused += 1
        return table(run, cohort, corrections.reviewed.entries(), strategy), not (refused or unfit)


def refuse_contradictions(steps: Sequence[tuple[str, str]]) -> None:
    """Refuse several steps of one case. ``steps``: the case of each, and the option that asks for it.

    Raises:
        DatasetError: a case has several.
    """
    options: dict[str, list[str]] = {}
    for case, option in steps:
        options.setdefault(case, []).append(option)
    several = [f"case {case}: {' and '.join(found)}" for case, found in options.items() if len(found) > 1]
    if several:
        raise DatasetError(f"{'; '.join(several)}: expected one step a case. Nothing was done; name one of them.")


def _step(corrections: Corrections, what: str, of: Any, case: str | None) -> None:
    if what == "undo":
        before = corrections.undo(of)
        log.info("case %s: %s", of, f"is {said(before)} again" if before else "is untouched again")
        return
    if what == "take new":
        if corrections.had(of):
            return
        what = "take"
    known = corrections.reviewed.rows()
    entry = corrections.take(of, case) if what == "take" else getattr(corrections, what)(of)
    if entry is None:
        log.info("%s: the label of a template, as in the data set: it counts already", of)
        return
    log.info("case %s: %s%s", entry.case, said(entry), " already" if entry == known.get(entry.case) else "")


def said(entry: Entry) -> str:
    """An entry in words."""
    if entry.voxels_changed:
        return f"{entry.what} ({entry.voxels_changed:,} voxels changed, Dice {entry.dice:.3f} with the proposal)"
    return entry.what


def table(run: RunFolder, cohort: Cohort, entries: dict[str, Entry], strategy: str = DEFAULT) -> str:
    """The table of the scans of the pool: what people gave, then the untouched ones, who is next first, and why."""
    labels = Reviewed(run.reviewed).labels()
    rejected = [name for name, entry in entries.items() if entry.what == REJECTED]
    cohort = cohort.with_reviewed(labels, rejected)
    record = run.read_record()
    folder = run.round(record.get("labels_round", record.get("best_round", 0)))
    quality = folder.quality.read()
    lines = [f"{'case':28} {'state':10} {'predicted Dice':>14}  why"]
    for name, entry in entries.items():
        lines.append(f"{name[:28]:28} {entry.what:10} {'':14}  {_why_touched(entry)}")
    names, known = known_of(run, cohort, FeatureStore(run.features, mind(), None), folder)
    ranked = [(names[i], why(known, i)) for i in order(known, strategy)] if names else []
    left = [(case.name, "") for case in cohort.untouched if case.name not in names]
    for name, reason in [*ranked, *left]:
        dice = quality.get(name, {}).get("predicted_dice")
        shown = "cannot tell" if dice is None else f"{dice:.3f}"
        lines.append(f"{name[:28]:28} {'untouched':10} {shown:>14}  {reason}")
    explained = ["", HELPS] if ranked else []
    counts = f"{len(entries)} of {len(cohort.pool) + len(rejected)} scans reviewed"
    following = f"; {NEXT}{ranked[0][0]} ({REASONS[strategy]})" if ranked else ""
    news = sum(_is_new(record, entry) for entry in entries.values())
    wait = f"; new for the next start of the run: {news}" if news else ""
    return "\n".join([*lines, *explained, "", counts + following + wait])


def _is_new(record: dict, entry: Entry) -> bool:
    """Whether a run has not learned from an entry yet."""
    last = (record.get("corrections") or [{"labels": {}, "rejected": []}])[-1]
    if entry.what == REJECTED:
        return entry.case not in last["rejected"]
    return last["labels"].get(entry.case) != entry.sha256


def _why_touched(entry: Entry) -> str:
    changed = "" if not entry.voxels_changed else f", {entry.voxels_changed:,} voxels changed, Dice {entry.dice:.3f}"
    of = "" if entry.round is None else f", label of round {entry.round}"
    return f"{entry.when}{of}{changed}"


def why(known: Known, i: int) -> str:
    """Why a scan stands where it stands: how many scans it is nearer to than any labelled scan; HELPS explains it."""
    nearer = known.distances[:, i] < known.served
    nearer[i] = False
    count = int(np.sum(nearer))
    return f"helps {count or 'no'} other scan{'s' if count > 1 else ''}"
