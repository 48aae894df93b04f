"""Which scan to look at next: the one whose correction is expected to win most on the scans that nobody touches.

A corrected scan serves the scans that are more like it than like any labelled one. A strategy gives each untouched scan
a score from these distances and from what is known of the labels; it knows no truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from semisam_o1.data.cohort import Cohort
from semisam_o1.features import FeatureStore
from semisam_o1.files import WorkFiles
from semisam_o1.round_0.alignment import TRIED
from semisam_o1.round_0.atlases import dissimilarity
from semisam_o1.round_0.passes import FirstPass
from semisam_o1.round_0.places import CHANNELS, AffineMap, coarse, principal
from semisam_o1.round_0.templates import anchor
from semisam_o1.runfolder import RoundFolder, RunFolder


class Known(NamedTuple):
    """What is known of N untouched scans.

    distances: (N, N), entry (i, j) is the descriptor distance of scan i to scan j. served: (N,), the distance to the
    nearest labelled scan. error: (N,), 1 - predicted Dice. uncertainty: (N,), mean over the scan.
    """

    distances: np.ndarray
    served: np.ndarray
    error: np.ndarray
    uncertainty: np.ndarray


def worst(known: Known) -> np.ndarray:
    """The lowest predicted Dice."""
    return known.error


def uncertain(known: Known) -> np.ndarray:
    """The highest uncertainty."""
    return known.uncertainty


def typical(known: Known) -> np.ndarray:
    """The scan that brings a labelled scan nearest to those that have none near: the mean fall of their distances."""
    nearer = np.maximum(0, known.served[:, None] - known.distances)
    np.fill_diagonal(nearer, known.served)
    return nearer.mean(0)


def expected_win(known: Known) -> np.ndarray:
    """The expected fall of the errors: each scan's error times the share by which a labelled scan comes nearer."""
    nearer = np.maximum(0, 1 - known.distances / known.served[:, None])
    np.fill_diagonal(nearer, 1)
    return (known.error[:, None] * nearer).mean(0)


STRATEGIES: dict[str, Callable[[Known], np.ndarray]] = {
    "worst predicted": worst,
    "most uncertain": uncertain,
    "most typical": typical,
    "expected win": expected_win,
}
REASONS = {
    "worst predicted": "the lowest predicted Dice",
    "most uncertain": "the highest uncertainty",
    "most typical": "the best example of the scans that no labelled scan resembles",
    "expected win": "its correction should improve the labels of the pool most",
}
DEFAULT = "most typical"


def order(known: Known, strategy: str = DEFAULT) -> list[int]:
    """The indices of the untouched scans, the one to look at next first."""
    return [int(i) for i in np.argsort(-STRATEGIES[strategy](known), kind="stable")]


def distance_table(
    store: FeatureStore, records: WorkFiles, anchor: str, names: Sequence[str], others: Sequence[str]
) -> np.ndarray:
    """The descriptor distance of each scan of ``names`` to each of ``others``, through the template ``anchor``: (N, M).

    ``others`` may hold ``anchor`` itself.
    """
    template = store.load(anchor)
    tokens, factor = coarse(principal(template.tokens, CHANNELS)(template.tokens), template.tokens)
    places = {anchor: (tokens, AffineMap(torch.eye(3), torch.zeros(3)))}
    for name in {*names, *others} - {anchor}:
        place, tokens = FirstPass.alignment(records, name, anchor)
        places[name] = (tokens, place)
    step, targets = template.step_mm * factor, [places[other] for other in others]
    table = [dissimilarity(*places[name], targets, step, every=TRIED).numpy() for name in names]
    return np.stack(table) if table else np.empty((0, len(others)))


def known_of(run: RunFolder, cohort: Cohort, store: FeatureStore, folder: RoundFolder) -> tuple[list[str], Known]:
    """The untouched scans of a run that can be ranked, and what is known of them; ``folder``: of the final labels."""
    records, anchor_name = run.round(0).work("first"), anchor(store, cohort).name
    names = [case.name for case in cohort.untouched if records.has(case.name, f"alignments/{anchor_name}")]
    labelled = [
        case.name
        for case in cohort.labelled
        if case.name == anchor_name or records.has(case.name, f"alignments/{anchor_name}")
    ]
    table = distance_table(store, records, anchor_name, names, [*labelled, *names])
    quality, uncertainty = folder.quality.read(), folder.uncertainty.read()
    predicted = [quality.get(name, {}).get("predicted_dice") for name in names]
    return names, Known(
        table[:, len(labelled) :],
        table[:, : len(labelled)].min(1, initial=np.inf),
        np.array([1.0 if value is None else 1 - value for value in predicted]),  # unknown: it has to be looked at
        np.array([uncertainty.get(name, {}).get("uncertainty", 0.0) for name in names]),
    )
