"""Types shared by the whole package: array aliases, errors and the Case record.

Arrays in space are (C, H, W, D) or (B, C, H, W, D); after `Orientationd("RAS")`, H, W, D run to the patient's
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
Tokens: TypeAlias = torch.Tensor  # (C, D', H', W'): one feature vector per position of a coarser grid
Affine: TypeAlias = np.ndarray  # (4, 4) float64


class UserError(ValueError):
    """An error that the user must correct; the message is written for users."""


class DatasetError(UserError):
    """A `UserError` in a data set or in its settings."""


@dataclass(frozen=True)
class Case:
    """One scan on disk: its name, its files and its split (``template``, ``pool``, ``val``, ``test`` or ``new``).

    ``image`` and ``label`` are the same file for HDF5; ``label`` is None if there is no label.
    """

    name: str
    image: Path
    label: Path | None
    split: str

    def scrubbed(self, error: object) -> str:
        """The text of an error with the case's name in place of its files' paths and names."""
        text = str(error)
        for path in filter(None, (self.image, self.label)):
            text = text.replace(str(path), self.name).replace(path.name, self.name)
        return text

    def item(self, label: Path | None = None) -> dict:
        """The dictionary for MONAI transforms: ``case``, ``image`` and, if there is one, ``label``."""
        label = label or self.label
        return {"case": self.name, "image": str(self.image)} | ({"label": str(label)} if label else {})
