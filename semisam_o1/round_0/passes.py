"""The records that the steps of round 0 write for each other: one per case in ``round_0/work``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from semisam_o1.data.cohort import Cohort
from semisam_o1.files import WorkFiles, read_json, write_json
from semisam_o1.round_0.places import AffineMap
from semisam_o1.runfolder import VOTE
from semisam_o1.types import Case, Probabilities, Tokens

PROBABILITIES = "probabilities"
VOTE_MARGIN = 0.004  # the vote costs some 0.001 of reverse consistency where it improves labels


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
        without_vote: ``probabilities`` without the vote near borders.
        vote_gain: what that vote adds to the reverse consistency of the label.
        reached: the share of each foreground class of that template that the scan reaches, (num_classes - 1,); 0 for
            one outside of its field of view.
    """

    probabilities: Probabilities | None = None
    frame: str | None = None
    template: str | None = None
    residual: float | None = None
    uncertainty: float | None = None
    points: torch.Tensor | None = None
    alignments: dict[str, Alignment] | None = None
    without_vote: Probabilities | None = None
    vote_gain: float | None = None
    reached: torch.Tensor | None = None

    def save(self, folder: WorkFiles, name: str) -> None:
        large = {PROBABILITIES: self.probabilities}
        large |= {key: value for key in ("points", "without_vote") if (value := getattr(self, key)) is not None}
        small = {key: getattr(self, key) for key in ("frame", "template", "residual", "uncertainty")}
        small |= {key: value for key in ("vote_gain", "reached") if (value := getattr(self, key)) is not None}
        for template, found in self.alignments.items():
            place = {"matrix": found.to_template.matrix, "shift": found.to_template.shift, "pooled": found.pooled}
            small |= {f"alignments/{template}/{key}": value for key, value in place.items()}
        folder.save(name, large, small)

    @classmethod
    def load(cls, folder: WorkFiles, name: str, *fields: str) -> FirstPass:
        """Load ``fields`` only, to save time; ``alignments`` cannot be loaded here.

        ``probabilities`` are those without the vote if it was dropped, see `drop_vote`.
        """
        stored = {field: field for field in fields}
        if "probabilities" in stored and dropped_vote(folder) and folder.has(name, "without_vote"):
            stored["probabilities"] = "without_vote"
        found: dict[str, Any] = {
            field: folder.load(name, [key])[0] for field, key in stored.items() if folder.has(name, key)
        }
        numbers: dict[str, Any] = {
            field: float(found[field]) for field in ("residual", "uncertainty", "vote_gain") if field in found
        }
        return cls(**(found | numbers))

    @staticmethod
    def alignment(folder: WorkFiles, name: str, template: str) -> Alignment:
        """The scan's alignment to ``template``."""
        keys = [f"alignments/{template}/{key}" for key in ("matrix", "shift", "pooled")]
        matrix, shift, pooled = folder.load(name, keys)
        return Alignment(AffineMap(matrix, shift), pooled)


def outside_classes(reached: torch.Tensor, class_numbers: Sequence[int]) -> list[int]:
    """The numbers of the classes that lie outside of a scan's field of view, given what it reaches of each."""
    return [class_numbers[1 + int(channel)] for channel in (reached == 0).nonzero()[:, 0]]


def dropped_vote(folder: WorkFiles) -> bool | None:
    """Whether the vote near borders was dropped for the pool; None if that is not decided yet."""
    path = folder.folder / VOTE
    return bool(read_json(path).get("dropped")) if path.is_file() else None


def settle_vote(folder: WorkFiles, names: Iterable[str]) -> bool:
    """Decide once for the pool whether the vote near borders is dropped; returns that.

    It is dropped if the labels with it lose more than `VOTE_MARGIN` of reverse consistency on average.
    """
    if (dropped := dropped_vote(folder)) is None:
        gains = [FirstPass.load(folder, name, "vote_gain").vote_gain for name in names]
        known = [gain for gain in gains if gain is not None]
        dropped = bool(known) and sum(known) / len(known) < -VOTE_MARGIN
        if known:
            write_json(folder.folder / VOTE, {"dropped": dropped, "mean_gain": sum(known) / len(known)})
    return dropped


class Fused(NamedTuple):
    """The result of label fusion for a scan.

    probabilities: (num_classes, H', W', D') on its tokens. atlases: names of scans of the pool. dissimilarity: mean
    descriptor distance of all atlases to the scan. labelled: names of labelled scans that are atlases too.
    """

    probabilities: Probabilities
    atlases: list[str]
    dissimilarity: float
    labelled: list[str]

    def save(self, folder: WorkFiles, name: str) -> None:
        small: dict[str, Any] = {key: found for key in ("atlases", "labelled") if (found := getattr(self, key))}
        folder.save(name, {PROBABILITIES: self.probabilities}, small | {"dissimilarity": self.dissimilarity})

    @staticmethod
    def atlases_of(folder: WorkFiles, name: str) -> tuple[list[str], list[str]]:
        """The names of the labelled scans and of those of the pool that the label of a scan comes from."""
        labelled, pool = (
            folder.load(name, [key])[0] if folder.has(name, key) else [] for key in ("labelled", "atlases")
        )
        return labelled, pool


def left_out(cohort: Cohort, records: WorkFiles, fused: WorkFiles) -> Iterator[tuple[Case, Probabilities]]:
    """The labelled scans to which the label of the others was carried, with its probabilities on their tokens."""
    for case in cohort.labelled:
        if fused.path(case.name).is_file() and FirstPass.load(records, case.name, "template").template != case.name:
            yield case, fused.load(case.name, [PROBABILITIES])[0]
