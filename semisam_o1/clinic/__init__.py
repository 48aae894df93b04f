"""The bundle inside a MONAI Label server: what it says before it is trained, and how it trains on a studies folder."""

from semisam_o1.clinic.serving import trained_alone
from semisam_o1.clinic.training import name_the_run, run

__all__ = ["name_the_run", "run", "trained_alone"]
