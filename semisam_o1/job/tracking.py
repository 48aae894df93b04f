"""Experiment tracking with MLflow, as MONAI's ``--tracking mlflow`` asks for it: one run of MLflow for each round."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ignite.engine import Engine
from monai.handlers import MLFlowHandler
from monai.utils import optional_import

from semisam_o1.job.config import TRACKING, JobConfig, parser_of, result
from semisam_o1.job.resume import FREE, without_path
from semisam_o1.job.selection import mean_predicted_dice
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import UserError

HANDLER = "MLFlowHandler"
PATCHED = (("train", "handlers"), ("validate", "handlers"), ("validate", "evaluator", "val_handlers"))
LEFT_OUT = ("template", "iterations")  # names of scans; the length of a round, which MONAI records as epochs
COMPONENTS = ("encoder", "network_def", "train#loss", "train#method", "refinement#propose")
MOST_PARAMS = 100  # that MLflow takes at once


def untracked(raw: Mapping[str, Any]) -> tuple[dict, dict[str, Any] | None]:
    """The raw config without what MONAI's tracking added, and the values of the added ids; None if tracking is off.

    The handlers that MONAI adds expect another kind of output, and every id would count as a setting. Handlers in a
    config without ``--tracking`` are left alone.
    """
    if raw.get("save_execute_config", False) is False:
        return dict(raw), None
    parser = parser_of(raw)
    settings = {id: result(parser, id) for id in TRACKING if id in raw}
    kept = copy.deepcopy({id: value for id, value in raw.items() if id not in TRACKING})
    for *above, last in PATCHED:
        holder: Any = kept
        for part in above:
            holder = holder.get(part) or {}
        if isinstance(found := holder.get(last), list):
            holder[last] = [handler for handler in found if not _is_monais(handler)]
            if not holder[last]:
                del holder[last]
    return kept, settings


def _is_monais(handler: Any) -> bool:
    return isinstance(handler, Mapping) and handler.get("_target_") == HANDLER


class Tracking:
    """What a job records in MLflow: settings and losses of each training, at the end the metrics of each round.

    A round has a run of its own, named after the run folder and the round. A training that goes on after it was cut off
    goes on in its run; one that begins anew gets a new run. Names of scans and paths are left out.

    Args:
        settings: the ids that MONAI's tracking added, see `untracked`; None: nothing is recorded.
    """

    def __init__(self, run: RunFolder, config: JobConfig, settings: Mapping[str, Any] | None):
        self.run, self.config, self.settings = run, config, settings

    def begin(self) -> None:
        """Make the experiment, before any long work.

        Raises:
            UserError: MLflow is missing, or the store cannot be used.
        """
        if self.settings is None:
            return
        if not optional_import("mlflow")[1]:
            raise UserError("--tracking mlflow: MLflow is not installed. Run: pip install 'semisam-o1[tracking]'")
        for name in ("alembic", "mlflow.store.db.utils"):  # the tables of a new store, one by one
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            handler = self._handler(0)
            self._experiment(handler)
            handler.close()
        except Exception as error:
            raise UserError(f"tracking_uri {self.settings.get('tracking_uri')}: {error}") from error

    def follow(self, trainer: Engine, number: int, resumed: bool) -> None:
        """Record a training of round ``number``; ``resumed``: it goes on where an earlier start was cut off."""
        if self.settings is None:
            return
        self.begin()
        handler = self._handler(number, trainer)
        if not resumed:
            for left in self._runs_of(handler, number):
                if left.info.status == "RUNNING":
                    handler.client.set_terminated(left.info.run_id, "KILLED")
        if not resumed or not self._runs_of(handler, number):
            self._new_run(handler, number)
        handler.attach(trainer)

    def finish(self, rows: Sequence[Mapping[str, Any]], rounds: int) -> None:
        """Record the metrics of each round, unless its run has them: mean Dice by split and stage, predicted Dice.

        Args:
            rows: of metrics.csv.
        """
        if self.settings is None:
            return
        handler = self._handler(0)
        for number in range(rounds + 1):
            found = self._runs_of(handler, number)
            run = found[0] if found else self._new_run(handler, number)
            metrics = self._metrics([row for row in rows if row["round"] == number], number)
            for name, value in metrics.items():
                if run.data.metrics.get(name) != value:
                    handler.client.log_metric(run.info.run_id, name, value, step=number)
            if run.info.status == "RUNNING":
                handler.client.set_terminated(run.info.run_id)
        handler.close()

    def params(self) -> dict[str, str]:
        """The settings that results depend on, by names that MLflow takes."""
        left_out = {*FREE, *LEFT_OUT} - {"preset"}
        found = {id: value for id, value in self.config.settings.items() if id not in left_out}
        leaves = self.config.leaves()
        found |= {id: leaves[f"{id}#_target_"] for id in COMPONENTS if f"{id}#_target_" in leaves}
        return {id.replace("#", "/"): str(without_path(value)) for id, value in found.items()}

    def _metrics(self, rows: Sequence[Mapping[str, Any]], number: int) -> dict[str, float]:
        groups: dict[str, list[float]] = {}
        for row in rows:
            groups.setdefault(f"dice/{row['split']}/{row['stage']}", []).append(row["dice"])
        found = {name: float(np.mean(values)) for name, values in groups.items()}
        folder = self.run.round(number)
        if folder.quality.path.is_file():
            (found["predicted_dice"],) = mean_predicted_dice([folder])
        return found

    def _name(self, number: int) -> str:
        settings = self.settings or {}
        return f"{settings.get('run_name') or self.run.path.resolve().name}, round {number}"

    def _handler(self, number: int, trainer: Any = None) -> MLFlowHandler:
        def losses(output: Any) -> dict[str, float]:
            """The loss, and the weighted value of each of its terms."""
            terms = getattr(getattr(trainer, "loss_function", None), "weighted", {})
            found = {f"train_loss/{name}": float(value) for name, value in terms.items()}
            return {"train_loss": float(output["loss"].detach())} | found

        settings = self.settings or {}
        return MLFlowHandler(
            tracking_uri=settings.get("tracking_uri"),
            experiment_name=settings.get("experiment_name") or "monai_experiment",
            run_name=self._name(number),
            output_transform=losses,
            close_on_complete=True,
        )

    def _experiment(self, handler: MLFlowHandler) -> str:
        """The id of the experiment, which is made if it is missing."""
        found = handler.client.get_experiment_by_name(handler.experiment_name)
        if found:
            return found.experiment_id
        return handler.client.create_experiment(handler.experiment_name, artifact_location=handler.artifact_location)

    def _runs_of(self, handler: MLFlowHandler, number: int) -> list[Any]:
        """The runs of a round, the last one first."""
        found = handler.client.search_runs([self._experiment(handler)], order_by=["attributes.start_time DESC"])
        return [run for run in found if run.info.run_name == self._name(number)]

    def _new_run(self, handler: MLFlowHandler, number: int) -> Any:
        from mlflow.entities import Param

        run = handler.client.create_run(self._experiment(handler), run_name=self._name(number))
        for some in _parts([Param(name, value) for name, value in self.params().items()]):
            handler.client.log_batch(run.info.run_id, params=some)
        return run


def _parts(params: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (params[begin : begin + MOST_PARAMS] for begin in range(0, len(params), MOST_PARAMS))
