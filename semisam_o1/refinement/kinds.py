"""The kinds of votes for the refinement."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import numpy as np
import torch

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.grids import Grid, slabs, to_grid
from semisam_o1.features import Features, FeatureStore
from semisam_o1.refinement.votes import Voters, place_vectors, uncertain, volume_votes, vote_labels, voxel_votes
from semisam_o1.round_0.passes import FirstPass
from semisam_o1.round_0.places import CHANNELS, centred_points, principal
from semisam_o1.round_0.propagation import Reference, label_radius, reach_of
from semisam_o1.round_0.templates import templates_of
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import Case, Probabilities, Tokens
from semisam_o1.uncertainty import confidence

log = logging.getLogger("semisam_o1")

EXACT = 1_000_000  # up to this number of voting tokens the search is exact


VOTING_SCANS = 64  # scans whose voting tokens are kept in memory


def no_votes(case: Case) -> None:
    """No refinement: every label stays as predicted."""


class VolumeVotes:
    """As published: an uncertain volume gets its label by a vote of the most similar certain volumes.

    See `votes.uncertain`, `volume_votes`, `vote_labels`. Templates are certain and vote with their own labels. If
    round 0 aligned them, only the scan's best template votes.

    Args:
        output_dir, round: the run's folder and the round of the predictions.
        k: number of voting volumes; with fewer certain volumes, all labels stay as predicted.
        quantile: of the mean entropies; volumes at or above it are uncertain.
    """

    def __init__(
        self, store: FeatureStore, cohort: Cohort, output_dir: str | Path, round: int, k: int = 5, quantile: float = 0.9
    ):
        run = RunFolder(output_dir)
        self.cohort, self.folder, self.records, self.k = cohort, run.round(round), run.round(0).work("first"), k
        uncertainty = self.folder.uncertainty.read()
        pool = [case for case in cohort.pool if case.name in uncertainty]
        self.voters = list(cohort.templates) + pool
        self.descriptors = store.descriptors(case.name for case in self.voters)
        doubtful = uncertain([uncertainty[case.name]["uncertainty"] for case in pool], quantile)
        self.certain = np.concatenate([np.ones(len(cohort.templates), bool), ~doubtful])
        if self.certain.sum() < k:
            log.info("refinement: %d certain volumes, fewer than knn_k = %d: labels unchanged", self.certain.sum(), k)

    def __call__(self, case: Case) -> torch.Tensor | None:
        place, certain = self.voters.index(case), self.certain.copy()
        if certain[place]:
            return None
        if best := FirstPass.load(self.records, case.name, "template").template:
            certain[: len(self.cohort.templates)] = [template.name == best for template in self.cohort.templates]
        found, weights = volume_votes(self.descriptors, certain, self.descriptors[place], self.k)
        if not len(found):
            return None
        labels = [self._label_of(self.voters[i]) for i in found]
        return vote_labels(labels, weights.tolist(), self.cohort.grid(case).shape, self.cohort.num_classes)

    def _label_of(self, case: Case) -> torch.Tensor:
        path = case.label if case in self.cohort.templates else self.folder.prediction(case.name)
        return self.cohort.label(case, path)


class _TemplatePlaces:
    """One template's voting tokens, and the basis and scale for comparing other tokens with them."""

    def __init__(self, features: Features, reference: Reference, reach: float, position_weight: float):
        self.basis = principal(reference.tokens, CHANNELS)
        radius = label_radius(reference.label)
        self.reach, self.position_weight = max(1, round(reach * radius)), position_weight / (radius * features.step_mm)
        self.extent = torch.tensor(reference.tokens.shape[1:]) * features.step_mm
        self.tokens = self.basis(reference.tokens)
        self.points = centred_points(reference.tokens.shape[1:], features.step_mm)
        self.label = reference.label


class VoxelVotes:
    """Uncertain voxels get their label by a vote of the most similar tokens of the most similar scans.

    Tokens are compared by their features and by their position in the template, as found in round 0. A vote is
    weighted by similarity and by the confidence of its token; the template's own tokens are certain: see
    `votes.voxel_votes`. The vote is averaged with the network's probabilities. Certain voxels stay as predicted. If
    round 0 aligned nothing (`copy`, `prototype`), the template's grid is stretched over the scan's.

    Args:
        output_dir, round: the run's folder and the round of the predictions; round 0 of the run gives the position of
            each token in the scan's best template.
        unsure: least uncertainty of an uncertain voxel.
        quantile: sets ``unsure`` to this quantile of the uncertainties in the volume.
        scans: number of scans whose tokens vote, besides the template.
        k: number of voting tokens.
        share: weight of the vote in the new probabilities; the network's probabilities have the rest.
        position_weight: weight of a distance of one label radius, relative to a descriptor distance.
        reach: largest distance of a voting token from a border, in label radii.
        most_voters: largest number of voting tokens of a scan, drawn with a fixed seed.
        cells: of an approximate index, see `neighbours.nearest`; a search among up to a million tokens is exact.
    """

    def __init__(
        self,
        store: FeatureStore,
        cohort: Cohort,
        output_dir: str | Path,
        round: int,
        unsure: float = 0.25,
        quantile: float | None = None,
        scans: int = 5,
        k: int = 15,
        share: float = 0.35,
        position_weight: float = 6.0,
        reach: float = 0.15,
        most_voters: int = 20000,
        cells: int = 1024,
    ):
        run = RunFolder(output_dir)
        self.store, self.cohort, self.folder = store, cohort, run.round(round)
        self.predicted = self.folder.work("predicted")
        self.records, self.fused = (run.round(0).work(kind) for kind in ("first", "fused"))
        self.unsure, self.quantile, self.scans, self.k = unsure, quantile, scans, k
        self.share, self.cells, self.most_voters = share, cells, most_voters
        self.templates = {
            template.name: _TemplatePlaces(template.features, template.reference, reach, position_weight)
            for template in templates_of(store, cohort)
        }
        self.voters_of_template = functools.cache(self._template_voters)
        self.voters_of = functools.lru_cache(VOTING_SCANS)(self._scan_voters)

    def __call__(self, case: Case) -> torch.Tensor | None:
        template = FirstPass.load(self.records, case.name, "template").template or self._most_like(case.name)
        features, tokens, points, probabilities = self._seen(case.name, template)
        doubt = 1 - confidence(probabilities)
        least = self.unsure if self.quantile is None else max(float(np.quantile(doubt, self.quantile)), 0.01)
        asked = (doubt >= least).flatten().nonzero()[:, 0]
        if not len(asked):
            return None
        others = [self.voters_of(name, template) for name in self._similar(case.name)]
        voters = Voters(*map(torch.cat, zip(self.voters_of_template(template), *others)))
        queries = place_vectors(tokens, points, self.templates[template].position_weight)[asked]
        cells = self.cells if len(voters.shares) > EXACT else 0
        voted = probabilities.flatten(1).clone()
        voted[:, asked] = voxel_votes(voters, queries, self.k, cells).T
        voted = voted.reshape(probabilities.shape)
        found = []
        for _, part in slabs(features.scan, len(voted)):
            joined = self.share * to_grid(voted, features.affine, part)
            found.append((joined + (1 - self.share) * self._predicted(case.name, part)).argmax(0))
        label = self.cohort.label(case, self.folder.prediction(case.name))
        uncertainty = self.cohort.reader.volume(self.folder.uncertainty_map(case.name)).as_tensor()[0]
        return torch.where(uncertainty >= least, torch.cat(found).to(label), label)

    def _most_like(self, name: str) -> str:
        """The template most similar to a scan by global descriptor; used if nothing was aligned."""
        own, others = self.store.descriptors([name])[0], self.store.descriptors(self.templates)
        return list(self.templates)[int(np.argmax(others @ own))]

    def _predicted(self, name: str, grid: Grid) -> Probabilities:
        """The network's probabilities of a scan, on ``grid``."""
        probabilities, affine = self.predicted.load(name, ["probabilities", "affine"])
        return to_grid(probabilities, affine, grid).clamp(0, 1)

    def _seen(self, name: str, template: str) -> tuple[Features, Tokens, torch.Tensor, Probabilities]:
        """A scan on its token grid: its features; their principal components (C, H, W, D); the position of each token
        in ``template``, (H, W, D, 3) mm; the network's probabilities, (num_classes, H, W, D)."""
        first = FirstPass.load(self.records, name, "frame", "template", "points")
        features = self.store.frame(first.frame).load(name)
        grid = Grid(features.affine, tuple(features.tokens.shape[1:]))
        points = centred_points(grid.shape, features.step_mm)
        if first.points is not None and first.template in (template, ""):
            points = first.points
        elif first.template:  # another template is the scan's best one: use the affine map only
            points = FirstPass.alignment(self.records, name, template).to_template(points)
        else:
            points = points * (self.templates[template].extent / (torch.tensor(grid.shape) * features.step_mm))
        return features, self.templates[template].basis(features.tokens), points, self._predicted(name, grid)

    def _template_voters(self, template: str) -> Voters:
        places = self.templates[template]
        return self._near_borders(places, places.tokens, places.points, places.label)

    def _scan_voters(self, name: str, template: str) -> Voters:
        return self._near_borders(self.templates[template], *self._seen(name, template)[1:])

    def _near_borders(
        self, places: _TemplatePlaces, tokens: Tokens, points: torch.Tensor, probabilities: Probabilities
    ) -> Voters:
        near = reach_of(probabilities > 0.5, places.reach).sum(0) >= 2
        near = near.flatten().nonzero()[:, 0]
        drawn = torch.randperm(len(near), generator=torch.Generator().manual_seed(0))[: self.most_voters]
        near = near[drawn.sort().values]
        vectors = place_vectors(tokens, points, places.position_weight)[near]
        return Voters(vectors, probabilities.flatten(1).T[near], confidence(probabilities).flatten()[near])

    def _similar(self, name: str) -> list[str]:
        """The most similar scans: the atlases of label fusion, else the nearest by global descriptor."""
        if self.fused.has(name, "atlases"):
            (names,) = self.fused.load(name, ["atlases"])
        else:
            names = [case.name for case in self.cohort.pool if case.name != name]
            if not names:
                return []
            own, others = self.store.descriptors([name])[0], self.store.descriptors(names)
            names = [names[i] for i in np.argsort(-others @ own, kind="stable")]
        return [other for other in names if self.predicted.path(other).exists()][: self.scans]
