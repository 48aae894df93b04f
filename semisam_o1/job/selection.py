"""Selection of the best round by predicted Dice, without truth, and the change of labels between rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from semisam_o1.data.cohort import Cohort
from semisam_o1.report.overlap import mean_dice
from semisam_o1.runfolder import RoundFolder, RunFolder

WORSE = 0.035  # drop of mean predicted Dice that gives a warning; successful trainings lost up to 0.027
FAILED = 0.06  # drop after which the labels of round 0 are handed out


def mean_predicted_dice(folders: Sequence[RoundFolder]) -> list[float]:
    """Mean predicted Dice of the labels of each round; 0 if no quality was estimated.

    Means are compared, so they are taken over the same cases: those with a predicted Dice in each round. A label whose
    Dice nobody can tell has none.
    """
    found = [_known(folder) for folder in folders]
    names = [name for name in found[0] if all(name in one for one in found)]
    return [sum(one[name] for name in names) / max(len(names), 1) for one in found]


def _known(folder: RoundFolder) -> dict[str, float]:
    rows = folder.quality.read().items()
    return {name: row["predicted_dice"] for name, row in rows if row["predicted_dice"] is not None}


def change(before: RoundFolder, after: RoundFolder, cohort: Cohort) -> float:
    """1 - mean Dice between the labels of two rounds, over the pool's cases that have a label."""
    pairs = [(case, (before.final(case.name), after.final(case.name))) for case in cohort.pool]
    found = [
        mean_dice(cohort.label(case, pair[0]), cohort.label(case, pair[1]), cohort.num_classes)
        for case, pair in pairs
        if pair[0].exists()
    ]
    return 1 - sum(found) / len(found)


def best_round(quality: Mapping[int, float], tolerance: float) -> int:
    """The last round whose predicted Dice is at most ``tolerance`` below the highest of all rounds."""
    return max(number for number in quality if quality[number] >= max(quality.values()) - tolerance)


def labels_round(run: RunFolder, best: int) -> int:
    """The round whose labels are handed out: ``best``, or 0 if its labels are judged clearly better.

    The predicted Dice of a trained label falls even where the label improves, since it is compared with round 0: by up
    to 0.03 on hearts and hippocampi. A fall by more than `FAILED` is a failed training. It is known only if the network
    labelled the copies too.
    """
    first, final = run.round(0), run.round(best)
    if best == 0 or not (first.quality.path.exists() and final.calibration.exists()):
        return best
    before, after = mean_predicted_dice([first, final])
    return 0 if after < before - FAILED else best


def doubts(run: RunFolder, best: int, handed_out: int) -> list[str]:
    """Warnings for users of the model of round ``best`` and of the labels of round ``handed_out``."""
    folders = [run.round(number) for number in (0, best)]
    first, final = mean_predicted_dice(folders)
    if not all(folder.quality.path.exists() for folder in folders):
        return []
    figures = f"mean predicted Dice {final:.3f}, {first:.3f} in round 0"
    if handed_out < best:
        text = (
            f"The labels of round {best} are judged to be worse than those of round 0 ({figures}): the training was "
            "too short or failed. Handed out are the labels of round 0. Train longer (max_iterations)."
        )
        return [text]
    if final >= first - WORSE:
        return []
    text = (
        f"The final labels, of round {best}, are judged to be worse than those of round 0 ({figures}): the training "
        f"was too short or failed. Take {folders[0].labels}, or train longer (max_iterations)."
    )
    return [text]
