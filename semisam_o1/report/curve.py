"""How good labels are that nobody touched, by the number of labelled scans: what corrections have won so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from semisam_o1.report.metrics import STAGES
from semisam_o1.runfolder import RunFolder


class Step(NamedTuple):
    """The labels of ``round``, made with so many ``labelled`` scans.

    predicted: their mean predicted Dice. true: the mean of a metric where truth is known. None where there is none.
    """

    labelled: int
    round: int
    predicted: float | None
    true: float | None


def curve(run: RunFolder, record: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], metric: str) -> list[Step]:
    """The last round before each correction, and the last of all; empty before the first correction.

    Args:
        record: of run.json. rows: of metrics.csv. metric: the column of the true values.
    """
    batches = record.get("corrections", [])
    if not batches:
        return []
    rows, templates, steps = list(rows), len(record["template"]), []
    ends = [int(batch["after_round"]) for batch in batches] + [int(record["best_round"])]
    counts = [templates] + [templates + len(batch["labels"]) for batch in batches]
    for place, (end, labelled) in enumerate(zip(ends, counts)):
        if end in ends[place + 1 :]:  # more was given before a round followed
            continue
        quality = run.round(end).quality.read().values()
        predicted = [row["predicted_dice"] for row in quality if row["predicted_dice"] is not None]
        here = [row for row in rows if (row["split"], row["round"], row["class"]) == ("pool", end, "mean")]
        stage = max((row["stage"] for row in here if row["stage"] in STAGES[1:]), key=STAGES.index, default=None)
        true = [row[metric] for row in here if row["stage"] == stage]
        steps.append(Step(labelled, end, mean(predicted), mean(true)))
    return steps


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def curve_text(steps: Iterable[Step]) -> str:
    """The steps as lines for the log."""
    lines = ["scans that nobody touched: labelled scans, round, mean predicted Dice, mean Dice where known"]
    for step in steps:
        shown = ("-" if value is None else f"{value:.3f}" for value in (step.predicted, step.true))
        lines.append(f"{step.labelled:4} {step.round:4} {'  '.join(shown)}")
    return "\n".join(lines)
