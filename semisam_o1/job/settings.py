"""Checks of a run's settings before any long work."""

from __future__ import annotations

from semisam_o1.job.config import JobConfig
from semisam_o1.types import DatasetError

COUNTS = ("max_iterations", "iterations", "iterations_per_epoch", "most_rounds")  # settings that are positive counts
BUILT = ("train#optimizer", "train#random_transforms", "train#method", "inferer")  # components built without labels


def try_out(config: JobConfig) -> None:
    """Build every component that needs no labels, so that a wrong setting stops the run before its long work.

    Raises:
        DatasetError: a setting is invalid; the message gives its name and value.
    """
    for name in COUNTS:
        if not isinstance(value := config.build(name, 1), int) or value < 1:
            raise DatasetError(f"{name} is {value}: expected a whole number from 1 on.")
    for number in (1, 2):  # the first round may be longer than later ones
        steps, logged = (config.build(name, number) for name in ("iterations", "iterations_per_epoch"))
        if steps % logged:
            text = f"iterations_per_epoch is {logged}: expected a divisor of a round's {steps} iterations."
            raise DatasetError(text)
    sides = config.build("patch_size", 1)
    if not isinstance(sides, (list, tuple)) or len(sides) != 3 or not all(isinstance(n, int) for n in sides):
        raise DatasetError(f"patch_size is {sides}: expected three whole numbers, voxels along R, A and S.")
    for id in BUILT:
        try:
            config.build(id, 1)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ or cause.__context__:
                cause = cause.__cause__ or cause.__context__
            raise DatasetError(f"'{id}' cannot be built with these settings: {cause}") from error
