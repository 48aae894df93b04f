"""The refinement between rounds as an Ignite engine: two kinds of vote behind one interface, and the guard.

A kind is called with a case and proposes a label (H, W, D) for it on the scan's grid, or None to leave it alone.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Engine, Events

from semisam_o1.alignment import CHANNELS, centred_points, principal
from semisam_o1.datasets import Cohort
from semisam_o1.engine import UncertaintyList
from semisam_o1.export import write_label
from semisam_o1.features import Features, FeatureStore
from semisam_o1.files import WorkFiles, write_json
from semisam_o1.propagation import label_radius, reach_of
from semisam_o1.refinement import (
    Voters,
    confidence,
    mean_dice,
    place_vectors,
    uncertain,
    volume_votes,
    vote_labels,
    voxel_votes,
)
from semisam_o1.round_0 import Judge, templates_of
from semisam_o1.transforms import Grid, read_volume, to_grid
from semisam_o1.types import Case, Probabilities, Tokens

log = logging.getLogger("semisam_o1")
EXACT = 1_000_000  # places among which the most similar are searched exactly
VOTING_SCANS = 64  # whose places are kept in memory
RECORD = "refinement.json"  # in a round's folder: what each proposal was worth, and which were taken


def no_votes(case: Case) -> None:
    """Every label stays as predicted."""


class VolumeVotes:
    """As published: a volume that is unsure as a whole gets its label from the whole volumes most similar to it.

    See `refinement.uncertain`, `volume_votes`, `vote_labels`. Templates are certain and vote with their own labels.

    Args:
        round_dir: holds ``predictions/`` and ``uncertainty.csv``.
        k: how many vote; where fewer are certain, every label is left alone.
        quantile: of the mean entropies; volumes from there on are unsure.
    """

    def __init__(self, store: FeatureStore, cohort: Cohort, round_dir: str | Path, k: int = 5, quantile: float = 0.9):
        self.cohort, self.folder, self.k = cohort, Path(round_dir), k
        uncertainty = UncertaintyList(self.folder / "uncertainty.csv").read()
        pool = [case for case in cohort.pool if case.name in uncertainty]
        self.voters = list(cohort.templates) + pool
        self.descriptors = store.descriptors(case.name for case in self.voters)
        unsure = uncertain([uncertainty[case.name] for case in pool], quantile)
        self.certain = np.concatenate([np.ones(len(cohort.templates), bool), ~unsure])
        if self.certain.sum() < k:
            log.info("refinement: %d certain volumes, fewer than knn_k = %d: labels left alone", self.certain.sum(), k)

    def __call__(self, case: Case) -> torch.Tensor | None:
        place = self.voters.index(case)
        found, weights = volume_votes(self.descriptors, self.certain, self.descriptors[place], self.k)
        if self.certain[place] or not len(found):
            return None
        labels = [self._label_of(self.voters[i]) for i in found]
        return vote_labels(labels, weights, self.cohort.grid(case).shape, self.cohort.num_classes)

    def _label_of(self, case: Case) -> torch.Tensor:
        path = case.label if case in self.cohort.templates else self.folder / "predictions" / f"{case.name}.nii.gz"
        label = read_volume(path, "label", self.cohort.hdf5_spacing).as_tensor()[0]
        return label.clamp(max=self.cohort.num_classes - 1)


class VoxelVotes:
    """Unsure places of a volume get their label from the most similar places of the scans most like it.

    Places are tokens, compared by feature and by where round 0 found them in the template; a vote counts by similarity
    and by how sure its place is, the template's own places being certain: see `refinement.voxel_votes`. The vote and
    what the network said are joined; what is sure stays as predicted. Where round 0 aligned nothing (`copy`,
    `prototype`) the template's grid is stretched over the scan's.

    Args:
        round_dir: holds ``predictions/``, ``uncertainty/`` and the probabilities in ``work/predicted/``.
        propagated_dir: of round 0, for where each token lies in the template.
        unsure: entropy from which a place is unsure, a share of its largest, ln(num_classes).
        quantile: in place of ``unsure``: of the entropies in the volume.
        scans: of how many scans the places vote, besides the template's.
        k: how many places vote.
        share: of the vote in the new probabilities, beside what the network said.
        position_weight: of a distance of one label radius, beside a descriptor's distance.
        reach: how far from a border places still vote, in label radii.
        most_voters: of a scan's places near a border at most so many vote, drawn by a fixed seed.
        cells: of an inexact index, see `neighbours.nearest`; a search among fewer than a million places is exact.
    """

    def __init__(
        self,
        store: FeatureStore,
        cohort: Cohort,
        round_dir: str | Path,
        propagated_dir: str | Path,
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
        self.store, self.cohort, self.folder = store, cohort, Path(round_dir)
        self.predicted = WorkFiles(round_dir, "predicted")
        self.first, self.agreed = (WorkFiles(propagated_dir, kind) for kind in ("first", "agreed"))
        self.unsure, self.quantile, self.scans, self.k = unsure, quantile, scans, k
        self.share, self.cells, self.most_voters = share, cells, most_voters
        (features, template), *_ = templates_of(store, cohort)
        self.basis = principal(template.tokens, CHANNELS)
        radius = label_radius(template.label)
        self.reach, self.position_weight = max(1, round(reach * radius)), position_weight / (radius * features.step_mm)
        points = centred_points(template.tokens.shape[1:], features.step_mm)
        self.extent = torch.tensor(template.tokens.shape[1:]) * features.step_mm
        self.template = self._near_borders(self.basis(template.tokens), points, template.label)
        self.voters_of = functools.lru_cache(VOTING_SCANS)(lambda name: self._near_borders(*self._seen(name)[1:]))

    def __call__(self, case: Case) -> torch.Tensor | None:
        features, tokens, points, probabilities = self._seen(case.name)
        doubt = 1 - confidence(probabilities)
        least = self.unsure if self.quantile is None else max(float(np.quantile(doubt, self.quantile)), 0.01)
        asked = (doubt >= least).flatten().nonzero()[:, 0]
        if not len(asked):
            return None
        others = [self.voters_of(name) for name in self._similar(case.name)]
        voters = Voters(*map(torch.cat, zip(self.template, *others)))
        queries = place_vectors(tokens, points, self.position_weight)[asked]
        cells = self.cells if len(voters.shares) > EXACT else 0
        voted = probabilities.flatten(1).clone()
        voted[:, asked] = voxel_votes(voters, queries, self.k, cells).T
        voted = to_grid(voted.reshape(probabilities.shape), features.affine, features.scan)
        joined = self.share * voted + (1 - self.share) * self._predicted(case.name, features.scan)
        label, entropy = (
            read_volume(self.folder / kind / f"{case.name}.nii.gz").as_tensor()[0]
            for kind in ("predictions", "uncertainty")
        )
        return torch.where(entropy >= least * math.log(len(joined)), joined.argmax(0).to(label), label)

    def _predicted(self, name: str, grid: Grid) -> Probabilities:
        """What the network says of a scan, on ``grid``."""
        probabilities, affine = self.predicted.load(name, ["probabilities", "affine"])
        return to_grid(probabilities, affine, grid).clamp(0, 1)

    def _seen(self, name: str) -> tuple[Features, Tokens, torch.Tensor, Probabilities]:
        """A scan on its token grid: its features; their principal components (C, H, W, D); where each token lies in
        the template, (H, W, D, 3) mm; what the network says there, (num_classes, H, W, D)."""
        (frame,) = self.first.load(name, ["frame"])
        features = self.store.frame(frame).load(name)
        grid = Grid(features.affine, tuple(features.tokens.shape[1:]))
        if self.first.has(name, "points"):
            (points,) = self.first.load(name, ["points"])
        else:
            extent = torch.tensor(grid.shape) * features.step_mm
            points = centred_points(grid.shape, features.step_mm) * (self.extent / extent)
        return features, self.basis(features.tokens), points, self._predicted(name, grid)

    def _near_borders(self, tokens: Tokens, points: torch.Tensor, probabilities: Probabilities) -> Voters:
        near = reach_of(probabilities > 0.5, self.reach).sum(0) >= 2
        near = near.flatten().nonzero()[:, 0]
        drawn = torch.randperm(len(near), generator=torch.Generator().manual_seed(0))[: self.most_voters]
        near = near[drawn.sort().values]
        vectors = place_vectors(tokens, points, self.position_weight)[near]
        return Voters(vectors, probabilities.flatten(1).T[near], confidence(probabilities).flatten()[near])

    def _similar(self, name: str) -> list[str]:
        """The scans most like it: its atlases of the second pass, else the nearest by global descriptor."""
        if self.agreed.has(name, "atlases"):
            (names,) = self.agreed.load(name, ["atlases"])
        else:
            names = [case.name for case in self.cohort.pool if case.name != name]
            own, others = self.store.descriptors([name])[0], self.store.descriptors(names)
            names = [names[i] for i in np.argsort(-others @ own, kind="stable")]
        return [other for other in names if self.predicted.path(other).exists()][: self.scans]


class Worth:
    """What a label file of a case is worth without truth: its predicted Dice or, where ``judged`` is off, its Dice
    with the label that round 0 carried there."""

    def __init__(self, store: FeatureStore, cohort: Cohort, propagated_dir: str | Path, judged: bool = True):
        self.cohort, self.carried = cohort, Path(propagated_dir) / "labels"
        self.judge = Judge(store, cohort, propagated_dir) if judged else None

    def __call__(self, case: Case, label: Path) -> float:
        if self.judge is not None:
            return self.judge(case, label).predicted_dice
        both = (read_volume(path).as_tensor()[0] for path in (label, self.carried / f"{case.name}.nii.gz"))
        return mean_dice(*both, self.cohort.num_classes)


def switched_off(round_dir: str | Path) -> bool:
    """Whether the refinement of a round was switched off by its guard."""
    record = Path(round_dir) / RECORD
    return record.exists() and json.loads(record.read_text(encoding="utf-8"))["switched_off"]


def switched_off_before(output: str | Path, round: int) -> bool:
    """Whether the refinement was switched off in a round of the run ``output`` before ``round``: then it stays off."""
    return any(switched_off(Path(output) / f"round_{earlier}") for earlier in range(1, round))


def refinement_engine(
    propose: Callable[[Case], torch.Tensor | None],
    cohort: Cohort,
    round_dir: str | Path,
    guard: Callable[[Case, Path], float] | None = None,
    least_gain: float = 0.001,
    handlers: Sequence = (),
) -> Engine:
    """An engine that runs over the pool and writes ``round_dir/labels``: predictions, mended where ``propose`` says.

    ``engine.state.replaced`` names the cases whose label changed. Where ``guard`` tells what a label is worth, a
    proposal worth less than the prediction is turned down; where proposals gain less than ``least_gain`` on average,
    which is less than the guard can tell, all are: `switched_off`.
    """
    folder = Path(round_dir)

    def files(case: Case) -> tuple[Path, Path]:
        return tuple(folder / kind / f"{case.name}.nii.gz" for kind in ("predictions", "labels"))

    def process(engine: Engine, case: Case) -> None:
        source, target = files(case)
        if not source.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        label = propose(case)
        if label is None:
            return
        write_label(target, label.numpy(), case.image, cohort.grid(case))
        if guard is not None:
            engine.state.gains[case] = guard(case, target) - guard(case, source)
            if engine.state.gains[case] < 0:
                shutil.copyfile(source, target)
                return
        engine.state.replaced.append(case.name)

    engine = Engine(process)

    @engine.on(Events.STARTED)
    def clear(engine: Engine) -> None:
        engine.state.replaced, engine.state.gains = [], {}

    @engine.on(Events.COMPLETED)
    def finish(engine: Engine) -> None:
        gains = engine.state.gains
        mean = sum(gains.values()) / max(len(gains), 1)
        off = bool(gains) and mean < least_gain
        if gains:
            log.info("refinement: proposals for %d labels, worth %+.4f by the guard", len(gains), mean)
        if off:
            log.info("refinement is switched off: its proposals are worth no more than the predictions")
            for case in gains:
                shutil.copyfile(*files(case))
            engine.state.replaced = []
        found = {case.name: gain for case, gain in gains.items()}
        write_json(folder / RECORD, {"switched_off": off, "gains": found, "replaced": engine.state.replaced})

    for handler in handlers:
        handler.attach(engine)
    return engine
