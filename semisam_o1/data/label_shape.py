"""Whether a template's label looks like a whole structure: nothing else shows that it was outlined in part.

A structure's section grows from one end and shrinks to the other. A label with single sections far from each other, or
with large sections at both ends, was outlined on some slices alone, unless the image ends there as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import label as components

from semisam_o1.data.findings import NOTE, STOPS, WARNING, Finding
from semisam_o1.data.labels import some

THIN = 3  # a run of slices is too thin for its section if that is this many times as wide as the run is thick
FLAT = 0.6  # one end is cut flat if its section has this share of the largest
BOTH_FLAT = 0.4  # the same for both ends; of 240 whole labels of five anatomies none has more than 0.26
ROUND = 1.35  # or this many times the share of a lying cylinder of as many slices, which is large if they are few
LONG = 2  # a tube, this many times as long as wide, may end anywhere
FEW = 6  # slices; with fewer one flat end says nothing
STRAY = 0.1  # smaller pieces, as a share of the largest, are likely mistakes
AXES = ("first", "second", "third")
TRUST = "if it is whole all the same: --set label_shape=trust"


class Sections(NamedTuple):
    """The slices of a mask along an axis that hold some of it.

    Attributes:
        places: their numbers. areas: of the sections, mm2. wide: the smaller extent of all sections together, mm.
        thickness: of a slice, mm.
    """

    axis: int
    places: np.ndarray
    areas: np.ndarray
    wide: float
    thickness: float

    @property
    def runs(self) -> list[np.ndarray]:
        """The places in runs of neighbouring slices."""
        return np.split(self.places, np.flatnonzero(np.diff(self.places) > 1) + 1)


def shape_findings(label: np.ndarray, spacing: Sequence[float] | np.ndarray, names: Mapping[int, str]) -> list[Finding]:
    """What is odd about a template's label (H, W, D) of class numbers, voxels of ``spacing`` mm.

    ``names``: class number -> name, for messages.
    """
    findings: list[Finding] = []
    sparse: dict[tuple[str, str], list[str]] = {}
    numbers = [int(n) for n in np.flatnonzero(np.bincount(label.ravel())) if n]
    for number in numbers:
        mask = label == number
        name = names.get(number, f"class {number}")
        if found := _sparse(mask, spacing):
            remedy = f"outline every slice, or interpolate between them; {TRUST}"
            sparse.setdefault((found, remedy), []).append(name)
        elif pieces := _pieces(mask):
            findings.append(pieces._replace(found=f"{name} is in {pieces.found}"))
    for (found, remedy), alike in sparse.items():
        text = f"{some(alike)} {'is' if len(alike) == 1 else 'are'} outlined only on {found}"
        findings.append(Finding(STOPS, text, "a label of the whole structure", remedy))
    if numbers and all(finding.severity != STOPS for finding in findings):
        findings += _cut(_largest(label > 0), spacing)
    return findings


def sections(mask: np.ndarray, spacing: Sequence[float] | np.ndarray) -> list[Sections]:
    """The sections of a mask along each axis."""
    found = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        counts = mask.sum(axis=others)
        places = np.flatnonzero(counts)
        area = float(spacing[others[0]] * spacing[others[1]])
        extents = [
            float(np.ptp(np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != other)))) + 1) * spacing[other]
            for other in others
        ]
        found.append(Sections(axis, places, counts[places] * area, min(extents), float(spacing[axis])))
    return found


def _sparse(mask: np.ndarray, spacing: Sequence[float] | np.ndarray) -> str:
    """Which slices alone a mask was outlined on; "" if it does not look so."""
    for found in sections(mask, spacing):
        runs = found.runs
        thick = max(len(run) for run in runs) * found.thickness
        wide = min(found.wide, 2 * float(np.sqrt(np.median(found.areas) / np.pi)))
        if len(runs) > 1 and wide > THIN * thick:
            steps = np.unique(np.diff([run[0] for run in runs]))
            often = (
                f"every {_nth(int(steps[0]))}" if len(steps) == 1 and len(runs) > 2 else f"{len(found.places)} single"
            )
            slices = "slice" if often.startswith("every") else "slices"
            return f"{often} {slices} along the {AXES[found.axis]} axis"
    return ""


def _nth(number: int) -> str:
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number if number < 20 else number % 10, 'th') }"


def _cut(mask: np.ndarray, spacing: Sequence[float] | np.ndarray) -> list[Finding]:
    """Findings of ends that are cut flat inside the image; both ends of an axis stop a run."""
    findings = []
    for found in sections(mask, spacing):
        count, sides = len(found.places), mask.shape[found.axis]
        if count != found.places[-1] - found.places[0] + 1:
            continue
        inside = (found.places[0] > 0, found.places[-1] < sides - 1)
        ends = [float(found.areas[end] / found.areas.max()) for end, free in zip((0, -1), inside) if free]
        axis = f"the {AXES[found.axis]} axis"
        thick = count * found.thickness
        if thick > LONG * found.wide:
            continue
        cylinder = 0.0 if found.wide > THIN * thick else ROUND * (2 / count - 1 / count**2) ** 0.5
        if len(ends) == 2 and min(ends) >= max(BOTH_FLAT, cylinder):
            text = f"the label is a block of {count} slices along {axis}, cut flat at both ends"
            remedy = f"outline the whole structure; {TRUST}"
            findings.append(Finding(STOPS, text, "a label of the whole structure", remedy))
        elif count >= FEW and max(ends, default=0) >= max(FLAT, cylinder):
            text = f"the label is cut flat along {axis}: its last section has {100 * max(ends):.0f}% of the largest"
            remedy = "check whether the structure goes on there"
            findings.append(Finding(WARNING, text, "a label of the whole structure", remedy))
    return findings


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest piece of a mask."""
    found, count = components(mask, np.ones((3, 3, 3)))
    return found == np.bincount(found.ravel())[1:].argmax() + 1 if count else mask


def _pieces(mask: np.ndarray) -> Finding | None:
    """The pieces of a mask, if there are several: a warning if some are small, for they are likely mistakes."""
    found, count = components(mask, np.ones((3, 3, 3)))
    if count < 2:
        return None
    sizes = sorted(np.bincount(found.ravel())[1:].tolist(), reverse=True)
    shown = ", ".join(f"{size:,}" for size in sizes[:4]) + (" ..." if count > 4 else "")
    severity = WARNING if sizes[-1] < STRAY * sizes[0] else NOTE
    return Finding(
        severity, f"{count} pieces, of {shown} voxels", "one piece, or as many as it has", "check the small ones"
    )
