"""Names shared by the whole package: array aliases and the Case record.

Arrays in space are (C, H, W, D) or (B, C, H, W, D); after `Orientationd("RAS")` H, W, D run to the patient's
right, anterior and superior. An *affine* is 4 x 4 and maps voxel indices to RAS millimetres.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

Volume: TypeAlias = torch.Tensor  # (C, H, W, D)
Probabilities: TypeAlias = torch.Tensor  # (num_classes, H, W, D), sums to 1 over the classes
Tokens: TypeAlias = torch.Tensor  # (C, D', H', W'): one feature vector a place of a coarser grid
Affine: TypeAlias = np.ndarray  # (4, 4) float64


class UserError(ValueError):
    """What a user must mend before work can start or go on; the message is written for them."""


class DatasetError(UserError):
    """A `UserError` in a data set or in what was said of one."""


@dataclass(frozen=True)
class Case:
    """One scan on disk: its name, its files and the list it stands in (``pool``, ``val`` or ``test``).

    ``image`` and ``label`` are the same file for HDF5; ``label`` is None where none is stored.
    """

    name: str
    image: Path
    label: Path | None
    split: str

    def item(self, label: Path | None = None) -> dict:
        """The dictionary that MONAI transforms work on: ``case``, ``image`` and, where there is one, ``label``."""
        label = label or self.label
        return {"case": self.name, "image": str(self.image)} | ({"label": str(label)} if label else {})
