"""All families of trials."""

from __future__ import annotations

from tests.hostile import checkpoints, faults, folders, labels, lists, names, settings
from tests.hostile.trials import Trial

TRIALS: list[Trial] = [
    trial for family in (labels, lists, names, settings, checkpoints, folders, faults) for trial in family.TRIALS
]
