"""Label fusion over the scans of a run: which atlases a scan gets, and their labels fused with its own."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch

from semisam_o1.features import FeatureStore
from semisam_o1.files import WorkFiles
from semisam_o1.round_0.alignment import CHANNELS, AffineMap, coarse, principal
from semisam_o1.round_0.atlases import Atlas, carried_from, dissimilarity, fuse
from semisam_o1.round_0.passes import FirstPass, Fused
from semisam_o1.types import Probabilities, Tokens

CANDIDATES = 100  # nearest scans by global descriptor, from which the atlases of a scan are selected


class Scan(NamedTuple):
    """A scan to which a label was carried.

    tokens: (C, H', W', D'), ``step_mm`` mm apart. descriptor: (C,), their mean, of unit length. template: the name of
    its best template; to_template: its affine map to it. probabilities: of its label, on the tokens.
    """

    tokens: Tokens
    step_mm: float
    descriptor: np.ndarray
    template: str
    to_template: AffineMap
    probabilities: Probabilities


class LabelFusion:
    """Fuses a scan's label with those of the most similar scans ``names`` of the first pass's ``records``.

    Scans are compared and aligned to each other through the scan's best template, see the module `atlases`.

    Args:
        templates: tokens of each template, by name.
        atlases: how many. iterations: of the displacement field of each, see `carried_from`.
    """

    def __init__(
        self,
        store: FeatureStore,
        records: WorkFiles,
        names: Sequence[str],
        templates: dict[str, Tokens],
        atlases: int = 5,
        iterations: Sequence[int] = (20, 20, 10),
    ):
        self.store, self.records, self.atlases, self.iterations = store, records, atlases, tuple(iterations)
        self.names = [name for name in names if records.has(name, "alignments")]
        self.descriptors = store.descriptors(self.names) if self.names else np.empty((0, 0))
        self.templates = templates
        self.bases = {name: principal(own, CHANNELS) for name, own in templates.items()}
        self.factors = {name: coarse(own[:1], own)[1] for name, own in templates.items()}
        self.place_of = functools.lru_cache(4 * CANDIDATES)(self._place_of)

    def scan(self, name: str) -> Scan:
        """The scan ``name`` of the first pass."""
        first = FirstPass.load(self.records, name, "frame", "template", "probabilities")
        found = self.store.frame(first.frame).load(name)
        place = self.place_of(name, first.template)[1]
        return Scan(found.tokens, found.step_mm, found.descriptor, first.template, place, first.probabilities)

    def __call__(self, scan: Scan, without: Collection[str] = ()) -> Fused | None:
        """The fused label of ``scan``; None if there is no atlas. ``without``: names that may not be atlases."""
        basis = self.bases[scan.template]
        tokens = basis(scan.tokens)
        order = np.argsort(-self.descriptors @ scan.descriptor, kind="stable")
        others = [self.names[i] for i in order if self.names[i] not in without][:CANDIDATES]
        places = [self.place_of(name, scan.template) for name in others]
        pooled = coarse(tokens, self.templates[scan.template])[0]
        values = dissimilarity(pooled, scan.to_template, places, scan.step_mm * self.factors[scan.template])
        chosen = [others[i] for i in values.argsort(stable=True)[: self.atlases]]
        carried = [
            carried_from(self._atlas(name, scan.template), tokens, scan.to_template, scan.step_mm, self.iterations)
            for name in chosen
        ]
        if not carried:
            return None
        fused, _ = fuse(scan.probabilities, *zip(*carried))
        return Fused(fused, chosen, float(values.sort().values[: self.atlases].mean()))

    def _atlas(self, name: str, template: str) -> Atlas:
        first = FirstPass.load(self.records, name, "frame", "probabilities")
        tokens = self.store.frame(first.frame).load(name).tokens
        return Atlas(self.bases[template](tokens), first.probabilities, self.place_of(name, template)[1])

    def _place_of(self, name: str, template: str) -> tuple[torch.Tensor, AffineMap]:
        place, pooled_tokens = FirstPass.alignment(self.records, name, template)
        return pooled_tokens, place
