"""The precision of a network on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import Inferer
from torch import nn
from torch.utils._pytree import tree_map


def bfloat16_pays(device: str | torch.device) -> bool:
    """Whether ``device`` is a CPU with bfloat16 matrix units (AMX), where a training iteration takes half the time."""
    return torch.device(device).type == "cpu" and torch.cpu._is_amx_tile_supported()


class Autocast(Inferer):
    """``inferer`` with the network's convolutions in bfloat16 if ``enabled``; the outputs are always float32.

    For CPUs: MONAI's engines support mixed precision only on CUDA.
    """

    def __init__(self, inferer: Inferer, enabled: bool):
        super().__init__()
        self.inferer, self.enabled = inferer, enabled

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.inferer(inputs, network, *args, **kwargs)
        with torch.autocast(inputs.device.type, torch.bfloat16):
            outputs = self.inferer(inputs, network, *args, **kwargs)
        return tree_map(lambda output: output.float(), outputs)
