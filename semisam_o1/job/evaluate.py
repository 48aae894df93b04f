"""Score a finished run's labels on a split of a data set."""

from __future__ import annotations

from pathlib import Path

from semisam_o1.job.job import Job
from semisam_o1.report.metrics import read_csv, summary_text, write_csv
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import DatasetError

KEPT = ("train_spacing", "patch_size", "out_channels")  # resolved values of the run, which depend on its own templates


def evaluate_run(run: str | Path, dataset_dir: str | Path, split: str, overrides: dict | None = None) -> str:
    """Score a finished run's labels on ``split`` of a data set; returns a table and writes the rows to metrics.csv.

    Cases without a prediction are first predicted by the model of the selected round.

    Raises:
        DatasetError: ``run`` is not the folder of a run, or no case of the split has truth.
    """
    folder = RunFolder(run)
    record = folder.read_record()
    if not record:
        raise DatasetError(f"{run}: no run.json there; expected the folder of a run.")
    kept = {name: record["settings"][name] for name in KEPT} | {"num_rounds": record["rounds"]}
    config = record["config"] | kept | {"template": record["template"], "dataset_dir": str(dataset_dir)}
    job = Job(config | {"output_dir": str(run)} | (overrides or {}))
    job.record.take_up()
    job.record.best_round = record["best_round"]
    job.predict_missing(split)
    rows = job.evaluate([split])
    if not rows:
        raise DatasetError(f"{dataset_dir}: no case of '{split}' has both a label of this run and the truth.")
    others = [row for row in read_csv(folder.metrics) if row["split"] != split] if folder.metrics.exists() else []
    write_csv(others + rows, folder.metrics)
    return summary_text(rows, job.config.setting("metric_definition"))
