"""How good the labels were that were handed out, by the number of labelled scans: what corrections have won so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from semisam_o1.report.metrics import STAGES
from semisam_o1.runfolder import RunFolder

TWO_SCALES = (
    "The predicted Dice of round 0 and that of a trained network are two different estimates: that one is lower than "
    "the other does not mean that labels became worse."
)


class Step(NamedTuple):
    """Labels that were handed out, made with so many ``labelled`` scans after ``rounds`` of training.

    source: the round they come from, 0 if its labels were expected to be better. predicted: their mean predicted Dice.
    true: the mean of a metric where truth is known. None where there is none.
    """

    labelled: int
    rounds: int
    source: int
    predicted: float | None
    true: float | None


def handed_out(
    run: RunFolder,
    number: int,
    labelled: int,
    rounds: int,
    names: Iterable[str],
    rows: Iterable[Mapping[str, Any]],
    metric: str,
) -> dict[str, Any]:
    """What is handed out, for run.json: for each scan that nobody touched, its predicted Dice and its true one.

    Args:
        number: of the round that the labels come from. labelled: number of scans with a label of a person. rounds: of
            training. names: of the untouched scans. rows: of metrics.csv. metric: the column of the true values.
    """
    here = [row for row in rows if (row["split"], row["round"], row["class"]) == ("pool", number, "mean")]
    stage = max((row["stage"] for row in here if row["stage"] in STAGES[1:]), key=STAGES.index, default=None)
    true = {row["case"]: row[metric] for row in here if row["stage"] == stage}
    quality = run.round(number).quality.read()
    cases = {name: [quality.get(name, {}).get("predicted_dice"), true.get(name)] for name in names}
    return {"labelled": labelled, "rounds": rounds, "round": number, "cases": cases}


def curve(steps: Sequence[Mapping[str, Any]]) -> list[Step]:
    """The labels that were handed out before each correction, and the last ones; empty before the first correction.

    ``steps``: of `handed_out`. A mean is over the same scans in each of them: those that nobody touched yet and
    of which the value is known.
    """
    if len(steps) < 2:
        return []
    found = []
    for step in steps:
        means = (_mean([step["cases"][name][place] for name in _known(steps, place)]) for place in (0, 1))
        found.append(Step(step["labelled"], step["rounds"], step["round"], *means))
    return found


def _known(steps: Sequence[Mapping[str, Any]], place: int) -> list[str]:
    """The scans of which every step knows the predicted Dice (``place`` 0) or the true one (1)."""
    return [name for name in steps[-1]["cases"] if all(_value(step, name, place) is not None for step in steps)]


def _value(step: Mapping[str, Any], name: str, place: int) -> float | None:
    return step["cases"].get(name, (None, None))[place]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def remark(steps: Iterable[Step]) -> str | None:
    """What to know before the predicted Dice of the steps are compared."""
    return TWO_SCALES if len({step.source > 0 for step in steps if step.predicted is not None}) > 1 else None


def curve_text(steps: Sequence[Step]) -> str:
    """The steps as lines for the log."""
    head = "labelled scans, rounds trained, labels of round, mean predicted Dice, mean Dice where known"
    lines = [f"labels handed out for scans that nobody touched: {head}"]
    for step in steps:
        shown = ("-" if value is None else f"{value:.3f}" for value in (step.predicted, step.true))
        lines.append(f"{step.labelled:4} {step.rounds:4} {step.source:4} {'  '.join(shown)}")
    return "\n".join([*lines, *filter(None, [remark(steps)])])
