"""Handlers that log progress and write results to disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.handlers import CheckpointLoader
from monai.utils import CommonKeys as Keys
from torch import nn

from semisam_o1 import processes
from semisam_o1.data.export import write_label, write_share, write_weights
from semisam_o1.data.grids import Grid, slabs, to_grid
from semisam_o1.data.reader import ScanReader
from semisam_o1.data.transforms import keep_largest
from semisam_o1.files import WorkFiles, atomic_write
from semisam_o1.runfolder import PredictionFolder, RunFolder, uncertainty_table
from semisam_o1.tables import CaseTable
from semisam_o1.types import Affine, Case
from semisam_o1.uncertainty import predictive_entropy
from semisam_o1.weights import check_weights, read_checkpoint

log = logging.getLogger("semisam_o1")


class ItemProgress:
    """Handler: logs one line per volume, to show the progress of long work."""

    def __init__(self, what: str):
        self.what = what

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        batch = engine.state.batch
        name = batch["case"][0] if isinstance(batch, dict) else batch.name
        log.info("%s %d of %d: %s", self.what, engine.state.iteration, engine.state.epoch_length, name)


class PredictionSaver:
    """Handler of a MONAI evaluator: writes a label and an uncertainty map in the scan's own geometry.

    Logits are (members, C, h, w, d), with one member or an ensemble. The mean over the members is the prediction.

    Args:
        cases: the cases that may occur.
        label: case name -> path of its label; uncertainty_map: case name -> path of its uncertainty map.
        table: receives the mean uncertainty of each volume.
        uncertainty: the measure, see the module `uncertainty`; each voxel's depends on that voxel alone.
        kept: receives the probabilities of pool scans, on the grid of the network's input.
        over_padding: as published, take the mean uncertainty over the network's input, including the even padding that
            the inferer may return; else over the scan.
        largest_component: the classes to reduce to their largest component.
        reader: how scans are read.
        class_numbers: the class number of each channel; None: 0, 1, 2, ...
        writing: how label and map are written: path -> context of a temporary path.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        label: Callable[[str], Path],
        uncertainty_map: Callable[[str], Path],
        table: CaseTable,
        uncertainty: Callable[[torch.Tensor], torch.Tensor] = predictive_entropy,
        kept: WorkFiles | None = None,
        over_padding: bool = False,
        largest_component: Sequence[int] = (),
        reader: ScanReader | None = None,
        class_numbers: Sequence[int] | None = None,
        writing: Callable[[Path], AbstractContextManager[Path]] = atomic_write,
    ):
        self.writing = writing
        self.cases = {case.name: case for case in cases}
        self.label, self.uncertainty_map, self.table, self.kept = label, uncertainty_map, table, kept
        self.largest_component, self.reader, self.numbers = largest_component, reader or ScanReader(), class_numbers
        self.uncertainty, self.over_padding = uncertainty, over_padding
        self.found: dict[str, dict[str, float]] = {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        self.found = {}

    def save(self, engine: Engine) -> None:
        (name,) = engine.state.batch["case"]
        case = self.cases[name]
        grid = self.reader.grid(case.image)
        affine = np.asarray(engine.state.batch[Keys.IMAGE].affine, float).reshape(-1, 4, 4)[0]
        logits = engine.state.output[Keys.PRED]
        logits = logits.as_tensor() if hasattr(logits, "as_tensor") else logits
        seen = logits.float().softmax(1).cpu()
        inner = middle(seen, engine.state.batch[Keys.IMAGE].shape[2:])
        if self.kept is not None and case.split == "pool":
            self.kept.save(name, {"probabilities": inner.mean(0)}, {"affine": affine})
        label, uncertainty = self.on_grid(inner, affine, grid)
        mean = (self.uncertainty(seen) if self.over_padding else uncertainty).mean()
        self.found[name] = {"uncertainty": float(mean)}
        label = label if self.numbers is None else torch.as_tensor(self.numbers)[label]
        label = keep_largest(label, self.largest_component)[0]
        with self.writing(self.label(name)) as aside:
            write_label(aside, label.numpy(), case.image, grid)
        with self.writing(self.uncertainty_map(name)) as aside:
            write_share(aside, uncertainty.numpy(), case.image, grid)

    def on_grid(self, inner: torch.Tensor, affine: Affine, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """Label (1, H, W, D) of channels and uncertainty (H, W, D) on ``grid``, part by part: see `slabs`."""
        labels, uncertainties = [], []
        for _, part in slabs(grid, inner.shape[0] * inner.shape[1]):
            members = torch.stack([to_grid(member, affine, part).clamp(0, 1) for member in inner])
            uncertainties.append(self.uncertainty(members))
            labels.append(members.mean(0).argmax(0, keepdim=True))
        return torch.cat(labels, 1), torch.cat(uncertainties)

    def completed(self, engine: Engine) -> None:
        earlier = {name: row for name, row in self.table.read().items() if name not in self.cases}
        self.table.write(earlier | self.found)


def middle(volume: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """Remove even padding from (..., H, W, D), leaving ``sides``; the smaller half of the padding comes first."""
    begins = [(n - side) // 2 for n, side in zip(volume.shape[-3:], sides)]
    x, y, z = (slice(begin, begin + side) for begin, side in zip(begins, sides))
    return volume[..., x, y, z]


def round_predictions(cases: Sequence[Case], output_dir: str | Path, round: int, **settings) -> PredictionSaver:
    """A `PredictionSaver` for a round of the run ``output_dir``; also keeps the pool's probabilities."""
    folder = RunFolder(output_dir).round(round)
    places = (folder.prediction, folder.uncertainty_map, folder.uncertainty)
    return PredictionSaver(cases, *places, kept=folder.work("predicted"), **settings)


def copy_predictions(cases: Sequence[Case], output_dir: str | Path, round: int, **settings) -> PredictionSaver:
    """A `PredictionSaver` for copies of the template, with the channel of each voxel's class; see `copies_engine`."""
    folder = RunFolder(output_dir).round(round).work("copies").folder
    maps = PredictionFolder(folder)
    if (numbers := settings.pop("class_numbers", None)) is not None:
        settings["largest_component"] = [list(numbers).index(n) for n in settings.get("largest_component", ())]
    return PredictionSaver(
        cases, RunFolder(output_dir).round(round).copy, maps.uncertainty_map, uncertainty_table(folder), **settings
    )


def new_predictions(cases: Sequence[Case], output_dir: str | Path, **settings) -> PredictionSaver:
    """A `PredictionSaver` for ``output_dir``/labels and /uncertainty, for scans that belong to no run."""
    folder = PredictionFolder(output_dir)
    folder.claim(cases)
    places = (folder.label, folder.uncertainty_map, folder.uncertainty)
    return PredictionSaver(cases, *places, writing=folder.ledger.writing, **settings)


def round_weights(network: nn.Module, output_dir: str | Path, round: int, device: str = "cpu") -> CheckpointLoader:
    """MONAI's `CheckpointLoader` for the final model of a round of the run ``output_dir``.

    Round 0 has no model; the caller checks for that.
    """
    return trained_weights(RunFolder(output_dir).round(round).model, network, device)


def previous_weights(network: nn.Module, output_dir: str | Path, round: int, device: str = "cpu") -> CheckpointLoader:
    """`round_weights` of the round before ``round``."""
    return round_weights(network, output_dir, round - 1, device)


def trained_weights(path: str | Path, network: nn.Module, device: str = "cpu") -> CheckpointLoader:
    """MONAI's `CheckpointLoader` for the weights of a trained model, which are checked first.

    Raises:
        FileNotFoundError, UserError: there is no such file, or it holds no weights of this network.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no trained model {path}.")
    check_weights(network, path, "the trained network")
    return CheckpointLoader(str(path), {"model": network}, map_location=torch.device(device))


def attached(handler):
    """Return ``handler``. A config needs it to list a handler with an id among handlers given as dictionaries."""
    return handler


class PublishedValidation:
    """Handler of a trainer: validates every ``interval`` iterations and keeps the best weights, as published.

    Of several processes, the first does this, and the others wait.

    Weights are kept if their metric exceeds the best so far, which starts at 0; of equal ones the first is kept. They
    are written to ``round{r}_iter{i}_dice{metric}.pth`` and ``round{r}_best.pth``. If none are kept, the round uses
    its last weights.

    Args:
        validator: a MONAI evaluator with a key metric. network: the network whose weights are kept.
        output_dir, round: the run's folder and the round.
    """

    def __init__(self, validator, network: nn.Module, output_dir: str | Path, round: int, interval: int = 200):
        self.validator, self.network, self.interval, self.round = validator, network, interval, round
        self.folder = RunFolder(output_dir).round(round).path
        self.best, self.kept_iteration = 0.0, 0

    def attach(self, engine: Engine) -> None:
        if processes.number() == 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self)

    def __call__(self, engine: Engine) -> None:
        self.validator.run()
        found = float(self.validator.state.metrics[self.validator.state.key_metric_name])
        log.info("iteration %d: validation %.4f, best so far %.4f", engine.state.iteration, found, self.best)
        if found > self.best:
            self.best, self.kept_iteration = found, engine.state.iteration
            for name in (f"round{self.round}_iter{self.kept_iteration}_dice{found:.4f}.pth", self.best_file.name):
                write_weights(self.folder / name, self.network.state_dict())

    @property
    def best_file(self) -> Path:
        """The file of the best weights."""
        return self.folder / f"round{self.round}_best.pth"

    def state_dict(self) -> dict:
        return {"best": self.best, "kept_iteration": self.kept_iteration}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.kept_iteration = state["best"], state["kept_iteration"]


class CopySaver:
    """Handler of a trainer: writes ``round{r}_iter{i}.pth`` every ``interval`` iterations, as published."""

    def __init__(self, network: nn.Module, output_dir: str | Path, round: int, interval: int = 3000):
        self.network, self.round, self.interval = network, round, interval
        self.folder = RunFolder(output_dir).round(round).path

    def attach(self, engine: Engine) -> None:
        if processes.number() == 0:
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self)

    def __call__(self, engine: Engine) -> None:
        path = self.folder / f"round{self.round}_iter{engine.state.iteration}.pth"
        write_weights(path, self.network.state_dict())


class WeightsSaver:
    """Handler: writes the weights of ``network`` as a plain ``state_dict``, the round's model, after training.

    If ``best`` names an existing file beside it (the state selected by validation, preset `paper`), writes those
    weights instead.
    """

    def __init__(self, network: nn.Module, output_dir: str | Path, round: int, best: str | None = None):
        folder = RunFolder(output_dir).round(round)
        self.network, self.path = network, folder.model
        self.best = folder.path / best if best else None

    def attach(self, engine: Engine) -> None:
        if processes.number() == 0:
            engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        chosen = self.best is not None and self.best.exists()
        state = read_checkpoint(self.best) if chosen else self.network.state_dict()
        write_weights(self.path, state.get("model", state))
