"""What is wrong with a data set, found in one pass before any work, and what a run on it will take.

`check_case` looks into the files of one case and `find_problems` into those of all; lists and folders are
`datasets.open_cohort`'s, which joins both into one table. Only names of cases, lists and HDF5 datasets, sizes
and counts are printed: nothing of what headers say about a patient.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from semisam_o1.transforms import Grid, choose_spacing, read_grid, read_volume
from semisam_o1.types import Case

if TYPE_CHECKING:
    from semisam_o1.datasets import Cohort

STOPS, SET_ASIDE, LABEL_NOT_USED, NOTE = "stops the run", "set aside", "label not used", "note"
SEVERITIES = (STOPS, SET_ASIDE, LABEL_NOT_USED, NOTE)

# How far the corners of image and label may lie apart, in voxels. Headers round (float32 offsets,
# quaternions): that stays below 0.001 voxel. A twentieth of a voxel changes no overlap that could be
# measured; half a voxel does.
AFFINE_TOLERANCE = 0.05
# Labels are held one-hot, so memory grows with the highest number; 255 for "foreground" is the usual slip.
MAX_CLASSES = 250

# Rough costs on two CPU cores; those a case are for REFERENCE_VOXELS working voxels and grow in proportion.
REFERENCE_VOXELS = 400_000
SECONDS_PER_CASE_FEATURES = 1.0
SECONDS_PER_CASE_PROPAGATION = 7  # and
SECONDS_WHATEVER_THE_SIZE = 5  # of both passes and the quality estimate
SECONDS_PER_MEGAVOXEL = 0.7  # of training: a step of mean teacher on a million voxels, the batch counted
SECONDS_PER_CASE_PREDICTION = 1.5
TOKEN_BYTES_PER_VOXEL = 84
LABEL_BYTES_PER_VOXEL = 0.05  # a compressed label map, a stored voxel
ENTROPY_BYTES_PER_VOXEL = 1.0  # a compressed float map that is zero far from every border
MODEL_BYTES = 40e6


@dataclass(frozen=True)
class Problem:
    """One thing found in ``case`` (or in a list), its ``severity`` (one of `SEVERITIES`) and what to do."""

    case: str
    severity: str
    found: str
    expected: str
    remedy: str


class Findings(NamedTuple):
    """All problems of a set of cases, and the class numbers that the labels of its templates hold (0 too)."""

    problems: list[Problem]
    classes: frozenset[int]


class _Fault(Exception):
    """Found, expected, remedy: a problem whose case and severity are still to be said."""


def check_case(
    case: Case, hdf5_key: str = "image", hdf5_spacing=None, classes: Iterable[int] | None = None
) -> list[Problem]:
    """Everything wrong with the files of one case, voxels included.

    An image at fault sets the case aside. A label at fault is not used, and the case stays: the labels of all
    but templates only serve to measure. That holds for a label with classes outside ``classes`` as a whole,
    since its scores would belong to another task. Either stops the run in a template, as does a label without
    foreground.

    Args:
        case: ``split`` "template" marks a template.
        hdf5_key, hdf5_spacing: as in `transforms.read_volume`.
        classes: the class numbers that a label may hold; None asks nothing.
    """
    return _look_into(case, hdf5_key, hdf5_spacing, classes)[0]


def find_problems(
    cases: Iterable[Case],
    hdf5_key: str = "image",
    hdf5_spacing=None,
    num_classes: int | None = None,
    binary_label: bool = False,
) -> Findings:
    """`check_case` for every case, templates first, since they say which classes the others may hold.

    Classes are those of all templates together, or any below ``num_classes`` where that is said; where all are
    merged (``binary_label``) it does not matter which a label holds.
    """
    cases = list(cases)
    templates = [case for case in cases if case.split == "template"]
    problems: list[Problem] = []
    held: set[int] = set()
    for case in templates:
        found, classes = _look_into(case, hdf5_key, hdf5_spacing, None)
        problems += found
        held |= classes
    held = {min(number, 1) for number in held} if binary_label else held
    problems += _class_problems(held, num_classes)
    allowed = (held | set(range(num_classes or 0))) if len(held) > 1 and not binary_label else None
    for case in cases:
        if case.split != "template":
            problems += _look_into(case, hdf5_key, hdf5_spacing, allowed)[0]
    return Findings(problems, frozenset(held))


def _class_problems(held: set[int], num_classes: int | None) -> list[Problem]:
    highest = max(held, default=0)
    if num_classes is not None and not max(highest + 1, 2) <= num_classes <= MAX_CLASSES:
        expected = f"{max(highest + 1, 2)} to {MAX_CLASSES}, background counted"
        return [
            Problem(
                "template",
                STOPS,
                f"num_classes is {num_classes}",
                expected,
                "change or leave out num_classes",
            )
        ]
    if highest >= MAX_CLASSES:
        expected = f"classes 1, 2, 3 ... below {MAX_CLASSES}"
        return [Problem("template", STOPS, f"the label holds class {highest}", expected, "renumber the classes from 1")]
    missing = sorted(set(range(num_classes or highest + 1)) - held) if highest else []
    if missing:
        expected = "classes numbered without gaps"
        remedy = "these get no pseudo-labels; add a template that holds them"
        return [Problem("template", NOTE, f"no voxel of class {_some(missing)}", expected, remedy)]
    return []


def _look_into(case: Case, hdf5_key: str, hdf5_spacing, classes) -> tuple[list[Problem], set[int]]:
    """The problems of one case and the class numbers that its label holds (none where it is at fault)."""
    template = case.split == "template"
    problems: list[Problem] = []
    grid, held = None, set()
    try:
        grid = _open(case.image, hdf5_key, hdf5_spacing, "image")
        _check_image(_voxels(case.image, hdf5_key, hdf5_spacing))
    except _Fault as fault:
        problems.append(Problem(case.name, STOPS if template else SET_ASIDE, *fault.args))
    try:
        # the label of an HDF5 file that cannot even be opened would only say the same again
        if case.label is not None and (grid is not None or case.label != case.image):
            held = _check_label(case.label, hdf5_spacing, grid, classes)
        if template and held == {0}:
            remedy = "draw it, or name another --template"
            raise _Fault("the label has no foreground", "at least one voxel of class 1", remedy)
        if template and case.label is None:
            raise _Fault("a template without a label", "a label", "add its label, or name another --template")
    except _Fault as fault:
        problems.append(Problem(case.name, STOPS if template else LABEL_NOT_USED, *fault.args))
    if not template and held == {0}:
        problems.append(Problem(case.name, NOTE, "the label is empty", "some foreground", "check that this is meant"))
    return problems, held


def _open(path: Path, dataset: str, spacing, what: str) -> Grid:
    """The stored grid of an image or label; what the header alone shows to be wrong is a `_Fault`."""
    try:
        if path.stat().st_size == 0:
            raise _Fault(f"the {what}'s file is empty", "a whole file", "copy or export it again")
        grid = read_grid(path, dataset, spacing)
    except _Fault:
        raise
    except KeyError as error:
        remedy = "set image_key to one of these" if what == "image" else "store the label under 'label'"
        raise _Fault(str(error.args[0]), f"a dataset '{dataset}'", remedy) from error
    except Exception as error:  # readers raise whatever they like on a damaged file
        raise _unreadable(what, error) from error
    axes = len(grid.shape)
    if axes != 3:
        remedy = "store one channel or time point a file" if axes > 3 else "store whole volumes, not slices"
        raise _Fault(f"a {axes}D {what}, {_sizes(grid.shape)}", "a 3D volume", remedy)
    if min(grid.shape) == 0:
        raise _Fault(f"no voxels in the {what}, {_sizes(grid.shape)}", "no axis of size zero", "export it again")
    if min(grid.shape) == 1 and what == "image":
        raise _Fault(f"a single slice, {_sizes(grid.shape)}", "a 3D volume", "store whole volumes, not slices")
    if not np.isfinite(grid.affine).all() or abs(np.linalg.det(grid.affine[:3, :3])) < 1e-12:
        raise _Fault(f"the {what}'s affine has no inverse", "three axes with lengths in mm", "export it again")
    return grid


def _voxels(path: Path, dataset: str, spacing, what: str = "image") -> np.ndarray:
    """All voxels, (H, W, D) float32."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", np.exceptions.ComplexWarning)
            volume = read_volume(path, dataset, spacing).numpy()
    except np.exceptions.ComplexWarning as error:
        raise _Fault(f"complex numbers in the {what}", "real numbers", "store the magnitude") from error
    except Exception as error:
        raise _unreadable(what, error) from error
    if volume.ndim != 4 or volume.shape[0] != 1:
        found = f"4D: {len(volume)} channels or time points in the {what}"
        raise _Fault(found, "a 3D volume", "store one channel or time point a file")
    return volume[0]


def _unreadable(what: str, error: Exception) -> _Fault:
    # the name of the error alone: its text can quote headers and full paths
    return _Fault(
        f"the {what} is truncated or damaged ({type(error).__name__})",
        "a file that can be read",
        "copy or export it again",
    )


def _check_image(values: np.ndarray) -> None:
    low, high = float(values.min()), float(values.max())  # both carry NaN and infinity on
    if not np.isfinite([low, high]).all():
        count = int(values.size - np.isfinite(values).sum())
        raise _Fault(f"{count} NaN or infinite voxels", "finite voxels", "replace them, e.g. by the background")
    middle = np.median(values.ravel()[::101])
    # what `image_chain` clips to must not be one value; percentiles are slow, so only where it might be
    few_differ = np.count_nonzero(values != middle) < 0.02 * values.size
    if low == high or (few_differ and np.ptp(np.percentile(values, [1, 99.5])) == 0):
        found = "a constant image" if low == high else "an image that is constant but for a few voxels"
        raise _Fault(found, "intensities that vary", "export it again")


def _check_label(path: Path, spacing, grid: Grid | None, classes: Iterable[int] | None) -> set[int]:
    """The class numbers that a label on the image's ``grid`` holds, always with 0."""
    own = _open(path, "label", spacing, "label")
    if grid is not None and own.shape != grid.shape:
        raise _Fault(
            f"label {_sizes(own.shape)}",
            f"the image's {_sizes(grid.shape)}",
            "draw or resample it on the image",
        )
    if grid is not None and (apart := _distance(own, grid)) > AFFINE_TOLERANCE:
        found = f"the label's affine differs, by {apart:.3g} voxels"
        raise _Fault(found, f"at most {AFFINE_TOLERANCE:g}", "draw or resample it on the image")
    values = _voxels(path, "label", spacing, "label")
    # exactly whole: one-hot coding cuts 0.9999 to 0
    if not (np.isfinite(values) & (values == np.rint(values))).all():
        remedy = "store class numbers, unscaled and not interpolated"
        raise _Fault("the label is not of whole numbers", "0, 1, 2 ...", remedy)
    if values.min() < 0:
        raise _Fault(f"the label holds {values.min():.0f}", "0 or more", "renumber the classes from 1")
    # counting is ten times as fast as sorting, but for labels that are no class numbers it would take memory
    few = values.max() < 1e6
    held = {int(n) for n in (np.flatnonzero(np.bincount(values.astype(int).ravel())) if few else np.unique(values))}
    if classes is not None and (unknown := sorted(held - set(classes))):
        remedy = "use a template that holds it, or say num_classes"
        raise _Fault(f"the label holds class {_some(unknown)}", "classes the template holds", remedy)
    return held | {0}


def _distance(one: Grid, other: Grid) -> float:
    """How far apart, in voxels of ``other``, two grids of one shape place the same corner at most."""
    corners = np.array([[*corner, 1.0] for corner in product(*((0, n - 1) for n in other.shape))])
    between = np.linalg.solve(other.affine, one.affine) - np.eye(4)
    return float(np.linalg.norm((corners @ between.T)[:, :3], axis=1).max())


def _sizes(shape: Iterable[int]) -> str:
    return " x ".join(str(n) for n in shape)


def _some(numbers: list[int]) -> str:
    return ", ".join(str(n) for n in numbers[:5]) + (" ..." if len(numbers) > 5 else "")


def table(problems: Iterable[Problem], width: int = 100) -> str:
    """All problems as one plain text table at most ``width`` columns wide, the gravest first."""
    rows = sorted(problems, key=lambda problem: SEVERITIES.index(problem.severity))
    if not rows:
        return "No problems found."
    first = min(max(len("case"), *(len(row.case) for row in rows)), 28)
    second = max(len(row.severity) for row in rows)
    rest = width - first - second - 2 * 4
    widths = [first, second, rest * 38 // 100, rest * 26 // 100, rest - rest * 38 // 100 - rest * 26 // 100]
    lines = [("case", "effect", "found", "expected", "what to do"), tuple("-" * n for n in widths)]
    for row in rows:
        texts = (row.case, row.severity, row.found, row.expected, row.remedy)
        cells = [textwrap.wrap(text, n) or [""] for text, n in zip(texts, widths)]
        height = max(len(cell) for cell in cells)
        lines += zip(*(cell + [""] * (height - len(cell)) for cell in cells))
    return "\n".join("  ".join(text.ljust(n) for text, n in zip(line, widths)).rstrip() for line in lines)


def estimate(cohort: Cohort, settings: Mapping) -> dict:
    """Roughly what a run takes, from the scans' sizes: seconds a stage on two CPU cores, bytes on disk.

    Args:
        settings: ``max_iterations`` (a round) and ``num_rounds``, none where unsaid; ``longer_start``, how many times
            as long the first round is; ``batch_voxels``, those a step of training sees; ``feature_voxels``, the
            working voxels of the median scan.

    Returns:
        ``features``, ``propagation``, ``training``, ``prediction`` and their sum ``seconds``;
        ``feature_bytes``, ``label_bytes``, ``model_bytes`` and their sum ``bytes``.
    """
    rounds = int(settings.get("num_rounds", 0))
    iterations = int(settings.get("max_iterations", 0)) * (rounds - 1 + settings.get("longer_start", 1)) * bool(rounds)
    grids = {case.name: cohort.grid(case) for case in cohort.cases}
    spacing = choose_spacing(list(grids.values()), int(settings.get("feature_voxels", REFERENCE_VOXELS)))
    working = {name: np.prod(np.array(grid.shape) * grid.spacing) / spacing**3 for name, grid in grids.items()}
    pool = [case.name for case in cohort.pool]
    pool_size = sum(working[name] for name in pool) / REFERENCE_VOXELS
    held_out = sum(working[case.name] for case in cohort.val + cohort.test) / REFERENCE_VOXELS
    seconds = {
        "features": SECONDS_PER_CASE_FEATURES * sum(working.values()) / REFERENCE_VOXELS,
        "propagation": SECONDS_PER_CASE_PROPAGATION * pool_size + SECONDS_WHATEVER_THE_SIZE * len(pool),
        "training": SECONDS_PER_MEGAVOXEL * settings.get("batch_voxels", 1e6) / 1e6 * iterations,
        "prediction": SECONDS_PER_CASE_PREDICTION * (pool_size * rounds + held_out * bool(rounds)),
    }
    stored = sum(float(np.prod(grids[name].shape)) for name in pool)
    a_round = 2 * LABEL_BYTES_PER_VOXEL + ENTROPY_BYTES_PER_VOXEL  # predicted, refined, entropy
    sizes = {
        "feature_bytes": TOKEN_BYTES_PER_VOXEL * sum(working.values()),
        "label_bytes": stored * (2 * LABEL_BYTES_PER_VOXEL + rounds * a_round),  # round 0 and the final ones beside
        "model_bytes": MODEL_BYTES * (rounds + 1) * bool(rounds),
    }
    whole = {"seconds": sum(seconds.values()), "bytes": sum(sizes.values())}
    return {key: round(float(value), 1) for key, value in (seconds | sizes | whole).items()}


def estimate_text(estimate: Mapping) -> str:
    """An `estimate` in a sentence or two."""
    stages = ", ".join(f"{stage} {_duration(estimate[stage])}" for stage in list(estimate)[:4] if estimate[stage])
    whole = f"about {_duration(estimate['seconds'])} on two CPU cores"
    return f"A run will take {whole} ({stages}) and {_size(estimate['bytes'])} on disk."


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    return f"{max(1, round(count / 1e6))} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def validate_text(cohort: Cohort, settings: Mapping | None = None) -> str:
    """What ``validate`` prints of a cohort: problems, lists, classes, voxels, then time and disk."""
    grids = [cohort.grid(case) for case in cohort.cases]
    spacings = np.array([grid.spacing for grid in grids])
    shapes = np.array([grid.shape for grid in grids])
    unsaid = " (not said by the files: 1 mm taken)" if cohort.unsaid_spacing else ""
    counts = [f"{len(cohort.split(split))} {split}" for split in ("pool", "val", "test")]
    counts.append(f"{len(cohort.set_aside)} set aside")
    labelled = sum(case.label is not None for case in cohort.cases) - len(cohort.templates)
    lines = [
        table(cohort.problems),
        "",
        f"template    {', '.join(case.name for case in cohort.templates)}",
        f"cases       {', '.join(counts)}; {labelled} of them with a label to measure by",
        f"classes     {', '.join(f'{number} {name}' for number, name in cohort.classes.items())}",
        f"voxels      {_ranges(shapes)} a scan, of {_ranges(spacings)} mm{unsaid}",
        "",
        estimate_text(estimate(cohort, settings or {})),
    ]
    return "\n".join(text if "\n" in text else textwrap.fill(text, 100, subsequent_indent=" " * 12) for text in lines)


def _ranges(rows: np.ndarray) -> str:
    ends = [(f"{low:.4g}", f"{high:.4g}") for low, high in zip(rows.min(0), rows.max(0))]
    return " x ".join(low if low == high else f"{low}–{high}" for low, high in ends)
