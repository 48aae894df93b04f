"""Which round is best, and whether its labels are better than those of round 0, without truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from semisam_o1.data.cohort import Cohort
from semisam_o1.report.overlap import mean_dice
from semisam_o1.round_0.quality_estimate import copies_compared
from semisam_o1.runfolder import RoundFolder, RunFolder

WORSE = 0.035  # drop of mean predicted Dice that gives a warning where there are no copies; good ones lost 0.027
CLEAR = 0.01  # expected loss of Dice from which on the labels of round 0 are better


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
    """1 - mean Dice between the labels of two rounds, over the pool's cases that have a label.

    Raises:
        DatasetError: none has one.
    """
    pairs = [(case, (before.final(case.name), after.final(case.name))) for case in cohort.pool]
    found = [
        mean_dice(cohort.label(case, pair[0]), cohort.label(case, pair[1]), cohort.num_classes)
        for case, pair in pairs
        if pair[0].exists()
    ]
    if not found:
        raise cohort.none_left()
    return 1 - sum(found) / len(found)


def best_round(quality: Mapping[int, float], tolerance: float) -> int:
    """The last round whose predicted Dice is at most ``tolerance`` below the highest of all rounds."""
    return max(number for number in quality if quality[number] >= max(quality.values()) - tolerance)


def labels_round(best: int, gain: float | None) -> int:
    """The round whose labels are handed out: ``best``, or 0 if its labels are expected to be better by `CLEAR`.

    ``gain``: `expected_gain` of ``best``.
    """
    return 0 if gain is not None and gain < -CLEAR else best


def expected_gain(run: RunFolder, number: int, cohort: Cohort) -> float | None:
    """By how much the mean Dice of the network of a round is expected to exceed that of round 0, over the pool.

    On copies of the template the true Dice of both is known. But copies carry the template's own label, which round 0
    carries over, too; and they look strange to a network that never saw one. Both show in how much the network and
    round 0 disagree on copies. What they disagree less on scans counts for the network. Two labels cannot differ more
    from the truth than from each other, which bounds the gain.

    If the work files are gone, it is what was kept when the labels were handed out. Returns None if the network
    labelled no copies, or no scan has both labels.
    """
    if number == 0:
        return 0.0
    copies, scans = copies_compared(run, number), []
    if not copies:
        return run.round(number).kept_gain
    for case in cohort.untouched:
        paths = run.round(0).label(case.name), run.round(number).prediction(case.name)
        if all(path.is_file() for path in paths):
            first, last = (cohort.label(case, path) for path in paths)
            scans.append(mean_dice(first, last, cohort.num_classes))
    if not scans:
        return None
    of_network, of_round_0, agreement = np.mean(copies, axis=0)
    gain, most = of_network - of_round_0 + np.mean(scans) - agreement, 1 - np.mean(scans)
    return float(np.clip(gain, -most, most))


def doubts(run: RunFolder, best: int, handed_out: int, gain: float | None) -> list[str]:
    """Warnings for users of the model of round ``best`` and of the labels of round ``handed_out``.

    ``gain``: `expected_gain` of ``best``.
    """
    if handed_out < best and gain is not None:
        text = (
            f"The labels of round {best} are expected to be worse than those of round 0 (by "
            f"{-gain:.3f} in mean Dice): the training was too short, the scans were "
            "too few, or it failed. Handed out are the labels of round 0. Train longer (max_iterations)."
        )
        return [text]
    folders = [run.round(number) for number in (0, best)]
    first, final = mean_predicted_dice(folders)
    judged = all(folder.quality.path.exists() for folder in folders)
    if not judged or final >= first - WORSE or gain is not None:
        return []
    text = (
        f"The final labels, of round {best}, are judged to be worse than those of round 0 (mean predicted Dice "
        f"{final:.3f}, {first:.3f} in round 0): the training was too short or failed. Take {folders[0].labels}, or "
        "train longer (max_iterations)."
    )
    return [text]
