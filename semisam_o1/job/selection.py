"""Which round's labels to hand out, and whether another round is worth its time; without truth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from semisam_o1.data.formats import read_volume
from semisam_o1.report.overlap import mean_dice
from semisam_o1.runfolder import RoundFolder, RunFolder

WORSE = 0.02  # of mean predicted Dice: ten times what trainings that helped moved it by


def mean_predicted_dice(folder: RoundFolder) -> float:
    """Over a round's labels; 0 where none was judged."""
    found = [row["predicted_dice"] for row in folder.quality.read().values()]
    return sum(found) / max(len(found), 1)


def change(before: RoundFolder, after: RoundFolder, names: Iterable[str], num_classes: int) -> float:
    """1 - the mean Dice between the labels of two rounds, over those of the cases ``names`` that have one."""
    pairs = [(before.final(name), after.final(name)) for name in names]
    found = [
        mean_dice(*(read_volume(path).as_tensor()[0] for path in pair), num_classes)
        for pair in pairs
        if pair[0].exists()
    ]
    return 1 - sum(found) / len(found)


def best_round(quality: Mapping[int, float], tolerance: float) -> int:
    """The last round whose labels are judged as good as any round's, less the ``tolerance`` of that judgement."""
    return max(number for number in quality if quality[number] >= max(quality.values()) - tolerance)


def doubts(run: RunFolder, best: int) -> list[str]:
    """What whoever takes the labels of round ``best`` must know first."""
    folders = [run.round(number) for number in (0, best)]
    begun, ended = map(mean_predicted_dice, folders)
    if not all(folder.quality.path.exists() for folder in folders) or ended >= begun - WORSE:
        return []
    return [
        f"The final labels, of round {best}, are judged to be worse than those of round 0 (mean predicted Dice "
        f"{ended:.3f}, {begun:.3f} in round 0): the training was too short or failed. Take "
        f"{folders[0].labels}, or train longer (max_iterations)."
    ]
