"""Seed, threads and device of a process."""

from __future__ import annotations

import faiss
import torch
from monai.utils import set_determinism

from semisam_o1.literals import printable_log
from semisam_o1.types import DatasetError


def set_up(seed: int, threads: int | None, device: str) -> None:
    """Seed all generators, set the number of threads (None: no change) and check that ``device`` exists.

    Raises:
        DatasetError: the device does not exist, or CUDA is requested but not usable.
    """
    printable_log()
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise DatasetError(f"device {device}: expected cpu, cuda or cuda:0, cuda:1, ...") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise DatasetError(f"device {device}: this machine has no CUDA device that torch can use; say --device cpu.")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise DatasetError(f"threads is {threads}: expected a whole number from 1 on, or null for the default.")
    if threads:
        torch.set_num_threads(int(threads))
        faiss.omp_set_num_threads(int(threads))
    set_determinism(int(seed))
