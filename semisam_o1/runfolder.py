"""The folder of a run. Only this module knows its file names.

``RunFolder(path).round(2).prediction("case")`` is a path; the caller checks whether the file exists.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from semisam_o1.files import WorkFiles
from semisam_o1.tables import CaseTable
from semisam_o1.types import DatasetError

LAYOUT = 2  # of a run folder; folders with another layout are rejected
SUFFIX = ".nii.gz"  # of every label and map that a run writes
# Columns of quality.csv: the fields of `round_0.quality.Quality`.
QUALITY = (
    "predicted_dice",
    "reverse_consistency",
    "agreement",
    "dissimilarity",
    "back_residual",
    "nonpositive_jacobian",
    "roughness",
)


def volume(folder: Path, name: str) -> Path:
    """The file of case ``name`` in a folder of labels or maps."""
    return folder / f"{name}{SUFFIX}"


def uncertainty_table(folder: Path) -> CaseTable:
    """The table of mean uncertainties of the predictions in ``folder``, highest first."""
    return CaseTable(
        folder / "uncertainty.csv", {"uncertainty": ".6f"}, order=lambda row: (-row[1]["uncertainty"], row[0])
    )


class PredictionFolder:
    """A folder of predictions for scans that belong to no run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.labels = self.path / "labels"
        self.uncertainty = uncertainty_table(self.path)

    def label(self, name: str) -> Path:
        return volume(self.labels, name)

    def uncertainty_map(self, name: str) -> Path:
        return volume(self.path / "uncertainty", name)


class RoundFolder:
    """The folder of one round; round 0 is the propagation."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.labels, self.predictions = self.path / "labels", self.path / "predictions"
        self.model = self.path / "model.pt"
        self.training_state = self.path / "training.pt"
        self.refinement = self.path / "refinement.json"
        self.quality = CaseTable(
            self.path / "quality.csv",
            dict.fromkeys(QUALITY, ".4f"),
            order=lambda row: (row[1]["predicted_dice"], row[0]),  # lowest predicted Dice first
        )
        self.uncertainty = uncertainty_table(self.path)

    def label(self, name: str) -> Path:
        """Round 0: the propagated label. Later rounds: the refined label."""
        return volume(self.labels, name)

    def prediction(self, name: str) -> Path:
        return volume(self.predictions, name)

    def uncertainty_map(self, name: str) -> Path:
        return volume(self.path / "uncertainty", name)

    def confidence(self, name: str) -> Path:
        return volume(self.path / "confidence", name)

    def copied(self, name: str) -> Path:
        return volume(self.path / "copied", name)

    def final(self, name: str) -> Path:
        """The final label of the round: the refined label, else the prediction."""
        return self.label(name) if self.labels.is_dir() else self.prediction(name)

    def work(self, kind: str) -> WorkFiles:
        """Arrays that one stage writes for the next."""
        return WorkFiles(self.path / "work" / kind)

    @property
    def refinement_off(self) -> bool:
        """Whether the guard switched off the refinement of this round."""
        return self.refinement.exists() and json.loads(self.refinement.read_text(encoding="utf-8"))["switched_off"]


class RunFolder:
    """The folder of a run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.features, self.bundle = self.path / "features", self.path / "bundle"
        self.pseudo_labels = self.path / "pseudo_labels"
        self.record, self.journal = self.path / "run.json", self.path / "progress.json"
        self.report, self.review, self.metrics = (
            self.path / name for name in ("report.html", "review.csv", "metrics.csv")
        )

    def round(self, number: int) -> RoundFolder:
        return RoundFolder(self.path / f"round_{number}")

    def rounds(self) -> list[int]:
        """The numbers of the rounds that have a folder, ascending."""
        numbers = (path.name.removeprefix("round_") for path in self.path.glob("round_*") if path.is_dir())
        return sorted(int(number) for number in numbers if number.isdigit())

    def pseudo_label(self, name: str) -> Path:
        return volume(self.pseudo_labels, name)

    def final(self, name: str) -> Path | None:
        """The final label of a run: the one in ``pseudo_labels/``, else that of the latest round with a label."""
        found = [self.pseudo_label(name)]
        for number in reversed(self.rounds()):
            found += [self.round(number).label(name), self.round(number).prediction(name)]
        return next((path for path in found if path.is_file()), None)

    def refinement_off_before(self, number: int) -> bool:
        """Whether a round before ``number`` switched off the refinement, which then stays off."""
        return any(self.round(earlier).refinement_off for earlier in range(1, number))

    def read_record(self) -> dict[str, Any]:
        """The content of run.json; empty if the file does not exist.

        Raises:
            DatasetError: the run has an earlier layout.
        """
        return self._read(self.record)

    def read_journal(self) -> dict[str, Any]:
        """The content of progress.json; empty if the file does not exist.

        Raises:
            DatasetError: the run has an earlier layout.
        """
        return self._read(self.journal)

    def _read(self, path: Path) -> dict[str, Any]:
        if not path.is_file():
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("layout") != LAYOUT:
            raise DatasetError(
                f"{self.path} was written by an earlier version of semisam-o1 ({path.name} has layout "
                f"{content.get('layout', 1)}, expected {LAYOUT}). Its labels stay as they are; name another folder "
                "for this run."
            )
        return content
