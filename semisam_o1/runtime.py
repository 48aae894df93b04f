"""Seed, threads and device of a process."""

from __future__ import annotations

import os
import sys

import faiss
import torch
from monai.utils import optional_import, set_determinism

from semisam_o1.kinds import refuse_wrong
from semisam_o1.literals import printable_log
from semisam_o1.types import DatasetError


def set_up(seed: int, threads: int | None, device: str) -> None:
    """Seed all generators, set the number of threads (None: no change) and check that ``device`` exists.

    Raises:
        DatasetError: a value has the wrong kind, or CUDA is requested but not usable.
    """
    printable_log()
    refuse_wrong({"seed": seed, "threads": threads, "device": device})
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise DatasetError(f"device {device}: this machine has no CUDA device that torch can use; say --device cpu.")
    if threads:
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
    set_determinism(seed)
    tell_nobody()


def tell_nobody() -> None:
    """MLflow, which MONAI imports where it is installed, reports its use to its makers; switch that off, unless the
    environment says otherwise."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if "mlflow" in sys.modules:
        restart, there = optional_import("mlflow.telemetry", name="set_telemetry_client")
        if there:
            restart()  # it reads the environment anew
