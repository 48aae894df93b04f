"""Handlers that show how far work is and put results on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.handlers import CheckpointLoader
from monai.utils import CommonKeys as Keys
from torch import nn

from semisam_o1.data.export import write_label, write_share, write_weights
from semisam_o1.data.formats import case_grid
from semisam_o1.data.grids import to_grid
from semisam_o1.data.transforms import keep_largest
from semisam_o1.files import WorkFiles
from semisam_o1.runfolder import PredictionFolder, RunFolder
from semisam_o1.tables import CaseTable
from semisam_o1.types import Case
from semisam_o1.uncertainty import predictive_entropy

log = logging.getLogger("semisam_o1")


class ItemProgress:
    """Handler: one line of log a volume, so that long work shows where it is."""

    def __init__(self, what: str):
        self.what = what

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        batch = engine.state.batch
        name = batch.name if isinstance(batch, Case) else batch["case"][0]
        log.info("%s %d of %d: %s", self.what, engine.state.iteration, engine.state.epoch_length, name)


class PredictionSaver:
    """Handler of a MONAI evaluator: a scan's logits to a label and an uncertainty map in the scan's own geometry.

    Logits are (members, C, h, w, d): one member, or those of an ensemble, whose mean is the prediction.

    Args:
        cases: those that may come, by name.
        label: case name -> path of its label; uncertainty_map: of its uncertainty.
        table: gets the mean uncertainty of each volume.
        uncertainty: the measure, see the module `uncertainty`.
        kept: gets the pool's probabilities where the network saw them.
        largest_component: classes of which the largest component alone is kept.
        hdf5_key, hdf5_spacing: see `formats.HDF5Reader`.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        label: Callable[[str], Path],
        uncertainty_map: Callable[[str], Path],
        table: CaseTable,
        uncertainty: Callable[[torch.Tensor], torch.Tensor] = predictive_entropy,
        kept: WorkFiles | None = None,
        largest_component: Sequence[int] = (),
        hdf5_key: str = "image",
        hdf5_spacing=None,
    ):
        self.cases = {case.name: case for case in cases}
        self.label, self.uncertainty_map, self.table, self.kept = label, uncertainty_map, table, kept
        self.largest_component, self.hdf5 = largest_component, (hdf5_key, hdf5_spacing)
        self.uncertainty, self.found = uncertainty, {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        self.found = {}

    def save(self, engine: Engine) -> None:
        (name,) = engine.state.batch["case"]
        case = self.cases[name]
        grid = case_grid(case, *self.hdf5)
        affine = np.asarray(engine.state.batch[Keys.IMAGE].affine, float).reshape(-1, 4, 4)[0]
        logits = engine.state.output[Keys.PRED]
        logits = logits.as_tensor() if hasattr(logits, "as_tensor") else logits
        seen = logits.float().softmax(1).cpu()
        if self.kept is not None and case.split == "pool":
            self.kept.save(name, {"probabilities": seen.mean(0)}, {"affine": affine})
        members = torch.stack([to_grid(member, affine, grid).clamp(0, 1) for member in seen])
        uncertainty = self.uncertainty(members)
        self.found[name] = {"uncertainty": float(uncertainty.mean())}
        label = keep_largest(members.mean(0).argmax(0, keepdim=True), self.largest_component)[0]
        write_label(self.label(name), label.numpy(), case.image, grid)
        write_share(self.uncertainty_map(name), uncertainty.numpy(), case.image, grid)

    def completed(self, engine: Engine) -> None:
        self.table.write(self.found)


def round_predictions(cases: Sequence[Case], output_dir: str | Path, round: int, **settings) -> PredictionSaver:
    """A `PredictionSaver` into a round of the run ``output_dir``, which keeps the pool's probabilities."""
    folder = RunFolder(output_dir).round(round)
    places = (folder.prediction, folder.uncertainty_map, folder.uncertainty)
    return PredictionSaver(cases, *places, kept=folder.work("predicted"), **settings)


def new_predictions(cases: Sequence[Case], output_dir: str | Path, **settings) -> PredictionSaver:
    """A `PredictionSaver` into ``output_dir``/labels and /uncertainty, for scans of no run."""
    folder = PredictionFolder(output_dir)
    return PredictionSaver(cases, folder.label, folder.uncertainty_map, folder.uncertainty, **settings)


def round_weights(network: nn.Module, output_dir: str | Path, round: int, device: str = "cpu") -> CheckpointLoader:
    """MONAI's `CheckpointLoader` of the model that a round of the run ``output_dir`` ends with.

    For the round before the first there is none, which is for the caller to see.
    """
    path = RunFolder(output_dir).round(round).model
    return CheckpointLoader(str(path), {"model": network}, map_location=torch.device(device))


def attached(handler):
    """``handler`` itself: how a list of handlers that holds nothing but dictionaries names one that has an id."""
    return handler


class WeightsSaver:
    """Handler: the weights of ``network`` as a plain ``state_dict``, a round's model, when training has ended.

    Where ``best`` names a file beside it that exists (the state which validation chose, preset `paper`), its weights
    instead.
    """

    def __init__(self, network: nn.Module, output_dir: str | Path, round: int, best: str | None = None):
        folder = RunFolder(output_dir).round(round)
        self.network, self.path, self.best = network, folder.model, best and folder.path / best

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        chosen = self.best is not None and self.best.exists()
        state = torch.load(self.best, map_location="cpu", weights_only=True) if chosen else self.network.state_dict()
        write_weights(self.path, state.get("model", state))
