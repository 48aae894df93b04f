"""The records that the steps of round 0 write for each other: one per case in ``round_0/work``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from semisam_o1.files import WorkFiles
from semisam_o1.round_0.alignment import AffineMap
from semisam_o1.types import Probabilities, Tokens

PROBABILITIES = "probabilities"


class Alignment(NamedTuple):
    """A scan's alignment to one template: the affine map, and the pooled descriptors in that template's basis."""

    to_template: AffineMap
    pooled: Tokens


class FirstPass(NamedTuple):
    """The result of the first pass for a scan; fields that were not loaded or do not exist are None.

    Attributes:
        probabilities: (num_classes, H', W', D') on the scan's tokens.
        frame: the frame of the scan's features, see `FeatureStore.frame`.
        template: the name of the best template, with the smallest descriptor distance; "" if nothing was aligned.
        residual: that distance; NaN if nothing was aligned.
        uncertainty: mean uncertainty of the label over the scan.
        points: the position of each token in that template, (H', W', D', 3) centred mm.
        alignments: template name -> `Alignment`.
    """

    probabilities: Probabilities | None = None
    frame: str | None = None
    template: str | None = None
    residual: float | None = None
    uncertainty: float | None = None
    points: torch.Tensor | None = None
    alignments: dict[str, Alignment] | None = None

    def save(self, folder: WorkFiles, name: str) -> None:
        large = {PROBABILITIES: self.probabilities}
        if self.points is not None:
            large["points"] = self.points
        small = {key: getattr(self, key) for key in ("frame", "template", "residual", "uncertainty")}
        for template, found in self.alignments.items():
            place = {"matrix": found.to_template.matrix, "shift": found.to_template.shift, "pooled": found.pooled}
            small |= {f"alignments/{template}/{key}": value for key, value in place.items()}
        folder.save(name, large, small)

    @classmethod
    def load(cls, folder: WorkFiles, name: str, *fields: str) -> FirstPass:
        """Load ``fields`` only, to save time; ``alignments`` cannot be loaded here."""
        found: dict[str, Any] = {field: folder.load(name, [field])[0] for field in fields if folder.has(name, field)}
        numbers: dict[str, Any] = {
            field: float(found[field]) for field in ("residual", "uncertainty") if field in found
        }
        return cls(**(found | numbers))

    @staticmethod
    def alignment(folder: WorkFiles, name: str, template: str) -> Alignment:
        """The scan's alignment to ``template``."""
        keys = [f"alignments/{template}/{key}" for key in ("matrix", "shift", "pooled")]
        matrix, shift, pooled = folder.load(name, keys)
        return Alignment(AffineMap(matrix, shift), pooled)


class Fused(NamedTuple):
    """The result of label fusion for a scan: ``probabilities`` on its tokens, the names of its ``atlases``, and
    ``dissimilarity``, their mean descriptor distance to the scan."""

    probabilities: Probabilities
    atlases: list[str]
    dissimilarity: float

    def save(self, folder: WorkFiles, name: str) -> None:
        small = {"atlases": self.atlases, "dissimilarity": self.dissimilarity}
        folder.save(name, {PROBABILITIES: self.probabilities}, small)
