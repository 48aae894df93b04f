"""The poses of the scans of a run: coarse images for the search, and the features of a turned scan."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import CommonKeys as Keys

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.intensities import HAS_DATA
from semisam_o1.data.turns import FOLDER, turn_of, turned
from semisam_o1.features import Features, FeatureStore, plain
from semisam_o1.round_0.pose import LEAST_VOXELS, Coarse, Poses, coarse_factor, coarse_image, search
from semisam_o1.types import Case


def lacks_turned(store: FeatureStore, case: Case, frame: str) -> bool:
    """Whether ``frame`` turns the scan and its features in it are gone or stale; the first pass alone makes them."""
    return turn_of(frame) is not None and not store.frame(frame).fresh(case)


class TurnedScans:
    """Searches for the pose of a scan, and computes its features as if it lay in another.

    Args:
        chain: ``frame`` -> the transform from a scan's item to the working space, see `image_chain`.
        inferer: image -> tokens, see `TokenInferer`.
    """

    def __init__(self, store: FeatureStore, cohort: Cohort, chain: Callable, inferer: Callable):
        self.store, self.cohort, self.chain, self.inferer = store, cohort, chain, inferer
        self._template = functools.cache(self._of_template)

    def search(self, template: str, name: str) -> Poses:
        """The poses of the scan ``name`` relative to a template, see `pose.search`; none if there is little to see."""
        one, factor = self._template(template)
        if one.image.numel() < LEAST_VOXELS:
            return Poses([], 1.0)
        return search(one, self._coarse(name, factor))

    def features(self, name: str, frame: str) -> Features:
        """The features of a scan in a frame that turns it, from the store if they are fresh."""
        case, store = self.cohort.case(name), self.store.frame(frame)
        if not store.fresh(case):
            image, has_data = self._image(name, frame)
            with torch.no_grad():
                tokens = self.inferer(image[None], self.store.encoder, has_data=has_data[None].float())
            affine = np.asarray(tokens.affine, float).reshape(-1, 4, 4)[0]
            affine = turned(affine, turn_of(frame).T)  # back to the scan's own world
            store.save(case, plain(tokens)[0], affine, self.cohort.grid(case))
        return store.load(name)

    def keep(self, name: str, frame: str) -> None:
        """Keep a scan's features in ``frame`` alone of those in which it is turned; the last that were made replace
        all others."""
        if turn_of(frame) is not None:
            self.features(name, frame)
        else:
            self.store.folder.joinpath(FOLDER, self.store.path(name).name).unlink(missing_ok=True)

    def _of_template(self, name: str) -> tuple[Coarse, int]:
        factor = coarse_factor(self._image(name)[0])
        return self._coarse(name, factor), factor

    def _coarse(self, name: str, factor: int) -> Coarse:
        image, has_data = self._image(name)
        step = float(np.linalg.norm(np.asarray(image.affine, float)[:3, 0]))
        return coarse_image(plain(image), has_data, step, factor)

    def _image(self, name: str, frame: str = "world") -> tuple[MetaTensor, torch.Tensor]:
        """A scan's image and the mask of its data in the working space, (1, H, W, D) each."""
        item = self.chain(frame=frame)(self.cohort.case(name).item())
        image = item[Keys.IMAGE]
        held = plain(item[HAS_DATA]) > 0.5 if HAS_DATA in item else torch.ones(image.shape, dtype=torch.bool)
        return image, held
