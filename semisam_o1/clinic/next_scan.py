"""Which image of a studies folder to hand out next, by the run of the bundle that is served."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from semisam_o1.data.folders import composed
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.errors import plainly
from semisam_o1.features import FeatureStore
from semisam_o1.job.reopen import cohort_of
from semisam_o1.review.ranking import DEFAULT, REASONS, known_of, order
from semisam_o1.reviewed import Reviewed
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import UserError

log = logging.getLogger("semisam_o1")
RUN = "run"  # the folder of the run in a bundle that MONAI Label trains


class Next(NamedTuple):
    """The image to look at next, why, and how many are left to look at, this one included."""

    image: str | None
    reason: str
    left: int


def next_scan(bundle_root: str | Path, unlabelled: Sequence[str]) -> Next:
    """The next of the ``unlabelled`` images: the one whose correction is expected to win most on the others.

    Before the first training nothing is known of the images, and it is the first by name. Images that were rejected
    (``semisam-o1 review BUNDLE/run --reject``) are never handed out.
    """
    run = RunFolder(Path(bundle_root) / RUN)
    rejected = set(Reviewed(run.reviewed).rejected()) if run.reviewed.is_dir() else set()
    left = {name: image for image in unlabelled if (name := composed(image)) not in rejected}  # as a data set names it
    known: list[str] = []
    try:
        known = [name for name in ranked(run) if name in left] if run.record.is_file() else []
    except (
        UserError,
        OSError,
        LookupError,
        ValueError,
    ) as error:  # a training works on the run now, or it was stopped early
        log.warning("the scans cannot be ranked now: %s", plainly(error) or error)
    if known:
        return Next(left[known[0]], REASONS[DEFAULT], len(left))
    first = min(left.values(), default=None)
    return Next(first, "the first by name: no training has compared the scans yet", len(left))


def ranked(run: RunFolder) -> list[str]:
    """The untouched scans of a run, the one to look at next first."""
    record, reviewed = run.read_record(), Reviewed(run.reviewed)
    cohort = cohort_of(run, check=False).without(record.get("failed", {}))
    cohort = cohort.with_reviewed(reviewed.labels(), reviewed.rejected())
    folder = run.round(record.get("labels_round", record.get("best_round", 0)))
    names, known = known_of(run, cohort, FeatureStore(run.features, mind(), None), folder)
    return [names[i] for i in order(known)] if names else []
