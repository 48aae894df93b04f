"""The encoder: a frozen network with its input window, token step and intensity normalisation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from semisam_o1.types import UserError, Volume
from semisam_o1.weights import load_weights

log = logging.getLogger("semisam_o1")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Encoder(nn.Module):
    """(B, 1, H, W, D) -> float32 tokens (B, C, H/p, W/p, D/p) with patch size p, for any network of that form.

    It logs a warning for a network with parameters but without trained weights.

    Args:
        network: the network; it is set to eval mode and frozen.
        name: its name in the feature store.
        patch_size: voxels from one token to the next.
        input_size: side of the cubic window that the network needs; None if it accepts a whole volume.
        normalise: applied to the (B, 1, H, W, D) intensities of a window, which are z-normalised before; or None.
        stage: index of the output to use, if the network returns several.
        weights: a file for `load_weights`; trained: the network already has its weights.
        prefix: of the network's keys in that file.
        precision: "float32", or autocast to "bfloat16" or "float16".
        compiled: use `torch.compile`. The error due to compilation and precision is measured on the first window and
            logged.
        takes_mask: the network takes the mask (B, 1, H, W, D) of the voxels with data as a second argument.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        patch_size: int = 1,
        input_size: int | None = None,
        normalise: Callable[[Volume], Volume] | None = None,
        stage: int | None = None,
        weights: str | Path | None = None,
        trained: bool = False,
        prefix: str = "",
        precision: str = "float32",
        compiled: bool = False,
        takes_mask: bool = False,
    ):
        super().__init__()
        if input_size is not None and input_size % patch_size:
            raise UserError(f"encoder {name}: input_size {input_size} is not a multiple of patch_size {patch_size}.")
        if precision not in PRECISIONS:
            raise UserError(f"encoder {name}: precision '{precision}', expected one of {', '.join(PRECISIONS)}.")
        if weights is not None:
            load_weights(network, weights, prefix, f"the encoder {name}")
        elif not trained and any(True for _ in network.parameters()):
            log.warning("encoder %s: RANDOM WEIGHTS. Its features mean little; set its 'weights' to a file.", name)
        self.network = network.eval().requires_grad_(False)
        self.name, self.patch_size, self.input_size, self.normalise = name, patch_size, input_size, normalise
        self.stage, self.precision, self.compiled, self.takes_mask = stage, precision, compiled, takes_mask
        self.error: float | None = None  # largest absolute error on the first window, against float32
        if compiled:
            self._compiled: list[Any] = [torch.compile(network)]  # in a list, so that weights are not registered twice

    @torch.no_grad()
    def forward(self, volume: Volume, has_data: torch.Tensor | None = None) -> torch.Tensor:
        volume = volume if self.normalise is None else self.normalise(volume)
        masked = self.takes_mask and has_data is not None and not has_data.all()
        inputs = (volume, has_data) if masked else (volume,)
        with torch.autocast(volume.device.type, PRECISIONS[self.precision], enabled=self.precision != "float32"):
            tokens = self._of_stage(self._compiled[0] if self.compiled else self.network, *inputs)
        if self.error is None and (self.compiled or self.precision != "float32"):
            plain = self._of_stage(self.network, *(part[:1] for part in inputs))
            self.error = float((plain - tokens[:1]).abs().max())
            how = self.precision + (", compiled" if self.compiled else "")
            text = "encoder %s in %s: largest error %.2g against float32, standard deviation %.2g"
            log.info(text, self.name, how, self.error, float(plain.std()))
        return tokens

    def _of_stage(self, network: nn.Module, *inputs: Volume) -> torch.Tensor:
        output = network(*inputs)
        return (output if self.stage is None else output[self.stage]).float()
