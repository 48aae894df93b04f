"""Label fusion over the scans of a run: which atlases a scan gets, and their labels fused with its own.

A scan's atlases are the labelled scans most like it, whose labels are of people, and the most similar scans of the pool
with the labels of the first pass. All are reached through the template to which every scan is aligned.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch

from semisam_o1.data.cohort import Cohort
from semisam_o1.features import FeatureStore
from semisam_o1.files import WorkFiles
from semisam_o1.round_0.atlases import Atlas, Carried, carried_from, dissimilarity, fuse
from semisam_o1.round_0.passes import FirstPass, Fused
from semisam_o1.round_0.places import CHANNELS, AffineMap, coarse, principal, sample
from semisam_o1.round_0.templates import reference
from semisam_o1.types import Case, Probabilities, Tokens

CANDIDATES = 100  # nearest scans by global descriptor, from which the atlases of a scan are selected


class Scan(NamedTuple):
    """A scan to which a label was carried.

    tokens: (C, H', W', D'), ``step_mm`` mm apart. descriptor: (C,), their mean, of unit length. template: the name of
    its best template; to_template: its affine map to it; points: the position of each token in it, see `FirstPass`.
    probabilities: of its label, on the tokens.
    """

    tokens: Tokens
    step_mm: float
    descriptor: np.ndarray
    template: str
    to_template: AffineMap
    points: torch.Tensor
    probabilities: Probabilities


class Chosen(NamedTuple):
    """The atlases of a scan, nearest first: names of ``labelled`` scans, and of scans of the ``pool``.

    dissimilarity: the mean descriptor distance of all, where they reach: a larger field of view is no dissimilarity.
    """

    labelled: list[str]
    pool: list[str]
    dissimilarity: float


class LabelFusion:
    """Fuses a scan's label with those of the most similar scans, of labelled ones and of the pool.

    Scans are compared and aligned to each other through the scan's best template, see the module `atlases`.

    Args:
        records: of the first pass. cohort: says which scans are labelled. cases: the others that may be atlases.
        atlases, labelled_atlases: how many of the pool and of the labelled scans.
        iterations: of the displacement field of each, see `carried_from`.
    """

    def __init__(
        self,
        store: FeatureStore,
        records: WorkFiles,
        cohort: Cohort,
        cases: Sequence[Case],
        atlases: int = 5,
        labelled_atlases: int = 5,
        iterations: Sequence[int] = (20, 20, 10),
    ):
        self.store, self.records, self.cohort = store, records, cohort
        self.atlases, self.labelled_atlases, self.iterations = atlases, labelled_atlases, tuple(iterations)
        self.labelled = {case.name: case for case in cohort.labelled if records.has(case.name, "alignments")}
        names = [case.name for case in cases if case.name not in self.labelled]
        self.pool = [name for name in names if records.has(name, "alignments")]
        self.descriptors = store.descriptors(self.pool) if self.pool else np.empty((0, 0))
        self.templates = {case.name: store.load(case.name).tokens for case in cohort.templates}
        self.bases = {name: principal(own, CHANNELS) for name, own in self.templates.items()}
        self.factors = {name: coarse(own[:1], own)[1] for name, own in self.templates.items()}
        self.label_of = functools.lru_cache(2 * labelled_atlases + 1)(self._label_of)
        self.place_of = functools.lru_cache(4 * CANDIDATES)(self._place_of)

    def scan(self, name: str) -> Scan:
        """The scan ``name`` of the first pass."""
        first = FirstPass.load(self.records, name, "frame", "template", "points", "probabilities")
        found = self.store.frame(first.frame).load(name)
        place, label = self.place_of(name, first.template)[1], first.probabilities
        return Scan(found.tokens, found.step_mm, found.descriptor, first.template, place, first.points, label)

    def choose(self, scan: Scan, without: Collection[str] = ()) -> Chosen:
        """The atlases of ``scan``, without the names in ``without`` and without its template, whose label it has."""
        order = np.argsort(-self.descriptors @ scan.descriptor, kind="stable") if self.pool else np.array([], int)
        others = [self.pool[i] for i in order if self.pool[i] not in without][:CANDIDATES]
        labelled = [name for name in self.labelled if name not in without and name != scan.template]
        pooled = coarse(self.bases[scan.template](scan.tokens), self.templates[scan.template])[0]
        step = scan.step_mm * self.factors[scan.template]

        def nearest(names: list[str], count: int) -> list[str]:
            places = [self.place_of(name, scan.template) for name in names]
            values = dissimilarity(pooled, scan.to_template, places, step)
            return [names[i] for i in values.argsort(stable=True)[:count]]

        given, chosen = nearest(labelled, self.labelled_atlases), nearest(others, self.atlases)
        places = [self.place_of(name, scan.template) for name in (*given, *chosen)]
        seen = dissimilarity(pooled, scan.to_template, places, step, outside_cost=0)
        return Chosen(given, chosen, float(seen.mean()) if len(seen) else float("nan"))

    def __call__(self, scan: Scan, without: Collection[str] = ()) -> Fused | None:
        """The fused label of ``scan``; None if there is no atlas. ``without``: names that may not be atlases."""
        chosen = self.choose(scan, without)
        if not chosen.labelled and not chosen.pool:
            return None
        basis = self.bases[scan.template]
        tokens, template = basis(scan.tokens), basis(self.templates[scan.template])
        mismatch = (sample(template, scan.points, scan.step_mm) - tokens).square().mean(0)
        own = Carried(scan.probabilities, mismatch, torch.ones_like(mismatch, dtype=torch.bool))
        given, others = ([self.carried(name, scan, tokens) for name in names] for names in chosen[:2])
        return Fused(fuse([own, *given], others), chosen.pool, chosen.dissimilarity, chosen.labelled)

    def carried(self, name: str, scan: Scan, tokens: Tokens) -> Carried:
        """The label of the atlas ``name`` on ``scan``; see `carried_from`.

        tokens: of the scan, in the basis of its template.
        """
        atlas = self._atlas(name, scan.template)
        return carried_from(atlas, tokens, scan.to_template, scan.step_mm, self.iterations)

    def _atlas(self, name: str, template: str) -> Atlas:
        first = FirstPass.load(self.records, name, "frame", "probabilities")
        tokens = self.store.frame(first.frame).load(name).tokens
        label = self.label_of(name) if name in self.labelled else first.probabilities
        return Atlas(self.bases[template](tokens), label, self.place_of(name, template)[1])

    def _label_of(self, name: str) -> Probabilities:
        """The label that a person gave to a scan, as shares of its tokens."""
        frame = FirstPass.load(self.records, name, "frame").frame
        return reference(self.labelled[name], self.store.frame(frame).load(name), self.cohort).label

    def _place_of(self, name: str, template: str) -> tuple[torch.Tensor, AffineMap]:
        place, pooled_tokens = FirstPass.alignment(self.records, name, template)
        return pooled_tokens, place
