"""The folder of a run. Only this module knows its file names.

``RunFolder(path).round(2).prediction("case")`` is a path; the caller checks whether the file exists.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from semisam_o1.files import WorkFiles, read_json, remove, remove_empty, write_json
from semisam_o1.ledger import Ledger
from semisam_o1.tables import TEXT, CaseTable
from semisam_o1.types import Case, DatasetError, UserError

ROUND = re.compile(r"round_(0|[1-9]\d{0,5})")
LAYOUT = 3  # of a run folder; folders with another layout are rejected
CALIBRATION = "calibration.json"  # in round 0's work files
VOTE = "vote.json"  # in round 0's work files: whether the vote near borders is dropped
OUTLINES = "outlines.json"  # and what was learned of how people outline
SUFFIX = ".nii.gz"  # of every label and map that a run writes
# What run.json and progress.json hold: the type of each entry, and of what is in it if it is given.
RECORD: dict[str, tuple[type, ...]] = {
    "settings": (dict,), "classes": (dict, str), "template": (list, str), "rounds": (int,), "best_round": (int,),
    "labels_round": (int,), "stages": (list, dict), "set_aside": (dict, str), "failed": (dict, str),
    "warnings": (list, str), "corrections": (list, dict), "more_rounds": (int,),
    "handed_out": (list, dict), "imported": (dict, str), "stale": (list, str),
}  # fmt: skip
LATER = {
    "failed",
    "labels_round",
    "corrections",
    "more_rounds",
    "handed_out",
    "imported",
    "stale",
    "half_done_fits",
}  # entries that the two files did not always have
JOURNAL: dict[str, tuple[type, ...]] = {
    "done": (list, str), "settings": (dict,), "files": (dict, dict), "half_done_fits": (bool,),
}  # fmt: skip
# Columns of quality.csv: the fields of `round_0.quality.Quality`, then one for each class.
QUALITY = (
    "predicted_dice",
    "low",
    "high",
    "reverse_consistency",
    "agreement",
    "dissimilarity",
    "back_residual",
    "nonpositive_jacobian",
    "roughness",
)
ODD = "odd"  # column of both: classes with a volume or a place that no other scan of the pool has
CANNOT_TELL = "cannot_tell"  # column of quality.csv and review.csv: why a label has no predicted Dice
CLASS_COLUMN = "predicted_dice_"  # then the number of the class


def class_column(number: int) -> str:
    """The column of quality.csv with the predicted Dice of a class."""
    return f"{CLASS_COLUMN}{number}"


def doubted_first(predicted_dice: float | None) -> tuple[bool, float]:
    """A key to sort labels by: those without predicted Dice first, then the lowest."""
    return predicted_dice is not None, predicted_dice or 0.0


def folder_path(path: str | Path) -> Path:
    """``path`` as a path.

    Raises:
        UserError: the path is empty, as that of a shell variable that is not set.
    """
    if not str(path).strip():
        raise UserError("The folder for results is an empty text. Name a folder.")
    return Path(path).expanduser()


def volume(folder: Path, name: str) -> Path:
    """The file of case ``name`` in a folder of labels or maps."""
    return folder / f"{name}{SUFFIX}"


def uncertainty_table(folder: Path, ledger: Ledger | None = None) -> CaseTable:
    """The table of mean uncertainties of the predictions in ``folder``, highest first."""
    columns = {"uncertainty": ".6f"}
    return CaseTable(folder / "uncertainty.csv", columns, lambda row: (-row[1]["uncertainty"], row[0]), ledger)


class PredictionFolder:
    """A folder of predictions for scans that belong to no run."""

    def __init__(self, path: str | Path):
        self.path = folder_path(path)
        self.ledger = Ledger(self.path, "predict")
        self.labels = self.path / "labels"
        self.uncertainty = uncertainty_table(self.path, self.ledger)

    def claim(self, cases: Sequence[Case]) -> None:
        """Refuse to replace what was not written here, or one of the scans themselves.

        Raises:
            UserError: it names the files.
        """
        targets = [file(case.name) for case in cases for file in (self.label, self.uncertainty_map)]
        if any((self.path / name).exists() for name in ("images", "data", "train.txt")):
            raise UserError(
                f"{self.path} is a data set, and predictions in it would pass for its labels. Name another."
            )
        self.ledger.refuse_foreign([*targets, self.uncertainty.path])
        scans = {case.image.resolve() for case in cases}
        if found := [str(path) for path in targets if path.resolve() in scans]:
            raise UserError(f"predict would replace its own input, {', '.join(found)}. Name another folder.")

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
        self.gain = self.path / "gain.json"
        self.quality = CaseTable(
            self.path / "quality.csv",
            dict.fromkeys(QUALITY, ".4f"),
            order=lambda row: (*doubted_first(row[1].get("predicted_dice")), row[0]),
            more=(CLASS_COLUMN, ".4f"),
            later={CANNOT_TELL: TEXT, ODD: TEXT},
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
        """The final label of the round: the propagated or refined label, if it counts, else the prediction."""
        predicted_alone = not (self.label(name).is_file() and self.refinement_counts)
        return self.prediction(name) if predicted_alone and self.prediction(name).is_file() else self.label(name)

    def copy(self, name: str) -> Path:
        """Round 0: the image of a copy of the template. Later rounds: its predicted label."""
        return volume(self.work("copies").folder, name)

    @property
    def calibration(self) -> Path:
        """How the evidence of a label of this round becomes a predicted Dice."""
        return self.work("").folder / CALIBRATION

    def remove(self, parts: Iterable[str], names: Collection[str]) -> list[str]:
        """Remove what the steps ``parts`` of a run wrote here about the cases ``names``, and the folders in which
        nothing else is left. Returns the steps of which there was anything."""
        found = []
        for part in parts:
            paths = [path for name in names for path in self._of_case(part, name)] + self._of_all(part)
            if any(path.exists() for path in paths):
                found.append(part)
            for path in paths:
                remove(path)
        remove_empty(self.path)
        return found

    def _of_case(self, part: str, name: str) -> list[Path]:
        """What the step ``part`` writes about a case. Label fusion replaces the first pass's label of some cases."""
        labels = [self.label(name), self.confidence(name)]
        match part:
            case "first":
                kinds = [kind.name for kind in self.work("").folder.glob("*")]
                return [*labels, self.copied(name), *(self.work(kind).path(name) for kind in kinds)]
            case "fusion":
                fused = self.work("fused").path(name)
                return [*labels, fused] if fused.is_file() else []
            case "prediction":
                return [self.prediction(name), self.uncertainty_map(name), self.work("predicted").path(name)]
            case "refinement":
                return [self.label(name)]
        return []

    def _of_all(self, part: str) -> list[Path]:
        """What the step ``part`` writes about no single case."""
        copies = self.work("copies").folder
        return {
            "first": [self.uncertainty.path, self.work("first").folder / VOTE],
            "fusion": [self.work("first").folder / OUTLINES],
            "copies": [copies],
            "training": [self.model, self.training_state, *self.path.glob(f"{self.path.name.replace('_', '')}_*.pth")],
            "prediction": [self.uncertainty.path, copies, self.gain],
            "refinement": [self.refinement],
            "quality": [self.quality.path, self.calibration],
        }[part]

    def work(self, kind: str) -> WorkFiles:
        """Arrays that one stage writes for the next."""
        return WorkFiles(self.path / "work" / kind)

    @property
    def refined(self) -> list[str] | None:
        """The cases of this round's refinement; None before it."""
        return read_json(self.refinement).get("cases", []) if self.refinement.exists() else None

    @property
    def refinement_counts(self) -> bool:
        """Whether refined labels are the final ones of this round. They are for the next round alone if the round has
        become the last one of a run that does not refine its last round."""
        return not self.refinement.exists() or read_json(self.refinement).get("counts", True)

    @property
    def kept_gain(self) -> float | None:
        """The expected gain of this round over round 0, as `keep_gain` kept it."""
        return read_json(self.gain)["expected_gain"] if self.gain.exists() else None

    def keep_gain(self, gain: float) -> None:
        """Keep the expected gain of this round: work files, which it comes from, may be removed from a finished run."""
        write_json(self.gain, {"expected_gain": gain})

    def count_refinement(self, counts: bool) -> None:
        write_json(self.refinement, read_json(self.refinement) | {"counts": counts})

    @property
    def refinement_off(self) -> bool:
        """Whether the guard switched off the refinement of this round."""
        return self.refinement.exists() and bool(read_json(self.refinement).get("switched_off"))


class RunFolder:
    """The folder of a run."""

    def __init__(self, path: str | Path):
        self.path = folder_path(path)
        self.features, self.bundle = self.path / "features", self.path / "bundle"
        self.pseudo_labels = self.path / "pseudo_labels"
        self.record, self.journal = self.path / "run.json", self.path / "progress.json"
        self.report, self.review, self.metrics = (
            self.path / name for name in ("report.html", "review.csv", "metrics.csv")
        )

        self.problems = self.path / "problems.csv"
        self.ledger = Ledger(self.path, "run")
        self.reviewed = self.ledger.reviewed

    def ours(self) -> bool:
        """Whether a run of this package was begun here."""
        return bool(self.read_journal() or self.read_record())

    def present(self) -> list[Path]:
        """The files and folders that have a name that a run uses."""
        tables = (self.report, self.review, self.metrics, self.problems, self.ledger.path, self.record, self.journal)
        names = [self.features, self.bundle, self.pseudo_labels, self.ledger.reviewed, *tables]
        return [path for path in names if os.path.lexists(path)] + [self.round(n).path for n in self.rounds()]

    def round(self, number: int) -> RoundFolder:
        return RoundFolder(self.path / f"round_{number}")

    def rounds(self) -> list[int]:
        """The numbers of the rounds that have a folder, ascending."""
        folders = [path.name for path in self.path.glob("round_*") if path.is_dir()]
        return sorted(int(name[1]) for name in map(ROUND.fullmatch, folders) if name)

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
        return self._read(self.record, RECORD)

    def read_journal(self) -> dict[str, Any]:
        """The content of progress.json; empty if the file does not exist.

        Raises:
            DatasetError: the run has an earlier layout.
        """
        return self._read(self.journal, JOURNAL)

    def _read(self, path: Path, kinds: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
        if not path.is_file():
            return {}
        content = read_json(path)
        if content.get("layout") != LAYOUT:
            raise DatasetError(
                f"{self.path} was written by an earlier version of semisam-o1 ({path.name} has layout "
                f"{content.get('layout', 1)}, expected {LAYOUT}). Its labels stay as they are; name another folder "
                "for this run."
            )
        for name, kind in kinds.items():
            if not (name in LATER and name not in content) and not _is(content.get(name), *kind):
                expected = " of ".join(each.__name__ for each in kind)
                raise DatasetError(f"{path} is damaged: '{name}' is no {expected}. Restore it, or remove it.")
        return content


def _is(value: Any, kind: type, inside: type = object) -> bool:
    """Whether ``value`` has the type ``kind`` and, if it is a container, what is in it the type ``inside``."""
    if not isinstance(value, kind):
        return False
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(isinstance(part, inside) for part in parts)
