"""How well a label meets the truth: Dice, Jaccard, 95% Hausdorff and average surface distance, always finite.

Two definitions, chosen by name:

========================  =======================================  ==========================================
what                      ``mm`` (MONAI's)                         ``paper`` (the published code's)
========================  =======================================  ==========================================
unit of distance          mm, by the scan's own spacing            voxels
hd95_mm                   larger of both directions' percentiles   percentile of both directions, pooled
asd_mm                    mean over both surfaces                  mean from prediction to truth alone
both labels empty         1, 1, 0, 0                               1, 1, 0, 0
one of them empty         0, 0, the volume's diagonal twice        0, 0, 200, 100
========================  =======================================  ==========================================

The diagonal is the farthest that two points of a volume can lie apart, so a missing structure is never scored
better than a misplaced one, and no NaN enters a mean. The column names end in ``_mm`` under both definitions.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.metrics import compute_dice, compute_iou
from monai.metrics.utils import get_mask_edges, get_surface_distance

from semisam_o1.files import write_text
from semisam_o1.transforms import read_volume
from semisam_o1.types import Case

MEASURES = ("dice", "jaccard", "hd95_mm", "asd_mm")
COLUMNS = ("case", "split", "round", "stage", "class", *MEASURES)
DEFINITIONS = ("mm", "paper")
SPLITS = ("pool", "val", "test")
STAGES = ("copied", "propagated", "predicted", "refined")  # in the order in which a run makes them
MISSED_VOXELS = (200.0, 100.0)  # hd95 and asd of the published code where one label is empty
STATISTICS = {"mean": np.mean, "median": np.median}


def score(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing_mm: Sequence[float],
    num_classes: int,
    definition: str = "mm",
) -> list[dict]:
    """Score integer labels (H, W, D) against the truth (H, W, D); ``spacing_mm`` (3,) runs along the axes.

    Dice 2|A∩B|/(|A|+|B|), Jaccard |A∩B|/|A∪B|. A surface is the voxels of a class that one of their six
    neighbours does not share (beyond the volume's edge counts as another class); distances run between voxel
    centres. Definitions and empty labels: the module's table.

    Returns:
        one dictionary for each class 1..num_classes - 1 and one for ``mean``, their arithmetic mean: keys
        ``class``, ``dice``, ``jaccard``, ``hd95_mm``, ``asd_mm``. Classes beyond num_classes are not counted.

    Raises:
        ValueError: the shapes differ or are not 3D, the definition is unknown, or num_classes is under 2.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape or prediction.ndim != 3:
        raise ValueError(f"label of shape {prediction.shape} against truth of shape {truth.shape}: expected equal, 3D")
    if definition not in DEFINITIONS:
        raise ValueError(f"definition of the metrics is '{definition}', expected one of {', '.join(DEFINITIONS)}")
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}, expected 2 or more (background and a foreground class)")
    spacing = np.broadcast_to(np.asarray(spacing_mm, float), 3) if definition == "mm" else np.ones(3)
    missed = (float(np.linalg.norm(np.array(truth.shape) * spacing)),) * 2 if definition == "mm" else MISSED_VOXELS
    # Nothing outside the foreground's box changes a number, and boxes are small beside scans.
    box = _bounding_box((prediction > 0) | (truth > 0))
    prediction, truth = prediction[box], truth[box]
    rows = []
    for number in range(1, num_classes):
        values = _score_class(prediction == number, truth == number, spacing, missed, definition)
        rows.append({"class": number} | dict(zip(MEASURES, values)))
    return rows + [{"class": "mean"} | {m: float(np.mean([row[m] for row in rows])) for m in MEASURES}]


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box (three slices) around every True of ``mask`` (H, W, D); empty where there is none."""
    box = []
    for axis in range(3):
        found = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0))
    return tuple(box)


def _score_class(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: np.ndarray,
    missed: tuple[float, float],
    definition: str,
) -> tuple[float, float, float, float]:
    """The four numbers of one class, from boolean masks (h, w, d)."""
    if not (prediction.any() and truth.any()):
        return (0.0, 0.0, *missed) if prediction.any() or truth.any() else (1.0, 1.0, 0.0, 0.0)
    a, b = (torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth))
    dice, jaccard = (measure(a, b, ignore_empty=False).item() for measure in (compute_dice, compute_iou))
    # What MONAI's two surface metrics call, called once for both: the distances are nearly all of the cost.
    edges = get_mask_edges(prediction, truth)
    there = get_surface_distance(*edges, spacing=spacing).astype(float)
    back = get_surface_distance(*edges[::-1], spacing=spacing).astype(float)
    both = np.concatenate([there, back])
    if definition == "paper":
        return dice, jaccard, float(np.percentile(both, 95)), float(there.mean())
    return dice, jaccard, float(max(np.percentile(there, 95), np.percentile(back, 95))), float(both.mean())


def evaluate_folder(
    labels: Path,
    cases: Iterable[Case],
    cohort,
    *,
    split: str,
    round: int,
    stage: str,
    definition: str = "mm",
    known: dict | None = None,
) -> list[dict]:
    """Score ``labels``/<case>.nii.gz, (H, W, D) in each scan's own grid, against the truth of ``cases``.

    Cases without truth or without a label file are passed over. Spacing is that of the truth's affine
    (``cohort.hdf5_spacing`` for HDF5).

    Args:
        labels: the folder.
        cohort: gives ``num_classes`` and ``hdf5_spacing``.
        split, round, stage: written into every row.
        definition: ``mm`` or ``paper``.
        known: scores kept by the caller between calls of one run; a file with the bytes of one scored
            before, as refinement leaves most, is not scored again.

    Returns:
        rows with the keys of `COLUMNS`.

    Raises:
        ValueError: label and truth of a case differ in shape, or the label is not whole numbers.
    """
    known = {} if known is None else known
    rows = []
    for case in cases:
        path = Path(labels) / f"{case.name}.nii.gz"
        if case.label is None or not path.is_file():
            continue
        key = (case.name, definition, hashlib.sha256(path.read_bytes()).hexdigest())
        if key not in known:
            known[key] = _evaluate_case(case, path, cohort, definition)
        here = {"case": case.name, "split": split, "round": round, "stage": stage}
        rows += [here | scores for scores in known[key]]
    return rows


def _evaluate_case(case: Case, path: Path, cohort, definition: str) -> list[dict]:
    label, truth = read_volume(path), read_volume(case.label, "label", cohort.hdf5_spacing)
    if label.shape != truth.shape:
        raise ValueError(
            f"{case.name}: the label {path} has shape {tuple(label.shape[1:])}, the truth {case.label} has"
            f" {tuple(truth.shape[1:])}; labels must lie in the scan's own grid, so write this one anew"
        )
    arrays = []
    for volume, origin in ((label, path), (truth, case.label)):
        array = np.asarray(volume[0])
        whole = array.astype(np.int32)
        if not np.array_equal(whole, array):
            raise ValueError(f"{case.name}: {origin} holds values that are not whole numbers; expected class numbers")
        arrays.append(whole)
    spacing = np.linalg.norm(np.asarray(truth.affine)[:3, :3], axis=0)
    arrays[1] = arrays[1].clip(max=cohort.num_classes - 1)  # merged, where classes are
    return score(*arrays, spacing, cohort.num_classes, definition)


def write_csv(rows: Iterable[dict], path: Path) -> Path:
    """Write rows of `evaluate_folder` as ``metrics.csv``, six decimals, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([f"{row[name]:.6f}" if name in MEASURES else row[name] for name in COLUMNS])
    write_text(path, text.getvalue())
    return Path(path)


def read_csv(path: Path) -> list[dict]:
    """The rows of a ``metrics.csv``: ``round`` and a numbered ``class`` as int, the four measures as float.

    Raises:
        ValueError: a column is missing; the message names it.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; expected {','.join(COLUMNS)}")
        rows = list(reader)
    for row in rows:
        row["round"] = int(row["round"])
        row["class"] = row["class"] if row["class"] == "mean" else int(row["class"])
        row.update({name: float(row[name]) for name in MEASURES})
    return rows


def summary(rows: Iterable[dict], label: int | str = "mean") -> list[dict]:
    """A row for each (split, round, stage), in the order of the run, over the cases of ``rows``.

    Keys: ``split``, ``round``, ``stage``, ``cases`` (their number) and, for each measure, ``<measure>_mean``,
    ``_median`` and ``_worst`` (the smallest overlap, the largest distance).

    Args:
        label: the class to tell of, or ``mean`` for the mean over the foreground.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["class"] == label:
            groups.setdefault((row["split"], row["round"], row["stage"]), []).append(row)

    def place(key):
        return [names.index(k) if k in names else len(names) for k, names in ((key[0], SPLITS), (key[2], STAGES))]

    table = []
    for key in sorted(groups, key=lambda k: (place(k)[0], k[1], place(k)[1], k)):
        line = dict(zip(("split", "round", "stage"), key)) | {"cases": len(groups[key])}
        for name in MEASURES:
            values = [row[name] for row in groups[key]]
            worst = max(values) if name.endswith("_mm") else min(values)
            line |= {f"{name}_{s}": float(f(values)) for s, f in STATISTICS.items()} | {f"{name}_worst": worst}
        table.append(line)
    return table


def summary_text(rows: Iterable[dict], unit: str = "mm") -> str:
    """The summary of ``rows`` as a table for a terminal; distances are called by ``unit``."""
    head = [
        "split",
        "round",
        "stage",
        "cases",
        "Dice",
        "median",
        "worst",
        "Jaccard",
        f"HD95 {unit}",
        f"ASD {unit}",
    ]
    lines = [head]
    for line in summary(rows):
        first = [str(line[name]) for name in ("split", "round", "stage", "cases")]
        overlaps = [f"{line[f'dice_{s}']:.3f}" for s in ("mean", "median", "worst")] + [f"{line['jaccard_mean']:.3f}"]
        lines.append(first + overlaps + [f"{line['hd95_mm_mean']:.2f}", f"{line['asd_mm_mean']:.2f}"])
    if len(lines) == 1:
        return "no case with truth was scored"
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    left = {0, 2}
    return "\n".join(
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )
