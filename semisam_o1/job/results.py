"""The results of a finished run: final labels, review list, metrics."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from semisam_o1.data.cohort import Cohort
from semisam_o1.ledger import State
from semisam_o1.report.metrics import evaluate_folder
from semisam_o1.reviewed import Reviewed
from semisam_o1.round_0.passes import FirstPass, outside_classes
from semisam_o1.runfolder import CANNOT_TELL, CLASS_COLUMN, ODD, RoundFolder, RunFolder
from semisam_o1.tables import COUNT, TEXT, write_rows
from semisam_o1.types import Case

log = logging.getLogger("semisam_o1")
# Columns of review.csv; ``class`` is the one with the lowest predicted Dice of the scan, to look at first; ``outside``
# are those that lie outside of its field of view and are left empty; ``cannot_tell`` is why there is no predicted Dice.
# ``odd`` are classes with a volume or a place that no other scan has.
# ``reviewed`` is what a person did with the label.
REVIEW = {
    "case": TEXT, "uncertainty": ".6f", "predicted_dice": ".4f", "low": ".4f", "high": ".4f", "class": COUNT,
    "class_dice": ".4f", "outside": TEXT, ODD: TEXT, CANNOT_TELL: TEXT, "reviewed": TEXT,
}  # fmt: skip


def hand_out(folder: RoundFolder, run: RunFolder, cases: Sequence[Case], touched: Mapping[str, Path]) -> None:
    """Copy the final labels of a round to ``pseudo_labels/``, each one atomically; see `ledger` for changed ones.

    A label there that a person changed and that is not taken, because it does not fit or came while the run worked,
    stays. ``touched``: case -> the label that a person gave, which is the final one.
    """
    for case in cases:
        own, out = folder.final(case.name), run.pseudo_label(case.name)
        label = touched.get(case.name, own)
        if run.ledger.state(out) is State.CHANGED:
            known = Reviewed(run.reviewed).has(case.name, out)
            if not known or (case.split == "pool" and case.name not in touched):
                log.warning("case %s: %s is yours, not taken, and stays; the run's own is %s", case.name, out, own)
            if not known or case.name not in touched:
                continue
        if label.exists():
            with run.ledger.writing(out) as aside:
                shutil.copyfile(label, aside)


def write_review(folder: RoundFolder, run: RunFolder, cases: Sequence[Case], class_numbers: Sequence[int] = ()) -> None:
    """Write the review list: cases in order of predicted Dice of that round's label, lowest first, then uncertainty.

    Labels in doubt, of which nobody can tell the Dice, come first: they have to be looked at. Those that a person gave
    come last.
    """
    given = {name: entry.what for name, entry in Reviewed(run.reviewed).entries().items()}
    uncertainty, quality = folder.uncertainty.read(), folder.quality.read()
    rows: list[dict] = []
    records = run.round(0).work("first")
    for case in cases:
        if case.name in uncertainty:
            found = quality.get(case.name, {})
            known = {name: found.get(name) for name in ("predicted_dice", "low", "high", ODD, CANNOT_TELL)}
            number, dice = worst_class(found)
            row = {"case": case.name, **uncertainty[case.name], **known, "class": number, "class_dice": dice}
            row["reviewed"] = given.get(case.name)
            with contextlib.suppress(OSError):  # a damaged work file, of which a finished run needs nothing else
                share = FirstPass.load(records, case.name, "reached").reached
                if share is not None and class_numbers:
                    row["outside"] = " ".join(map(str, outside_classes(share, class_numbers))) or None
            rows.append(row)
    rows.sort(key=lambda r: (_trust(r), -r["uncertainty"], r["case"]))
    with run.ledger.writing(run.review) as aside:
        write_rows(aside, REVIEW, rows)


def _trust(row: Mapping[str, Any]) -> float:
    """The predicted Dice of a row; below all others if it is in doubt, above them where no quality was estimated, and
    above these if a person gave the label."""
    if row["reviewed"]:
        return 2.0
    if row[CANNOT_TELL]:
        return -1.0
    return 1.0 if row["predicted_dice"] is None else row["predicted_dice"]


def worst_class(quality: Mapping[str, Any]) -> tuple[int | None, float | None]:
    """The number of the class with the lowest predicted Dice in a row of quality.csv, and that; None if none has."""
    starts = {name: value for name, value in quality.items() if name.startswith(CLASS_COLUMN) and value is not None}
    if not starts:
        return None, None
    name = min(starts, key=lambda name: starts[name])
    return int(name.removeprefix(CLASS_COLUMN)), starts[name]


def scores(run: RunFolder, cohort: Cohort, splits: Sequence[str], rounds: int, definition: str) -> list[dict]:
    """Rows of metrics.csv for all labels of rounds 0 to ``rounds`` that have truth.

    Scans of the pool that a person touched are a split of their own: they enter no mean of the others.
    """
    found: list[dict] = []
    known: dict = {}
    groups = {split: cohort.split(split) for split in splits}
    if "pool" in groups and cohort.touched:
        groups["pool"] = cohort.untouched
        groups["touched"] = tuple(case for case in cohort.pool if case.name in cohort.touched)
    for split, cases in groups.items():
        for number in range(rounds + 1):
            folder = run.round(number)
            stages = {"copied": folder.copied, "propagated": folder.label}
            if number:
                stages = {"predicted": folder.prediction}
                if folder.refinement_counts and not run.refinement_off_before(number + 1):
                    stages["refined"] = folder.label  # if it is switched off, the labels equal the predictions
            for stage, label in stages.items():
                here = {"split": split, "round": number, "stage": stage}
                found += evaluate_folder(label, cases, cohort, here, definition, known)
    return found
