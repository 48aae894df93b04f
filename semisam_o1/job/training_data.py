"""Data set items for prediction and training, and the length of a round."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from semisam_o1.data.cohort import Cohort
from semisam_o1.features import FeatureStore
from semisam_o1.job.selection import expected_gain, labels_round
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import Case

log = logging.getLogger("semisam_o1")


def image_items(cases: Sequence[Case]) -> list[dict]:
    """``case`` and ``image`` of each case, for a dataset without labels."""
    return [{"case": case.name, "image": str(case.image)} for case in cases]


def missing_items(store: FeatureStore, cases: Sequence[Case]) -> list[dict]:
    """`image_items` of the cases whose features are not in the store."""
    return image_items(store.missing(cases))


def labelled_items(cases: Sequence[Case]) -> list[dict]:
    """Image and truth of each case with truth, for validation."""
    return [case.item() for case in cases if case.label]


def training_items(cohort: Cohort, output_dir: str | Path, round: int, min_predicted_dice: float = 0.0) -> list[dict]:
    """Training items of round ``round``: labelled scans, untouched pool scans with the best labels so far.

    These are the labels of the previous round, or of round 0 if they are expected to be better, see `labels_round`.

    A pool scan is left out if it has no such label (its propagation failed) or if the label's predicted Dice is below
    ``min_predicted_dice``. So is a scan whose label has none, because nobody can tell how good it is: few labels are,
    and a wrong one costs more than one scan less. If all labels would be left out, all are used. 0 leaves none out.
    """
    run = RunFolder(output_dir)
    best = labels_round(round - 1, expected_gain(run, round - 1, cohort))
    if best < round - 1:
        log.info("round %d learns from labels of round 0: round %d is expected to be worse", round, round - 1)
    before = run.round(best)
    items = [case.item() | {"labelled": True} for case in cohort.labelled]
    pool = [case for case in cohort.untouched if before.label(case.name).exists()]
    known = {name: row["predicted_dice"] for name, row in before.quality.read().items()}
    doubted = [case for case in pool if known.get(case.name, 1.0) is None] if min_predicted_dice > 0 else []
    poor = [case for case in pool if (dice := known.get(case.name)) is not None and dice < min_predicted_dice]
    if len(doubted) + len(poor) < len(pool):
        for cases, why in ((poor, f"predicted Dice below {min_predicted_dice:g}"), (doubted, "cannot tell their Dice")):
            if cases:
                log.info("labels left out of training, %s: %s", why, ", ".join(case.name for case in cases))
        pool = [case for case in pool if case not in (*poor, *doubted)]
    return items + [case.item(before.label(case.name)) | {"labelled": False} for case in pool]


def round_length(max_iterations: int, first_round_factor: float, warm_start: bool, round: int) -> int:
    """Training iterations of a round: times ``first_round_factor`` if its network starts from scratch."""
    return int(max_iterations * (1 if warm_start and round > 1 else first_round_factor))


def epoch_length(iterations: int, most: int = 50) -> int:
    """The largest divisor of a round's iterations up to ``most``: iterations between two log lines."""
    return max(n for n in range(1, most + 1) if iterations % n == 0)
