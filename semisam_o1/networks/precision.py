"""The precision in which a network computes."""

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
    """``inferer`` with the network's convolutions in half precision; the outputs are always float32.

    It is here and not in an engine because MONAI Label calls the inferer alone, and because MONAI's engines support
    mixed precision only on CUDA.

    Args:
        enabled: bfloat16, on any device.
        amp: float16, on CUDA alone.
    """

    def __init__(self, inferer: Inferer, enabled: bool, amp: bool = False):
        super().__init__()
        self.inferer, self.enabled, self.amp = inferer, enabled, amp

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        amp = self.amp and inputs.device.type == "cuda"
        if not (self.enabled or amp):
            return self.inferer(inputs, network, *args, **kwargs)
        with torch.autocast(inputs.device.type, torch.bfloat16 if self.enabled else torch.float16):
            outputs = self.inferer(inputs, network, *args, **kwargs)
        return tree_map(lambda output: output.float(), outputs)
