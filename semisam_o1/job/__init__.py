"""The whole job: stages, resuming, record and results."""

from semisam_o1.job.config import Config, config_in_use
from semisam_o1.job.job import Job, job_or_helper
from semisam_o1.job.training_data import (
    epoch_length,
    image_items,
    labelled_items,
    missing_items,
    round_length,
    training_items,
)

__all__ = [
    "Config",
    "Job",
    "config_in_use",
    "epoch_length",
    "image_items",
    "job_or_helper",
    "labelled_items",
    "missing_items",
    "round_length",
    "training_items",
]
