"""What each pass of round 0 leaves for the next: one record a case in ``round_0/work``."""

from __future__ import annotations

from typing import NamedTuple

import torch

from semisam_o1.files import WorkFiles
from semisam_o1.round_0.alignment import AffineMap
from semisam_o1.types import Probabilities, Tokens

PROBABILITIES = "probabilities"


class Alignment(NamedTuple):
    """A scan's place in one template: the affine map, and the scan's descriptors pooled in that template's basis."""

    to_template: AffineMap
    pooled: Tokens


class FirstPass(NamedTuple):
    """What the first pass found of a scan; a field that was not asked for, or not found, is None.

    Attributes:
        probabilities: (num_classes, H', W', D') on the scan's tokens.
        frame: in which frame the scan's features were taken, see `FeatureStore.frame`.
        template: the name of the template whose alignment left the least distance; "" where nothing was aligned.
        residual: that distance; NaN where nothing was aligned.
        uncertainty: of the label, the mean over the scan.
        points: where each token lies in that template, (H', W', D', 3) centred mm.
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
        """The ``fields`` asked for, ``alignments`` excepted; reading the others takes time."""
        found = {field: folder.load(name, [field])[0] for field in fields if folder.has(name, field)}
        return cls(**{k: float(v) if k in ("residual", "uncertainty") else v for k, v in found.items()})

    @staticmethod
    def alignment(folder: WorkFiles, name: str, template: str) -> Alignment:
        """The scan's place in ``template``."""
        keys = [f"alignments/{template}/{key}" for key in ("matrix", "shift", "pooled")]
        matrix, shift, pooled = folder.load(name, keys)
        return Alignment(AffineMap(matrix, shift), pooled)


class Fused(NamedTuple):
    """What the label fusion made of a scan: ``probabilities`` on its tokens, the ``atlases`` by name, and their mean
    descriptor distance to the scan, ``dissimilarity``."""

    probabilities: Probabilities
    atlases: list[str]
    dissimilarity: float

    def save(self, folder: WorkFiles, name: str) -> None:
        small = {"atlases": self.atlases, "dissimilarity": self.dissimilarity}
        folder.save(name, {PROBABILITIES: self.probabilities}, small)
