"""Makes copies of the templates from the scans of a run, and labels each as if it were a scan of the pool."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.utils import CommonKeys as Keys

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.intensities import HAS_DATA
from semisam_o1.features import FeatureStore, plain
from semisam_o1.files import WorkFiles
from semisam_o1.round_0.copies import Aligned, Copy, make_copy
from semisam_o1.round_0.detail import Details, Placed, dices_of_small
from semisam_o1.round_0.first_pass import Propagation
from semisam_o1.round_0.label_fusion import LabelFusion, Scan
from semisam_o1.round_0.passes import FirstPass, dropped_vote
from semisam_o1.types import Affine, Probabilities


class Plan(NamedTuple):
    """A copy to make: its ``name``, and the scans ``one`` and ``other`` that it is made from, see `make_copy`."""

    name: str
    one: str
    other: str


class Labelled(NamedTuple):
    """A ``copy`` on a grid with ``affine``, and the ``probabilities`` (num_classes, H, W, D) that round 0 gives it.

    small_dice: true Dice of the small classes, (num_classes - 1,), NaN for others, see `dices_of_small`; None without
    small classes.
    """

    copy: Copy
    affine: Affine
    probabilities: Probabilities
    small_dice: np.ndarray | None


def plans(records: WorkFiles, names: Sequence[str], copies: int) -> list[Plan]:
    """Up to ``copies`` copies, spread over the scans that were aligned as they lie."""
    aligned = [name for name in names if records.has(name, "alignments")]
    usable = [name for name in aligned if FirstPass.load(records, name, "frame").frame in ("world", "stored")]
    count = min(copies, len(usable))
    chosen = [int(i) for i in np.linspace(0, len(usable) - 1, count).round()] if count else []
    others = [(i + max(1, len(usable) // 2)) % len(usable) for i in chosen]
    return [Plan(f"copy_{n}", usable[i], usable[j]) for n, (i, j) in enumerate(zip(chosen, others), start=1)]


class CopyMaker:
    """Makes and labels copies. The encoder must give one token per voxel.

    Args:
        chain: ``frame`` -> the transform from a scan's item to the working space, see `image_chain`.
        inferer: image -> tokens, see `TokenInferer`.
        propagation, fusion: the two steps of round 0; no fusion if None.
    """

    def __init__(
        self,
        store: FeatureStore,
        cohort: Cohort,
        records: WorkFiles,
        chain: Callable,
        inferer: Callable,
        propagation: Propagation,
        fusion: LabelFusion | None,
    ):
        self.store, self.cohort, self.records, self.chain, self.inferer = store, cohort, records, chain, inferer
        self.propagation, self.fusion = propagation, fusion
        self.details = Details(store, cohort)
        self.template_image = functools.cache(lambda name: self._image(name, "world")[0])

    def __call__(self, plan: Plan) -> Labelled:
        """Make and label a copy; the two scans that it is made from are none of its atlases."""
        first = FirstPass.load(self.records, plan.one, "template", "frame")
        template = next(one for one in self.propagation.templates if one.name == first.template)
        (one, affine), (other, _) = (self._aligned(name, template.name) for name in (plan.one, plan.other))
        step = template.features.step_mm
        copy = make_copy(self.template_image(template.name), template.reference.label, one, other, step)
        volume = MetaTensor(copy.image[None], affine=torch.as_tensor(affine))
        with torch.no_grad():
            tokens = plain(self.inferer(volume, self.store.encoder, has_data=copy.has_data[None].float()))[0].float()
        result = self.propagation.propagate([template.reference], tokens, step_mm=step)
        dropped = dropped_vote(self.records) and result.without_vote is not None
        probabilities = result.without_vote if dropped else result.probabilities
        if self.fusion is not None and result.maps:
            descriptor = F.normalize(tokens.mean((1, 2, 3)), dim=0).numpy()
            scan = Scan(tokens, step, descriptor, template.name, result.maps[0], result.points, probabilities)
            if (fused := self.fusion(scan, {plan.one, plan.other})) is not None:
                probabilities = fused.probabilities
        small = self.details.of(template.name)[1]
        if not small or result.points is None:
            return Labelled(copy, affine, probabilities, None)
        placed = Placed(probabilities, result.points), Placed(copy.label, copy.points)
        return Labelled(copy, affine, probabilities, dices_of_small(template, small, *placed, affine))

    def _aligned(self, name: str, template: str) -> tuple[Aligned, Affine]:
        """A scan aligned to a template, and the affine of its grid.

        Raises:
            ValueError: its tokens are not on the voxels of its image.
        """
        first = FirstPass.load(self.records, name, "frame", "points")
        image, has_data, affine = self._image(name, first.frame)
        if first.points.shape[:3] != image.shape[1:]:
            shapes = f"{list(first.points.shape[:3])} tokens, {list(image.shape[1:])} voxels"
            raise ValueError(f"case {name}: the tokens are not on the voxels of the image ({shapes})")
        place = FirstPass.alignment(self.records, name, template).to_template
        return Aligned(image, has_data, first.points, place), affine

    def _image(self, name: str, frame: str) -> tuple[torch.Tensor, torch.Tensor, Affine]:
        """A scan's image and the mask of its data in the working space, (1, H, W, D) each, and their affine."""
        item = self.chain(frame=frame)(self.cohort.case(name).item())
        image = item[Keys.IMAGE]
        has_data = plain(item[HAS_DATA]) > 0.5 if HAS_DATA in item else torch.ones_like(plain(image)) > 0
        return plain(image).float(), has_data, np.asarray(image.affine, float)
