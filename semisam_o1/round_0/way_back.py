"""The reverse alignment of a scan, from template to scan, and how consistent a label is with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from semisam_o1.features import Features
from semisam_o1.files import WorkFiles
from semisam_o1.round_0.places import turn_between
from semisam_o1.round_0.quality import WayBack, back_propagate, hard, reverse_consistency
from semisam_o1.round_0.templates import Template
from semisam_o1.types import Probabilities


class TemplatesWayBack(NamedTuple):
    """The reverse alignment from a ``template`` to a scan."""

    template: Template
    way: WayBack


def way_back(templates: Sequence[Template], found: Features, frame: str) -> TemplatesWayBack:
    """The reverse alignment to a scan, with features in ``frame``, from the template with the smallest distance."""
    ways = []
    for template in templates:
        turn = turn_between(template.features.scan.affine, found.scan.affine) if frame == "world" else None
        way = back_propagate(template.reference.tokens, found.tokens, found.step_mm, turn=turn)
        ways.append(TemplatesWayBack(template, way))
    return min(ways, key=lambda found: found.way.residual)


def save_way_back(folder: WorkFiles, name: str, back: TemplatesWayBack, checked: bool = False) -> None:
    """Store a reverse alignment for the quality estimate; ``checked``: it was compared with that of `back_from`."""
    small = {"residual": back.way.residual, "template": back.template.name} | ({"checked": 1} if checked else {})
    folder.save(name, {"points": back.way.points}, small)


def consistency(back: TemplatesWayBack, probabilities: Probabilities, step_mm: float) -> float:
    """The reverse consistency of the label with the largest of ``probabilities``."""
    return reverse_consistency(hard(probabilities), back.template.reference, back.way, step_mm)
