"""Checks of a data set's files, in one pass before any work.

`check_case` checks the files of one case, `find_problems` those of all cases. `datasets.open_cohort` checks lists and
folders and merges all problems into one table. Messages contain names of cases, lists and HDF5 datasets, sizes and
counts, but no patient data from headers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from semisam_o1.data.findings import (
    LABEL_NOT_USED,
    NOTE,
    SET_ASIDE,
    STOPS,
    WARNING,
    Fault,
    Finding,
    Findings,
    Problem,
)
from semisam_o1.data.label_shape import shape_findings
from semisam_o1.data.labels import read_label, sizes, some
from semisam_o1.data.no_data import no_data
from semisam_o1.data.reader import ScanReader, filled
from semisam_o1.data.stored import Stored
from semisam_o1.types import Case

# Labels are one-hot in memory, so memory grows with the number of classes.
MAX_CLASSES = 250
VOXEL_SIZES = (0.001, 100)  # mm
MOST_OVER_NO_DATA = 0.1  # of a template's outline


def check_case(
    case: Case,
    reader: ScanReader | None = None,
    classes: Iterable[int] | None = None,
    named: Mapping[int, str] | None = None,
) -> list[Problem]:
    """All problems of the files of one case, including their voxels.

    A faulty image sets the case aside. A faulty label is not used, but the case stays, because labels other than the
    templates' are used only for metrics. A label with classes outside ``classes`` is faulty as a whole, because its
    scores would belong to another task. In a template, either fault stops the run, and so does a label without
    foreground.

    Args:
        case: ``split`` "template" marks a template.
        reader: how files are read.
        classes: the class numbers that a label may contain; None allows all.
        named: class number -> name, as the data set says.
    """
    return _look_into(case, reader or ScanReader(), classes, named).problems


def find_problems(
    cases: Iterable[Case],
    reader: ScanReader | None = None,
    num_classes: int | None = None,
    binary_label: bool = False,
    named: Mapping[int, str] | None = None,
    label_shape: str = "check",
    find_no_data: bool = True,
) -> Findings:
    """`check_case` for every case, templates first, because they define which classes other labels may contain.

    The allowed classes are those of all templates together, and all below ``num_classes`` if given. With
    ``binary_label`` all classes are merged, so every class is allowed. ``label_shape``: "check" stops at a template
    that looks as if it was outlined in part, "trust" does not look. ``find_no_data``: say in how many scans voxels
    without data were found, see `no_data`.
    """
    cases, reader = list(cases), reader or ScanReader()
    templates = [case for case in cases if case.split == "template"]
    problems: list[Problem] = []
    held: set[int] = set()
    of_template: dict[str, set[int]] = {}
    empty: dict[str, float] = {}  # readable scan -> the share of its voxels without data
    for case in templates:
        seen = _look_into(case, reader, None, named, label_shape == "check", find_no_data)
        problems += seen.problems
        held |= seen.classes
        of_template |= {case.name: seen.classes - {0}} if seen.classes - {0} else {}
        empty |= {} if seen.without_data is None else {case.name: seen.without_data}
    problems += [] if binary_label else _between_templates(of_template)
    held = {min(number, 1) for number in held} if binary_label else held
    problems += _class_problems(held, num_classes)
    allowed = (held | set(range(num_classes or 0))) if len(held) > 1 and not binary_label else None
    for case in cases:
        if case.split != "template":
            seen = _look_into(case, reader, allowed, named, find_no_data=find_no_data)
            problems += seen.problems
            empty |= {} if seen.without_data is None else {case.name: seen.without_data}
    if padded := {name: share for name, share in empty.items() if share}:
        scans = f"{len(padded)} of {len(empty)} scans ({some(list(padded))})"
        found = f"padding or air of one value in {scans}: {np.mean(list(padded.values())):.0%} of their voxels"
        remedy = "nothing: it is left out of intensities and features; find_no_data=false keeps it"
        problems.append(Problem("scans", NOTE, found, "tissue", remedy))
    return Findings(problems, frozenset(held))


def _between_templates(classes: Mapping[str, set[int]]) -> list[Problem]:
    """Problems of templates, name -> class numbers, that do not have the same classes."""
    problems = []
    (first, own), *others = list(classes.items()) or [("", set())]
    for name, found in others:
        if found != own:
            apart = not found & own
            text = f"the label holds class {some(sorted(found))}; that of {first} holds {some(sorted(own))}"
            remedy = "use the same class numbers in all templates, or name one of them with --template"
            problems.append(Problem(name, STOPS if apart else WARNING, text, "the same classes", remedy))
    return problems


def _class_problems(held: set[int], num_classes: int | None) -> list[Problem]:
    highest = max(held, default=0)
    if num_classes is not None and not max(highest + 1, 2) <= num_classes <= MAX_CLASSES:
        expected = f"{max(highest + 1, 2)} to {MAX_CLASSES}, including background"
        found, remedy = f"num_classes is {num_classes}", "change or leave out num_classes"
        return [Problem("template", STOPS, found, expected, remedy)]
    if len(held) > MAX_CLASSES:
        found, expected = f"the label holds {len(held)} classes", f"at most {MAX_CLASSES}, including background"
        return [Problem("template", STOPS, found, expected, "merge classes")]
    missing = sorted(set(range(num_classes or 0)) - held) if highest else []
    if missing:
        remedy = "these get no pseudo-labels; add a template that holds them"
        return [Problem("template", NOTE, f"no voxel of class {some(missing)}", "every class in a template", remedy)]
    return []


class _Seen(NamedTuple):
    """What the files of a case hold: its problems, the class numbers in its label (empty if the label is faulty), the
    share of the voxels without data (None if the image cannot be read)."""

    problems: list[Problem]
    classes: set[int]
    without_data: float | None


def _look_into(
    case: Case,
    reader: ScanReader,
    classes: Iterable[int] | None,
    named: Mapping[int, str] | None,
    whole: bool = False,
    find_no_data: bool = False,
) -> _Seen:
    """``whole``: the label must look like a whole structure. ``find_no_data``: look for voxels without data."""
    template = case.split == "template"
    problems: list[Problem] = []
    scan: Stored | None = None
    held: set[int] = set()
    lacking: np.ndarray | None = None
    without_data: float | None = None

    def note(findings: Iterable[Finding], what: str = "") -> None:
        problems.extend(
            Problem(case.name, found.severity, f"{what}{found.found}", found.expected, found.remedy)
            for found in findings
        )

    try:
        scan = _open(case, reader)
        values, of_image = _check_image(scan)
        note([*scan.findings, *of_image])
        lacking = no_data(values) if find_no_data else None
        without_data = 0.0 if lacking is None else float(lacking.mean())
    except Fault as fault:
        problems.append(Problem(case.name, STOPS if template else SET_ASIDE, *fault.texts))
    try:
        # an HDF5 file that cannot be opened would give the same problem again for its label
        if case.label is not None and (scan is not None or case.label != case.image):
            held, findings = _check_label(case, reader, scan, classes, named, whole, lacking)
            note((found for found in findings if scan is None or found not in scan.findings), "label: ")
        if template and held == {0}:
            remedy = "draw it, or name another --template"
            raise Fault("the label has no foreground", "at least one voxel of class 1", remedy)
        if template and case.label is None:
            raise Fault("a template without a label", "a label", "add its label, or name another --template")
    except Fault as fault:
        problems.append(Problem(case.name, STOPS if template else LABEL_NOT_USED, *fault.texts))
    if not template and held == {0}:
        problems.append(Problem(case.name, NOTE, "the label is empty", "some foreground", "check whether it should be"))
    return _Seen(problems, held, without_data)


def _about(what: str, fault: Fault) -> Fault:
    """The fault with the kind of file, image or label, in its first words."""
    found, expected, remedy = fault.texts
    verb = " is" if found.startswith(("a ", "an ", "truncated")) else ":"
    return Fault(found if what in found else f"the {what}{verb} {found}", expected, remedy)


def _open(case: Case, reader: ScanReader) -> Stored:
    """The header of a case's image; raises `Fault` for problems visible there."""
    try:
        stored = reader.open(case.image)
    except OSError as error:
        raise Fault("the image cannot be opened", "a file that can be read", "check the file and its folder") from error
    except Fault as fault:
        raise _about("image", fault) from fault
    shape = stored.grid.shape
    if len(shape) != 3:
        several = len(shape) > 3
        remedy = "store one channel or time point per file" if several else "store whole volumes, not slices"
        raise Fault(f"a {len(shape)}D image, {sizes(shape)}", "a 3D volume", remedy)
    if min(shape) == 0:
        raise Fault(f"no voxels in the image, {sizes(shape)}", "no axis of size zero", "export it again")
    if min(shape) == 1:
        raise Fault(f"a single slice, {sizes(shape)}", "a 3D volume", "store whole volumes, not slices")
    affine = stored.grid.affine
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise Fault("the image's affine has no inverse", "three axes with lengths in mm", "export it again")
    low, high = VOXEL_SIZES
    if not (low <= stored.grid.spacing.min() and stored.grid.spacing.max() <= high):
        found = "voxels of " + " x ".join(f"{side:.4g}" for side in stored.grid.spacing) + " mm"
        raise Fault(found, f"{low:g} to {high:g} mm", "correct sizes and units in the header")
    return stored


def _check_image(scan: Stored) -> tuple[np.ndarray, list[Finding]]:
    """The voxels of an image, and what was noticed."""
    try:
        values, count = filled(scan.voxels())
    except Fault as fault:
        raise _about("image", fault) from fault
    if count == values.size:
        raise Fault("no finite voxel", "finite voxels", "export it again")
    low, high = float(values.min()), float(values.max())
    middle = np.median(values.ravel()[::101])
    # the percentiles that `image_chain` clips to must differ; they are slow, so compute them only in doubt
    few_differ = np.count_nonzero(values != middle) < 0.02 * values.size
    if low == high or (few_differ and np.ptp(np.percentile(values, [1, 99.5])) == 0):
        found = "a constant image" if low == high else "an image that is constant but for a few voxels"
        raise Fault(found, "varying intensities", "export it again")
    if not count:
        return values, []
    return values, [
        Finding(NOTE, f"{count:,} NaN or infinite voxels", "finite voxels", "nothing: they get the lowest value")
    ]


def _check_label(
    case: Case,
    reader: ScanReader,
    scan: Stored | None,
    classes: Iterable[int] | None,
    named: Mapping[int, str] | None,
    whole: bool,
    lacking: np.ndarray | None,
) -> tuple[set[int], tuple[Finding, ...]]:
    """The class numbers in a label on the image's grid, always including 0, and what was noticed.

    ``lacking``: the voxels of the image without data, if there are any.
    """
    try:
        label = read_label(case.label, reader, scan, named)
    except OSError as error:
        raise Fault("the label cannot be opened", "a file that can be read", "check the file and its folder") from error
    except Fault as fault:
        raise _about("label", fault) from fault
    held = {int(n) for n in np.flatnonzero(np.bincount(label.values.ravel()))}
    if classes is not None and (unknown := sorted(held - set(classes))):
        remedy = "use a template that holds it, or set num_classes"
        raise Fault(f"the label holds class {some(unknown)}", "classes of the template", remedy)
    if not whole or scan is None:
        return held | {0}, label.findings
    shape = shape_findings(label.values, scan.grid.spacing, named or {})
    return held | {0}, (*label.findings, *shape, *_over_no_data(label.values, lacking))


def _over_no_data(label: np.ndarray, lacking: np.ndarray | None) -> list[Finding]:
    outlined = label > 0
    share = 0.0 if lacking is None else float((outlined & lacking).sum() / max(1, outlined.sum()))
    if share <= MOST_OVER_NO_DATA:
        return []
    found = f"{share:.0%} of the outline lies on padding or air of one value"
    return [Finding(WARNING, found, "an outline on tissue", "check the outline; find_no_data=false uses all voxels")]
