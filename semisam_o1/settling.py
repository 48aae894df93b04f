"""What a finished round's labels are worth, how far they moved, and which round's to hand out; without truth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from semisam_o1.refinement import mean_dice
from semisam_o1.round_0 import QualityList
from semisam_o1.transforms import read_volume

WORSE = 0.02  # of mean predicted Dice: ten times what trainings that helped moved it by


def labels_dir(round_dir: Path) -> Path:
    """Where the labels are that a round ends with: refined ones, else predictions."""
    return round_dir / "labels" if (round_dir / "labels").is_dir() else round_dir / "predictions"


def worth(round_dir: Path) -> float:
    """The mean predicted Dice of a round's labels; 0 where none was judged."""
    quality = QualityList(round_dir / "quality.csv").read()
    return sum(found.predicted_dice for found in quality.values()) / max(len(quality), 1)


def change(before: Path, after: Path, names: Iterable[str], num_classes: int) -> float:
    """1 - the mean Dice between the labels of two round folders, over those of the cases ``names`` that have one."""
    folders = [labels_dir(folder) for folder in (before, after)]
    files = [[folder / f"{name}.nii.gz" for folder in folders] for name in names]
    found = [
        mean_dice(*(read_volume(path).as_tensor()[0] for path in pair), num_classes)
        for pair in files
        if pair[0].exists()
    ]
    return 1 - sum(found) / len(found)


def best_round(worth: Mapping[int, float], tolerance: float) -> int:
    """The last round whose labels are judged as good as any round's, less the ``tolerance`` of that judgement."""
    return max(number for number in worth if worth[number] >= max(worth.values()) - tolerance)


def doubts(output: Path, best: int) -> list[str]:
    """What whoever takes the labels of round ``best`` must know first."""
    folders = [output / f"round_{number}" for number in (0, best)]
    begun, ended = map(worth, folders)
    if not all((folder / "quality.csv").exists() for folder in folders) or ended >= begun - WORSE:
        return []
    return [
        f"The final labels, of round {best}, are judged to be worse than those of round 0 (mean predicted Dice "
        f"{ended:.3f}, {begun:.3f} in round 0): the training was too short or failed. Take "
        f"{folders[0] / 'labels'}, or train longer (max_iterations)."
    ]
