"""Score a finished run's labels on a split of a data set."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from semisam_o1.data.cohort import Cohort
from semisam_o1.job import results
from semisam_o1.job.bundle import trained_config
from semisam_o1.job.config import Config, override
from semisam_o1.job.reopen import cohort_of
from semisam_o1.ledger import State
from semisam_o1.literals import as_config
from semisam_o1.lock import lock_folder
from semisam_o1.report.metrics import read_csv, summary_text, write_csv
from semisam_o1.reviewed import Reviewed
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import Case, DatasetError

log = logging.getLogger("semisam_o1")


def evaluate_run(
    run: str | Path,
    dataset_dir: str | Path,
    split: str,
    overrides: Mapping[str, Any] | None = None,
    pseudonyms: str | Path | None = None,
) -> str:
    """Score a finished run's labels on ``split`` of a data set; returns a table and writes the rows to metrics.csv.

    Cases without a prediction are first predicted by the run's trained bundle, with the config ids ``overrides``.
    ``pseudonyms``: the key of a run under pseudonyms.

    Raises:
        DatasetError: ``run`` is not the folder of a run, its key is missing, or no case of the split has truth.
    """
    folder = RunFolder(run)
    record = folder.read_record()
    if not record:
        raise DatasetError(f"{run}: no run.json there; expected the folder of a run.")
    if record["best_round"] and overrides:
        Config(prediction(folder, overrides).get())  # also if nothing is left to predict
    with lock_folder(folder.path):
        return _scored(folder, record, cohort_of(folder, dataset_dir, pseudonyms), split, overrides or {})


def _scored(
    folder: RunFolder, record: Mapping[str, Any], cohort: Cohort, split: str, overrides: Mapping[str, Any]
) -> str:
    """See `evaluate_run`."""
    number, reviewed = record["best_round"], Reviewed(folder.reviewed)
    cohort = cohort.without(record.get("failed", {})).with_reviewed(reviewed.labels(), reviewed.rejected())
    missing = [case for case in cohort.split(split) if not folder.round(number).prediction(case.name).exists()]
    if number and missing:
        predict(folder, number, missing, overrides)
    definition = record["settings"]["metric_definition"]
    rows = results.scores(folder, cohort, [split], record["rounds"], definition)
    if not rows:
        raise DatasetError(f"{cohort.root}: no case of '{split}' has both a label of this run and the truth.")
    untouched = folder.ledger.state(folder.metrics) is State.OURS  # a table that a person changed is used for nothing
    written = {row["split"] for row in rows} | ({"pool", "touched"} if split == "pool" else set())
    others = [row for row in read_csv(folder.metrics) if row["split"] not in written] if untouched else []
    with folder.ledger.writing(folder.metrics) as aside:
        write_csv(others + rows, aside)
    return summary_text(rows, definition)


def predict(run: RunFolder, round: int, cases: Sequence[Case], overrides: Mapping[str, Any]) -> None:
    """Predict ``cases`` with the trained bundle of a run, into the folder of the ``round`` that the bundle holds."""
    log.info("round %d: prediction", round)
    parser = prediction(run, overrides)
    parser.update({"cases": list(cases), f"{saver(parser)}#round": round})
    for id in ("initialize", "run"):
        parser.get_parsed_content(id)


def prediction(run: RunFolder, overrides: Mapping[str, Any]) -> ConfigParser:
    """The config of a run's trained bundle for predictions into the folder of a round."""
    parser = ConfigParser(trained_config(run))
    parser.update({"bundle_root": as_config(run.bundle), "output_dir": as_config(run.path)})
    parser.update({f"{saver(parser)}#_target_": "semisam_o1.handlers.round_predictions"})
    override(parser, overrides)
    return parser


def saver(parser: ConfigParser) -> str:
    """The handler of inference.json that writes predictions; in bundles of earlier versions it is in the evaluator."""
    return "handlers#1" if "handlers" in parser else "evaluator#val_handlers#1"
