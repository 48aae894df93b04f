"""From a network's probabilities to a label on the scan's own grid, inside MONAI Label."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd
from monai.utils import CommonKeys as Keys
from monai.utils import MetaKeys

from semisam_o1.data.grids import Grid, slabs, to_grid
from semisam_o1.data.reader import meta_of
from semisam_o1.data.transforms import keep_largest


class LabelOnScand(Invertd):
    """Probabilities (C, h, w, d) in the working space become class numbers (1, H, W, D) on the scan's stored grid.

    The scan is the item's ``image``, which knows that grid and the working one. The label is that of `predict`. This is
    an `Invertd` because MONAI Label leaves these out to score scans: the probabilities stay.

    Args:
        class_numbers: the class number of each channel.
        largest_component: the classes to reduce to their largest component.
    """

    def __init__(self, keys: KeysCollection, class_numbers: Sequence[int], largest_component: Sequence[int] = ()):
        super().__init__(keys, Compose([]), orig_keys=Keys.IMAGE)
        self.class_numbers, self.largest_component = torch.as_tensor(class_numbers), largest_component

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict:
        data = dict(data)
        image = data[Keys.IMAGE]
        stored = np.asarray(image.meta[MetaKeys.ORIGINAL_AFFINE], float)
        grid = Grid(stored, tuple(int(n) for n in image.meta[MetaKeys.SPATIAL_SHAPE]))
        affine = np.asarray(image.affine, float)
        for key in self.key_iterator(data):
            shares = torch.as_tensor(data[key].as_tensor() if hasattr(data[key], "as_tensor") else data[key]).cpu()
            parts = [to_grid(shares, affine, part).clamp(0, 1) for _, part in slabs(grid, len(shares))]
            label = self.class_numbers[torch.cat([part.argmax(0, keepdim=True) for part in parts], 1)]
            label = keep_largest(label, self.largest_component)
            label = label.to(torch.uint8 if max(self.class_numbers) < 256 else torch.uint16)  # ITK writes no int64
            data[key] = MetaTensor(label, meta=meta_of(grid, image.meta["filename_or_obj"]))
        return data
