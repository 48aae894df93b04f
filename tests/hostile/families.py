"""All families of trials."""

from __future__ import annotations

from tests.hostile import checkpoints, faults, folders, labels, lists, names, run_files, settings
from tests.hostile.trials import Trial

FAMILIES = (labels, lists, names, settings, checkpoints, run_files, folders, faults)
TRIALS: list[Trial] = [trial for family in FAMILIES for trial in family.TRIALS]
