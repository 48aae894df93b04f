"""The quality of the labels of a run: evidence from round 0's work files, and the calibration of the run."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel
import numpy as np
import torch
import torch.nn.functional as F

from semisam_o1.data.cohort import Cohort
from semisam_o1.features import FeatureStore
from semisam_o1.files import read_json
from semisam_o1.report.overlap import soft_dices
from semisam_o1.round_0.calibration import Calibration
from semisam_o1.round_0.detail import Details
from semisam_o1.round_0.passes import FirstPass, left_out
from semisam_o1.round_0.propagation import Reference
from semisam_o1.round_0.quality import Evidence, Quality, WayBack, back_from, evidence, hard
from semisam_o1.round_0.templates import reference, templates_of
from semisam_o1.round_0.way_back import TemplatesWayBack, save_way_back, way_back
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import Case, Probabilities

DOUBTFUL = 0.7  # reverse consistency below which the reverse alignment itself is doubted


class QualityEstimate:
    """Estimates the quality of a label without truth, called with a case and a label file; see the module `quality`.

    It uses the scan's best template. The reverse alignment, from template to scan, is computed once and stored with
    round 0 of the run ``output_dir``, so estimates for later rounds are fast.
    """

    def __init__(self, store: FeatureStore, cohort: Cohort, output_dir: str | Path):
        self.store, self.cohort = store, cohort
        self.templates = {template.name: template for template in templates_of(store, cohort)}
        self.folder = RunFolder(output_dir).round(0)
        self.records, self.fused, self.back = (self.folder.work(kind) for kind in ("first", "fused", "back"))

    def __call__(self, case: Case, label: Path) -> Quality:
        """The quality of a label, by the calibration of round 0.

        Raises:
            FileNotFoundError: round 0 has none: no label of it was judged.
        """
        return self.calibration.predict(self.evidence(case, label))

    @functools.cached_property
    def small(self) -> list[int]:
        """The channels of the classes that are small in a template, see the module `detail`."""
        details = Details(self.store, self.cohort)
        return sorted({channel for name in self.templates for channel in details.channels(name)})

    @functools.cached_property
    def calibration(self) -> Calibration:
        return Calibration.of_content(read_json(self.folder.calibration))

    def evidence(self, case: Case, label: Path) -> Evidence:
        """The evidence of a label."""
        first = FirstPass.load(self.records, case.name, "frame", "residual", "template", "reached")
        found = self.store.frame(first.frame).load(case.name)
        if not self.back.path(case.name).exists():
            templates = [self.templates[name] for name in ([first.template] if first.template else self.templates)]
            save_way_back(self.back, case.name, way_back(templates, found, first.frame))
        name, points, residual = self.back.load(case.name, ["template", "points", "residual"])
        way, template = WayBack(points, float(residual)), self.templates[name]
        shares = reference(case, found, self.cohort, label).label
        if self.fused.path(case.name).exists():
            propagated, distance = self.fused.load(case.name, ["probabilities", "dissimilarity"])
        else:
            propagated = FirstPass.load(self.records, case.name, "probabilities").probabilities
            distance = way.residual if math.isnan(first.residual) else first.residual  # NaN: nothing was aligned
        labelled = Reference(found.tokens, shares)
        judge = functools.partial(evidence, template.reference, labelled, propagated, small=self.small)
        judged = judge(way, found.step_mm, float(distance))
        checked = self.back.has(case.name, "checked")  # once: it does not depend on the label
        if first.template and not checked and np.nanmean(judged.reverse_consistency) < DOUBTFUL:
            place = FirstPass.alignment(self.records, case.name, first.template).to_template
            again = back_from(template.reference.tokens, found.tokens, found.step_mm, place)
            way = min(way, again, key=lambda one: one.residual)  # if the second is better, the independent one failed
            save_way_back(self.back, case.name, TemplatesWayBack(template, way), checked=True)
            points, residual = self.back.load(case.name, ["points", "residual"])  # as every later estimate has it
            judged = judge(WayBack(points, float(residual)), found.step_mm, float(distance))
        if first.reached is not None:
            judged.reverse_consistency[(first.reached == 0).numpy()] = np.nan
        return judged


def copies_evidence(run: RunFolder, round: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of each copy: the true Dice of each class of its label of ``round``, and the agreement with round 0, (classes,).

    Both lists are empty if the network of the round has not labelled the copies. A copy has no voxels that are finer
    than tokens, so small classes always count as in round 0, see `dices_of_small`.
    """
    true, agreement = [], []
    for label, probabilities, truth, small in _labelled_copies(run, round):
        shares = soft_dices(probabilities, probabilities, "product").numpy()
        true.append(np.where(np.isnan(small), soft_dices(label, truth).numpy(), small))
        agreement.append(np.where(np.isnan(small), soft_dices(label, probabilities, "product").numpy(), shares))
    return true, agreement


def copies_compared(run: RunFolder, round: int) -> list[tuple[float, float, float]]:
    """Of each copy that the network of ``round`` labelled: mean Dice of its label and of round 0's, and of both.

    A small class, which copies have no voxels for, counts if the network gives it to no voxel: then it is lost. If no
    class counts, small ones do on tokens, as far as they fill any. A copy in which none does is left out.
    """
    found = []
    for label, probabilities, truth, small in _labelled_copies(run, round):
        first, empty = hard(probabilities), np.zeros_like(small)
        lost, filled = _nowhere(label), ~(_nowhere(first) | _nowhere(truth))
        on_tokens = [soft_dices(*pair).numpy() for pair in ((label, truth), (first, truth), (label, first))]
        dices = [
            np.where(np.isnan(small), known, np.where(lost, of_small, np.nan))
            for known, of_small in zip(on_tokens, (empty, small, empty))
        ]
        if np.isnan(dices[0]).all():
            dices = [np.where(filled, known, np.nan) for known in on_tokens]
        if not any(np.isnan(known).all() for known in dices):
            of_network, of_round_0, both = (float(np.nanmean(known)) for known in dices)
            found.append((of_network, of_round_0, both))
    return found


def _nowhere(label: Probabilities) -> np.ndarray:
    """Which foreground classes of a one-hot ``label`` have no voxel, (classes,)."""
    return (label[1:].flatten(1).sum(1) == 0).numpy()


def _labelled_copies(
    run: RunFolder, round: int
) -> Iterator[tuple[Probabilities, Probabilities, Probabilities, np.ndarray]]:
    """One-hot label of ``round``, probabilities of round 0, and one-hot truth of each copy, (num_classes, H, W, D).

    Last the Dice of its small classes in round 0, (num_classes - 1,), NaN for others.
    """
    made = run.round(0).work("copies")
    for name in made.names():
        probabilities, truth = made.load(name, ["probabilities", "truth"])
        label = hard(probabilities)
        if round:
            path = run.round(round).copy(name)
            if not path.is_file():
                continue
            predicted = np.asarray(nibabel.Nifti1Image.from_filename(path).dataobj).astype(np.int64)
            label = one_hot(torch.from_numpy(predicted), len(label))
        small = np.full(len(label) - 1, np.nan)
        if made.has(name, "small_dice"):
            small = made.load(name, ["small_dice"])[0].numpy()
        yield label, probabilities.float(), one_hot(truth, len(label)), small


def one_hot(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """(H, W, D) -> (count, H, W, D)."""
    return F.one_hot(numbers.long(), count).movedim(-1, 0).float()


def labelled_evidence(
    store: FeatureStore, cohort: Cohort, run: RunFolder, small: Sequence[int] = ()
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """As `copies_evidence`, of the labelled scans to which round 0 carried the label of the others; not for ``small``
    classes (channels)."""
    records, true, agreement = run.round(0).work("first"), [], []
    for case, probabilities in left_out(cohort, records, run.round(0).work("fused")):
        found = store.frame(FirstPass.load(records, case.name, "frame").frame).load(case.name)
        truth = hard(reference(case, found, cohort).label)
        true.append(soft_dices(hard(probabilities), truth).numpy())
        agreement.append(soft_dices(hard(probabilities), probabilities, "product").numpy())
        true[-1][np.array(small, int) - 1] = np.nan  # on tokens, they cannot be compared
    return true, agreement
