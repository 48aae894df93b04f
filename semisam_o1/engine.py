"""The refinement between rounds as an Ignite engine, and the handlers that put results on disk."""

from __future__ import annotations

import csv
import io
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys
from torch import nn

from semisam_o1.datasets import Cohort
from semisam_o1.export import write_entropy, write_label, write_weights
from semisam_o1.features import FeatureStore
from semisam_o1.files import write_text
from semisam_o1.refinement import entropy, mean_dice, uncertain, volume_votes, vote_labels
from semisam_o1.transforms import case_grid, read_volume, to_grid
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


def refinement_engine(
    store: FeatureStore,
    cohort: Cohort,
    round_dir: str | Path,
    knn_k: int = 5,
    uncertainty_quantile: float = 0.9,
    guard: str | Path | None = None,
    handlers: Sequence = (),
) -> Engine:
    """An engine that runs over the pool and writes ``round_dir/labels``: predictions, those unsure put to the vote.

    The published, volume-level refinement: see `refinement.uncertain`, `volume_votes`, `vote_labels`. Templates are
    certain and vote with their own labels. ``engine.state.replaced`` names the cases whose label changed.

    Where ``guard`` names the folder of round 0's labels, a vote that agrees less with the template carried there than
    the prediction does is turned down: unaligned votes blur anatomy, and one bad label in ten spoils a round.
    """
    folder = Path(round_dir)
    uncertainty = UncertaintyList(folder / "uncertainty.csv").read()
    pool = [case for case in cohort.pool if case.name in uncertainty]
    voters = list(cohort.templates) + pool
    descriptors = store.descriptors(case.name for case in voters)
    unsure = uncertain([uncertainty[case.name] for case in pool], uncertainty_quantile)
    certain = np.concatenate([np.ones(len(cohort.templates), bool), ~unsure])

    def label_of(case: Case, predictions: Path = folder / "predictions") -> torch.Tensor:
        path = case.label if case in cohort.templates else predictions / f"{case.name}.nii.gz"
        return read_volume(path, "label", cohort.hdf5_spacing).as_tensor()[0]

    def process(engine: Engine, case: Case) -> dict:
        place = voters.index(case)
        source, target = folder / "predictions" / f"{case.name}.nii.gz", folder / "labels" / f"{case.name}.nii.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        found, weights = volume_votes(descriptors, certain, descriptors[place], knn_k)
        if certain[place] or not len(found):
            shutil.copyfile(source, target)
            return {"case": case.name, "replaced": False}
        grid = cohort.grid(case)
        label = vote_labels([label_of(voters[i]) for i in found], weights, grid.shape, cohort.num_classes)
        if guard is not None:
            carried = label_of(case, Path(guard))
            if mean_dice(label, carried, cohort.num_classes) < mean_dice(label_of(case), carried, cohort.num_classes):
                shutil.copyfile(source, target)
                return {"case": case.name, "replaced": False}
        write_label(target, label.numpy(), case.image, grid)
        engine.state.replaced.append(case.name)
        return {"case": case.name, "replaced": True}

    engine = Engine(process)

    @engine.on(Events.STARTED)
    def clear(engine: Engine) -> None:
        engine.state.replaced = []
        if certain.sum() < knn_k:
            log.info("refinement: %d certain volumes, fewer than knn_k = %d: labels left alone", certain.sum(), knn_k)

    for handler in handlers:
        handler.attach(engine)
    return engine


class PredictionSaver:
    """Handler of a MONAI evaluator: logits (1, C, h, w, d) to a label and an entropy map in the scan's own geometry.

    Args:
        cases: those that may come, by name.
        output_dir: gets ``predictions/``, ``uncertainty/`` and ``uncertainty.csv`` (mean entropy over the volume).
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
    ):
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
        probabilities = to_grid(logits[0].float().softmax(0).cpu(), affine, grid).clamp(0, 1)
        doubt = entropy(probabilities)
        self.uncertainty[name] = float(doubt.mean())
        write_label(self.folder / self.labels / f"{name}.nii.gz", probabilities.argmax(0).numpy(), case.image, grid)
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
