"""Handlers that show how far work is and put results on disk."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys
from torch import nn

from semisam_o1.export import write_entropy, write_label, write_weights
from semisam_o1.files import WorkFiles, write_text
from semisam_o1.refinement import entropy
from semisam_o1.transforms import case_grid, keep_largest, to_grid
from semisam_o1.types import Case

log = logging.getLogger("semisam_o1")


class UncertaintyList:
    """case -> mean entropy of its volume, kept as a CSV beside the labels it speaks of, the most uncertain first."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def write(self, values: dict[str, float]) -> None:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["case", "uncertainty"])
        rows.writerows([name, f"{u:.6f}"] for name, u in sorted(values.items(), key=lambda row: (-row[1], row[0])))
        write_text(self.path, text.getvalue())

    def read(self) -> dict[str, float]:
        with open(self.path, encoding="utf-8", newline="") as file:
            return {row["case"]: float(row["uncertainty"]) for row in csv.DictReader(file)}


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
    """Handler of a MONAI evaluator: logits (1, C, h, w, d) to a label and an entropy map in the scan's own geometry.

    Args:
        cases: those that may come, by name.
        output_dir: gets ``predictions/``, ``uncertainty/`` and ``uncertainty.csv`` (mean entropy over the volume), and
            with ``keep`` in ``work/predicted/`` the pool's probabilities where the network saw them.
        one_piece: classes of which the largest component alone is kept.
        hdf5_key, hdf5_spacing: see `transforms.HDF5Reader`.
        labels, maps: names of the two folders.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        output_dir: str | Path,
        hdf5_key: str = "image",
        hdf5_spacing=None,
        labels: str = "predictions",
        maps: str = "uncertainty",
        keep: bool = False,
        one_piece: Sequence[int] = (),
    ):
        self.one_piece = one_piece
        self.kept = WorkFiles(output_dir, "predicted") if keep else None
        self.cases, self.folder = {case.name: case for case in cases}, Path(output_dir)
        self.hdf5 = (hdf5_key, hdf5_spacing)
        self.labels, self.maps, self.uncertainty = labels, maps, {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        self.uncertainty = {}

    def save(self, engine: Engine) -> None:
        (name,) = engine.state.batch["case"]
        case = self.cases[name]
        grid = case_grid(case, *self.hdf5)
        affine = np.asarray(engine.state.batch[Keys.IMAGE].affine, float).reshape(-1, 4, 4)[0]
        logits = engine.state.output[Keys.PRED]
        logits = logits.as_tensor() if hasattr(logits, "as_tensor") else logits
        seen = logits[0].float().softmax(0).cpu()
        if self.kept is not None and case.split == "pool":
            self.kept.save(name, {"probabilities": seen}, {"affine": affine})
        probabilities = to_grid(seen, affine, grid).clamp(0, 1)
        doubt = entropy(probabilities)
        self.uncertainty[name] = float(doubt.mean())
        label = keep_largest(probabilities.argmax(0, keepdim=True), self.one_piece)[0]
        write_label(self.folder / self.labels / f"{name}.nii.gz", label.numpy(), case.image, grid)
        target = self.folder / self.maps / f"{name}.nii.gz"
        write_entropy(target, doubt.numpy(), len(probabilities), case.image, grid)

    def completed(self, engine: Engine) -> None:
        UncertaintyList(self.folder / "uncertainty.csv").write(self.uncertainty)


class WeightsSaver:
    """Handler: the weights of ``network`` as a plain ``state_dict`` at ``path`` when training has ended.

    Where ``best`` names a file that exists (the state which validation chose, preset `paper`), its weights instead.
    """

    def __init__(self, network: nn.Module, path: str | Path, best: str | Path | None = None):
        self.network, self.path, self.best = network, Path(path), best and Path(best)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        chosen = self.best is not None and self.best.exists()
        state = torch.load(self.best, map_location="cpu", weights_only=True) if chosen else self.network.state_dict()
        write_weights(self.path, state.get("model", state))
