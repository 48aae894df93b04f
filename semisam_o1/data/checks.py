"""Checks of a data set's files, in one pass before any work.

`check_case` checks the files of one case, `find_problems` those of all cases. `datasets.open_cohort` checks lists and
folders and merges all problems into one table. Messages contain names of cases, lists and HDF5 datasets, sizes and
counts, but no patient data from headers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import numpy as np

from semisam_o1.data.findings import LABEL_NOT_USED, NOTE, SET_ASIDE, STOPS, Findings, Problem
from semisam_o1.data.formats import read_grid, read_volume
from semisam_o1.data.grids import Grid
from semisam_o1.types import Case

# Largest distance between the corners of image and label, in voxels. Rounding in headers (float32 offsets,
# quaternions) stays below 0.001 voxel. A shift of 0.05 voxel does not change any overlap measurably; half a voxel does.
AFFINE_TOLERANCE = 0.05
# Labels are one-hot in memory, so memory grows with the highest class number. A common mistake is 255 for foreground.
MAX_CLASSES = 250


class _Fault(Exception):
    """Arguments (found, expected, remedy) of a `Problem` whose case and severity are not set yet."""


def check_case(
    case: Case, hdf5_key: str = "image", hdf5_spacing=None, classes: Iterable[int] | None = None
) -> list[Problem]:
    """All problems of the files of one case, including their voxels.

    A faulty image sets the case aside. A faulty label is not used, but the case stays, because labels other than the
    templates' are used only for metrics. A label with classes outside ``classes`` is faulty as a whole, because its
    scores would belong to another task. In a template, either fault stops the run, and so does a label without
    foreground.

    Args:
        case: ``split`` "template" marks a template.
        hdf5_key, hdf5_spacing: as in `formats.read_volume`.
        classes: the class numbers that a label may contain; None allows all.
    """
    return _look_into(case, hdf5_key, hdf5_spacing, classes)[0]


def find_problems(
    cases: Iterable[Case],
    hdf5_key: str = "image",
    hdf5_spacing=None,
    num_classes: int | None = None,
    binary_label: bool = False,
) -> Findings:
    """`check_case` for every case, templates first, because they define which classes other labels may contain.

    The allowed classes are those of all templates together, and all below ``num_classes`` if given. With
    ``binary_label`` all classes are merged, so every class is allowed.
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
        expected = f"{max(highest + 1, 2)} to {MAX_CLASSES}, including background"
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
    """The problems of one case and the class numbers in its label (empty if the label is faulty)."""
    template = case.split == "template"
    problems: list[Problem] = []
    grid, held = None, set()
    try:
        grid = _open(case.image, hdf5_key, hdf5_spacing, "image")
        _check_image(_voxels(case.image, hdf5_key, hdf5_spacing))
    except _Fault as fault:
        problems.append(Problem(case.name, STOPS if template else SET_ASIDE, *fault.args))
    try:
        # an HDF5 file that cannot be opened would give the same problem again for its label
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
        problems.append(Problem(case.name, NOTE, "the label is empty", "some foreground", "check whether it should be"))
    return problems, held


def _open(path: Path, dataset: str, spacing, what: str) -> Grid:
    """The stored grid of an image or label; raises `_Fault` for problems visible in the header."""
    try:
        if path.stat().st_size == 0:
            raise _Fault(f"the {what}'s file is empty", "a whole file", "copy or export it again")
        grid = read_grid(path, dataset, spacing)
    except _Fault:
        raise
    except KeyError as error:
        remedy = "set image_key to one of these" if what == "image" else "store the label under 'label'"
        raise _Fault(str(error.args[0]), f"a dataset '{dataset}'", remedy) from error
    except Exception as error:  # readers raise many kinds of errors on a damaged file
        raise _unreadable(what, error) from error
    axes = len(grid.shape)
    if axes != 3:
        remedy = "store one channel or time point per file" if axes > 3 else "store whole volumes, not slices"
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
        raise _Fault(found, "a 3D volume", "store one channel or time point per file")
    return volume[0]


def _unreadable(what: str, error: Exception) -> _Fault:
    # only the name of the error: its text may quote headers and full paths
    return _Fault(
        f"the {what} is truncated or damaged ({type(error).__name__})",
        "a file that can be read",
        "copy or export it again",
    )


def _check_image(values: np.ndarray) -> None:
    low, high = float(values.min()), float(values.max())  # NaN and infinity propagate to both
    if not np.isfinite([low, high]).all():
        count = int(values.size - np.isfinite(values).sum())
        raise _Fault(f"{count} NaN or infinite voxels", "finite voxels", "replace them, e.g. by the background")
    middle = np.median(values.ravel()[::101])
    # the percentiles that `image_chain` clips to must differ; they are slow, so compute them only in doubt
    few_differ = np.count_nonzero(values != middle) < 0.02 * values.size
    if low == high or (few_differ and np.ptp(np.percentile(values, [1, 99.5])) == 0):
        found = "a constant image" if low == high else "an image that is constant but for a few voxels"
        raise _Fault(found, "varying intensities", "export it again")


def _check_label(path: Path, spacing, grid: Grid | None, classes: Iterable[int] | None) -> set[int]:
    """The class numbers in a label on the image's ``grid``, always including 0."""
    own = _open(path, "label", spacing, "label")
    if grid is not None and own.shape != grid.shape:
        raise _Fault(
            f"label {_sizes(own.shape)}",
            f"the image's {_sizes(grid.shape)}",
            "draw or resample it on the image",
        )
    if grid is not None and (distance := _distance(own, grid)) > AFFINE_TOLERANCE:
        found = f"the label's affine differs, by {distance:.3g} voxels"
        raise _Fault(found, f"at most {AFFINE_TOLERANCE:g}", "draw or resample it on the image")
    values = _voxels(path, "label", spacing, "label")
    # exactly whole, because one-hot coding truncates 0.9999 to 0
    if not (np.isfinite(values) & (values == np.rint(values))).all():
        remedy = "store class numbers, unscaled and not interpolated"
        raise _Fault("the label has values that are not whole numbers", "0, 1, 2 ...", remedy)
    if values.min() < 0:
        raise _Fault(f"the label holds {values.min():.0f}", "0 or more", "renumber the classes from 1")
    # counting is ten times as fast as sorting, but takes much memory if the values are not class numbers
    few = values.max() < 1e6
    held = {int(n) for n in (np.flatnonzero(np.bincount(values.astype(int).ravel())) if few else np.unique(values))}
    if classes is not None and (unknown := sorted(held - set(classes))):
        remedy = "use a template that holds it, or set num_classes"
        raise _Fault(f"the label holds class {_some(unknown)}", "classes of the template", remedy)
    return held | {0}


def _distance(one: Grid, other: Grid) -> float:
    """The largest distance between corresponding corners of two grids of equal shape, in voxels of ``other``."""
    corners = np.array([[*corner, 1.0] for corner in product(*((0, n - 1) for n in other.shape))])
    between = np.linalg.solve(other.affine, one.affine) - np.eye(4)
    return float(np.linalg.norm((corners @ between.T)[:, :3], axis=1).max())


def _sizes(shape: Iterable[int]) -> str:
    return " x ".join(str(n) for n in shape)


def _some(numbers: list[int]) -> str:
    return ", ".join(str(n) for n in numbers[:5]) + (" ..." if len(numbers) > 5 else "")
