"""Several processes of torchrun that train one network together, one a device; the first alone writes files."""

from __future__ import annotations

import datetime
import gc
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from semisam_o1.types import DatasetError

LONGEST_WAIT = datetime.timedelta(days=7)  # of the others for the first, which does all but the training alone


def count() -> int:
    """How many processes work together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """The number of this process; the first has 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def device() -> str:
    """The device of this process: one GPU each, or the CPU where there are none."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def join() -> None:
    """Join the processes that torchrun started; without it, nothing happens. The first alone logs what it does.

    Raises:
        DatasetError: there are fewer GPUs than processes on this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if gpus and here > gpus:
        raise DatasetError(f"torchrun started {here} processes, and there are {gpus} GPUs: --nproc_per_node {gpus}.")
    if gpus:
        torch.cuda.set_device(torch.device(device()))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=LONGEST_WAIT)
    if number():
        logging.getLogger("semisam_o1").setLevel(logging.WARNING)


def leave() -> None:
    """End the work of all processes; the first tells the others that no training follows."""
    if not dist.is_initialized():
        return
    if number() == 0:
        from_first(None)
    gc.collect()  # what still holds the group, such as a wrapped network
    dist.barrier()  # none leaves while another one still reads from it
    dist.destroy_process_group()


def from_first(value: Any = None) -> Any:
    """The ``value`` of the first process, in every process. All have to call this function."""
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def of_all(value: Any) -> list:
    """The ``value`` of each process, in every process."""
    values: list = [None] * count()
    dist.all_gather_object(values, value)
    return values


def shared(module: nn.Module) -> nn.Module:
    """The module with gradients that are the mean over all processes; its weights become those of the first.

    Returns ``module`` itself if there is one process.
    """
    return DistributedDataParallel(module) if count() > 1 else module


def same_states(objects: Mapping[str, Any]) -> None:
    """Give ``objects``, name -> object with ``state_dict`` and ``load_state_dict``, the states of the first process."""
    for name in sorted(objects):
        state = from_first(objects[name].state_dict())
        if number():
            objects[name].load_state_dict(state)
