"""Whether a run's settings work together, before any long work; `kinds` checks each alone."""

from __future__ import annotations

from semisam_o1.data.class_sizes import small_classes
from semisam_o1.data.findings import Problem
from semisam_o1.errors import chain, of_memory
from semisam_o1.job.config import JobConfig
from semisam_o1.kinds import line, refuse_wrong
from semisam_o1.types import DatasetError

BUILT = ("train#optimizer", "train#random_transforms", "train#method", "inferer")  # components built without labels


def try_out(config: JobConfig) -> None:
    """Build every component that needs no labels, so that a wrong setting stops the run before its long work.

    Raises:
        DatasetError: a setting is invalid; the message gives its name and value.
    """
    for number in (1, 2):  # the first round may be longer than later ones
        lengths = {name: config.build(name, number) for name in ("iterations", "iterations_per_epoch")}
        refuse_wrong(lengths)
        steps, logged = lengths.values()
        if steps % logged:
            text = f"iterations_per_epoch is {logged}: expected a divisor of a round's {steps} iterations."
            raise DatasetError(text)
    if not config.setting("labelled_batch") + config.setting("pool_batch"):
        raise DatasetError("labelled_batch and pool_batch are 0: expected one of them above 0.")
    ramp = config.setting("consistency_rampup")
    if ramp > 1 and not config.setting("published_terms"):
        raise DatasetError(line("consistency_rampup", ramp, "a share of a round, from 0 to 1"))
    for id in BUILT:
        try:
            config.build(id, 1)
        except Exception as error:
            if of_memory(error):
                raise
            if found := next((part for part in chain(error) if isinstance(part, DatasetError)), None):
                raise found from None
            cause: BaseException = error
            while cause.__cause__ or cause.__context__:
                cause = cause.__cause__ or cause.__context__
            raise DatasetError(f"'{id}' cannot be built with these settings: {cause}") from error


def lost_classes(config: JobConfig) -> list[Problem]:
    """A warning for each class that is too small for a run's tokens; none if these have the scan's own grid."""
    spacing, step = config.setting("feature_spacing"), config.setting("feature_step")
    if spacing is None:
        return []
    return small_classes(config.cohort, spacing * (step or config.build("encoder").patch_size))
