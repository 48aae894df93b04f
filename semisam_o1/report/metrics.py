"""Metrics of a label against the truth: Dice, Jaccard, 95% Hausdorff and average surface distance, always finite.

Two definitions, chosen by name:

========================  =======================================  ==========================================
what                      ``mm`` (MONAI's)                         ``paper`` (the published code's)
========================  =======================================  ==========================================
unit of distance          mm, with the scan's own spacing          voxels
hd95_mm                   larger of both directions' percentiles   percentile of both directions, pooled
asd_mm                    mean over both surfaces                  mean from prediction to truth only
both labels empty         1, 1, 0, 0                               1, 1, 0, 0
one of them empty         0, 0, the volume's diagonal twice        0, 0, 200, 100
========================  =======================================  ==========================================

The diagonal is the largest possible distance in a volume, so a missing structure never has a better score than a
misplaced one, and no mean contains NaN. The column names end in ``_mm`` under both definitions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.metrics import compute_dice, compute_iou
from monai.metrics.utils import get_mask_edges, get_surface_distance

from semisam_o1.data.cohort import Cohort
from semisam_o1.tables import COUNT, TEXT, read_rows, write_rows
from semisam_o1.types import Case

SPLITS = ("pool", "touched", "val", "test")  # touched: scans of the pool for which a person gave a label
STAGES = ("copied", "propagated", "predicted", "refined")  # in the order of a run
STATISTICS: dict[str, Callable] = {"mean": np.mean, "median": np.median}


@dataclass(frozen=True, eq=False)
class Pair:
    """One class in a label and in its truth.

    Attributes:
        prediction, truth: boolean masks (h, w, d).
        spacing: voxel size (3,) in the unit of distances.
        diagonal: of the whole volume, in the unit of distances.
    """

    prediction: np.ndarray
    truth: np.ndarray
    spacing: np.ndarray
    diagonal: float

    @cached_property
    def present(self) -> int:
        """The number of masks that are not empty."""
        return int(self.prediction.any()) + int(self.truth.any())

    @cached_property
    def distances(self) -> tuple[np.ndarray, np.ndarray]:
        """Distances of the prediction's surface voxels to the truth's surface (n,), and of the truth's to it (m,)."""
        # Computed once for both of MONAI's surface metrics, because the distances are most of the cost.
        edges = get_mask_edges(self.prediction, self.truth)
        return tuple(get_surface_distance(*e, spacing=self.spacing).astype(float) for e in (edges, edges[::-1]))


@dataclass(frozen=True)
class Measure:
    """A metric of a label against the truth. Add a new one to OURS to include it in every table.

    Attributes:
        name: of its column in metrics.csv.
        title, unit: its heading in printed tables; ``unit`` is empty for a number without unit.
        better: whether higher or lower values are better.
        digits: decimals in printed tables.
        both_empty: its value if neither label has the class.
        missed: its value if only one of them has the class; None is the volume's diagonal.
        function: computes its value if both have the class.
    """

    name: str
    title: str
    unit: str
    better: Literal["higher", "lower"]
    digits: int
    both_empty: float
    missed: float | None
    function: Callable[[Pair], float]

    def of(self, pair: Pair) -> float:
        """Its value for one class of a label."""
        if pair.present == 2:
            return float(self.function(pair))
        missed = pair.diagonal if self.missed is None else self.missed
        return missed if pair.present else self.both_empty

    def worst(self, values: Iterable[float]) -> float:
        return min(values) if self.better == "higher" else max(values)

    def text(self, value: float) -> str:
        return f"{value:.{self.digits}f}"


def _overlap(function: Callable[..., torch.Tensor], pair: Pair) -> float:
    one, other = (torch.from_numpy(mask)[None, None].float() for mask in (pair.prediction, pair.truth))
    return function(one, other, ignore_empty=False).item()


def _percentile(distances: np.ndarray) -> float:
    return float(np.percentile(distances, 95))


# The numbers are digits, both_empty and missed.
DICE = Measure("dice", "Dice", "", "higher", 3, 1.0, 0.0, lambda pair: _overlap(compute_dice, pair))
JACCARD = Measure("jaccard", "Jaccard", "", "higher", 3, 1.0, 0.0, lambda pair: _overlap(compute_iou, pair))
HD95 = Measure("hd95_mm", "HD95", "mm", "lower", 2, 0.0, None, lambda pair: max(map(_percentile, pair.distances)))
ASD = Measure("asd_mm", "ASD", "mm", "lower", 2, 0.0, None, lambda pair: np.concatenate(pair.distances).mean())
OURS = (DICE, JACCARD, HD95, ASD)  # charts and captions show the first
PUBLISHED = {  # metrics that the published code defines differently
    HD95: replace(HD95, unit="voxels", missed=200.0, function=lambda pair: _percentile(np.concatenate(pair.distances))),
    ASD: replace(ASD, unit="voxels", missed=100.0, function=lambda pair: pair.distances[0].mean()),
}
# The metrics of each definition; names are the same in both.
MEASURES: dict[str, tuple[Measure, ...]] = {"mm": OURS, "paper": tuple(PUBLISHED.get(m, m) for m in OURS)}


def columns() -> dict[str, str]:
    """The columns of metrics.csv, name -> format (see `tables`); the same under every definition."""
    fixed = {"case": TEXT, "split": TEXT, "round": COUNT, "stage": TEXT, "class": TEXT}
    return fixed | {measure.name: ".6f" for measure in MEASURES["mm"]}


def score(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing_mm: Sequence[float] | np.ndarray,
    num_classes: int,
    definition: str = "mm",
) -> list[dict[str, Any]]:
    """Score integer labels (H, W, D) against the truth (H, W, D); ``spacing_mm`` (3,) runs along the axes.

    Dice 2|A∩B|/(|A|+|B|), Jaccard |A∩B|/|A∪B|. The surface of a class consists of its voxels with a neighbour (of
    six) in another class or outside of the volume. Distances are between voxel centres. For definitions and empty
    labels see the table of the module.

    Returns:
        one dictionary for each class 1..num_classes - 1 and one for ``mean``, their arithmetic mean, with the keys
        ``class`` and the names of the metrics (``dice``, ...). Higher class numbers are ignored.

    Raises:
        ValueError: the shapes differ or are not 3D, the definition is unknown, or num_classes is under 2.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape or prediction.ndim != 3:
        raise ValueError(
            f"label of shape {prediction.shape} against truth of shape {truth.shape}: expected equal 3D shapes"
        )
    if definition not in MEASURES:
        raise ValueError(f"definition of the metrics is '{definition}', expected one of {', '.join(MEASURES)}")
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}, expected 2 or more (background and a foreground class)")
    spacing = np.broadcast_to(np.asarray(spacing_mm, float), 3) if definition == "mm" else np.ones(3)
    diagonal = float(np.linalg.norm(np.array(truth.shape) * spacing))
    # Voxels outside the foreground's bounding box do not change any metric, and the box is much smaller than the scan.
    box = _bounding_box((prediction > 0) | (truth > 0))
    prediction, truth = prediction[box], truth[box]
    measures, rows = MEASURES[definition], []
    for number in range(1, num_classes):
        pair = Pair(prediction == number, truth == number, spacing, diagonal)
        rows.append({"class": number} | {measure.name: measure.of(pair) for measure in measures})
    return rows + [{"class": "mean"} | {m.name: float(np.mean([row[m.name] for row in rows])) for m in measures}]


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The bounding box (three slices) of ``mask`` (H, W, D); empty for an empty mask."""
    box = []
    for axis in range(3):
        found = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0))
    return tuple(box)


def evaluate_folder(
    label: Callable[[str], Path],
    cases: Iterable[Case],
    cohort: Cohort,
    here: Mapping[str, Any],
    definition: str = "mm",
    known: dict[tuple[str, str, str], list[dict[str, Any]]] | None = None,
) -> list[dict[str, Any]]:
    """Score labels, (H, W, D) on each scan's own grid, against the truth of ``cases``: rows for `write_csv`.

    Cases without truth or without a label file are skipped. The spacing is that of the scan.

    Args:
        label: case name -> path of its label, which may not exist.
        cohort: reads the labels.
        here: ``split``, ``round`` and ``stage``, written into every row.
        definition: ``mm`` or ``paper``.
        known: cache of scores, shared between calls; a file with the same bytes as a scored one is not scored again.
            Refinement leaves most files unchanged.

    Raises:
        DatasetError: a label or truth cannot be used on its scan's grid.
    """
    known = {} if known is None else known
    rows = []
    for case in cases:
        path = label(case.name)
        if case.label is None or not path.is_file():
            continue
        key = (case.name, definition, hashlib.sha256(path.read_bytes()).hexdigest())
        if key not in known:
            known[key] = _evaluate_case(case, path, cohort, definition)
        rows += [{"case": case.name, **here, **scores} for scores in known[key]]
    return rows


def _evaluate_case(case: Case, path: Path, cohort: Cohort, definition: str) -> list[dict[str, Any]]:
    label, truth = (cohort.label(case, found).numpy() for found in (path, case.label))
    rows = score(label, truth, cohort.grid(case).spacing, cohort.num_classes, definition)
    numbers = cohort.class_numbers
    return [row | {"class": numbers[row["class"]] if row["class"] != "mean" else "mean"} for row in rows]


def write_csv(rows: Iterable[Mapping[str, Any]], path: str | Path) -> Path:
    """Write rows of `evaluate_folder` as ``metrics.csv``, with six decimals, atomically."""
    return write_rows(path, columns(), rows)


def read_csv(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.csv``: ``round`` and class numbers as int, metrics as float.

    Raises:
        ValueError: a column is missing; the message names it.
    """
    rows = read_rows(path, columns())
    return [row | {"class": row["class"] if row["class"] == "mean" else int(row["class"])} for row in rows]


def summary(rows: Iterable[Mapping[str, Any]], label: int | str = "mean") -> list[dict[str, Any]]:
    """One row for each (split, round, stage), in the order of the run, over the cases of ``rows``.

    Keys: ``split``, ``round``, ``stage``, ``cases`` (their number) and, for each metric, ``<metric>_mean``, ``_median``
    and ``_worst`` (the smallest overlap, the largest distance).

    Args:
        label: a class number, or ``mean`` for the mean over the foreground.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["class"] == label:
            groups.setdefault((row["split"], row["round"], row["stage"]), []).append(row)

    def place(key):
        return [names.index(k) if k in names else len(names) for k, names in ((key[0], SPLITS), (key[2], STAGES))]

    table = []
    for key in sorted(groups, key=lambda k: (place(k)[0], k[1], place(k)[1], k)):
        line = dict(zip(("split", "round", "stage"), key)) | {"cases": len(groups[key])}
        for measure in MEASURES["mm"]:
            values = [row[measure.name] for row in groups[key]]
            line |= {f"{measure.name}_{s}": float(f(values)) for s, f in STATISTICS.items()}
            line[f"{measure.name}_worst"] = measure.worst(values)
        table.append(line)
    return table


def summary_text(rows: Iterable[Mapping[str, Any]], definition: str = "mm") -> str:
    """The summary of ``rows`` as a text table; the heading gives the units of the ``definition``."""
    first, *others = MEASURES[definition]
    titles = [f"{m.title} {m.unit}".rstrip() for m in others]
    head = ["split", "round", "stage", "cases", first.title, "median", "worst", *titles]
    lines = [head]
    for line in summary(rows):
        cells = [str(line[name]) for name in ("split", "round", "stage", "cases")]
        cells += [first.text(line[f"{first.name}_{s}"]) for s in ("mean", "median", "worst")]
        lines.append(cells + [m.text(line[f"{m.name}_mean"]) for m in others])
    if len(lines) == 1:
        return "no case with truth was scored"
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    left = {0, 2}
    return "\n".join(
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )
