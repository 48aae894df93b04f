"""What the benchmarks of round 0 share: drawn cases, their features and labels, Dice, and a table that can continue."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import torch
from monai.utils import CommonKeys as Keys

from semisam_o1.data.class_sizes import choose_feature_spacing
from semisam_o1.data.cohort import Cohort
from semisam_o1.data.intensities import HAS_DATA
from semisam_o1.data.transforms import image_chain
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.features import FeatureStore, TokenInferer
from semisam_o1.report.overlap import mean_dice
from semisam_o1.round_0 import propagation
from semisam_o1.round_0.engines import first_pass_engine, label_fusion_engine
from semisam_o1.round_0.places import is_turned, turn_between
from semisam_o1.runfolder import RunFolder
from semisam_o1.tables import read_rows, write_rows
from semisam_o1.types import Case

DRAW = 4  # seed for drawing cases
SEED = 1337  # seed of the propagation, the default of a run
FINER = 3  # times as many voxels, at most, where a small class needs them; the default of a run
DEFAULT = partial(propagation.nearest, seed=SEED)


class Rows:
    """The rows of a CSV, found by the values of ``keys``. Without a path they are only held in memory."""

    def __init__(self, path: str | Path | None, columns: Mapping[str, str], keys: Sequence[str]):
        self.path, self.columns, self.keys = Path(path) if path else None, columns, keys
        self.held: dict[tuple, dict[str, Any]] = {}

    def read(self) -> dict[tuple, dict[str, Any]]:
        """The rows by their keys, those of other processes included."""
        if self.path and self.path.is_file():
            self.held = {tuple(row[key] for key in self.keys): row for row in read_rows(self.path, self.columns)}
        return self.held

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows, in place of those with the same keys. The file is replaced as a whole, so a kill leaves no half."""
        self.held = self.read() | {tuple(row[key] for key in self.keys): dict(row) for row in rows}
        if self.path:
            write_rows(self.path, self.columns, self.held.values())
            self.read()  # rounded, as whoever goes on finds them


class Scan(NamedTuple):
    """``image`` and ``label`` (H, W, D), the channel of each voxel's class, and ``affine`` (4, 4)."""

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray


def pool_options(parser) -> None:
    """The options of the benchmarks that spoil scans of a pool."""
    parser.add_argument("dataset_dir", nargs="?", metavar="DIR")
    parser.add_argument("--cases", type=int, default=4, help="largest number of scans to copy, drawn with a fixed seed")
    parser.add_argument("--pool", type=int, default=30, help="largest number of scans of the pool, drawn")
    parser.add_argument("--voxels", type=int, default=400000, help="of the working space")
    parser.add_argument("--table", metavar="FILE", help="CSV of the printed figures; rows are added or replaced")
    parser.add_argument("--work", metavar="FOLDER", help="keep features and first pass, so that a killed run goes on")


@contextlib.contextmanager
def work_folder(options) -> Iterator[Path]:
    """The folder of ``--work``, or one that is removed in the end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(options.work or name)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def drawn(cases: Sequence[Case], count: int, seed: int = DRAW) -> list[Case]:
    """At most ``count`` of the cases, drawn with a seed, in their order."""
    return [cases[i] for i in sorted(np.random.RandomState(seed).permutation(len(cases))[:count])]


def empty_store(folder: Path, cohort: Cohort, voxels: int = 400000) -> FeatureStore:
    """A store for features of `mind` in the working space that a run would choose."""
    return FeatureStore(folder, mind(), choose_feature_spacing(cohort, voxels, FINER))


def fill(store: FeatureStore, cohort: Cohort, cases: Sequence[Case], spacing: float) -> None:
    """Compute the features of the cases as a run does; those of oblique scans in their stored axes too."""
    templates = [cohort.grid(case).affine for case in cohort.templates]
    for case in store.missing(cases):
        oblique = any(is_turned(turn_between(cohort.grid(case).affine, template)) for template in templates)
        for frame in ("stored", "world") if oblique else ("world",):
            item = chain_of(cohort, spacing)(frame=frame)(case.item())
            held = item[HAS_DATA][None] if HAS_DATA in item else None
            tokens = TokenInferer()(item[Keys.IMAGE][None], store.encoder, has_data=held)
            affine = np.asarray(tokens.affine).reshape(-1, 4, 4)[0]
            store.frame(frame).save(case, tokens.as_tensor()[0], affine, cohort.grid(case))


def chain_of(cohort: Cohort, spacing: float) -> Callable:
    """``frame`` -> the transform from a scan's item to the working space."""
    return partial(image_chain, spacing, cohort.reader, find_no_data=cohort.find_no_data, keep_mask=True)


def pose_parts(cohort: Cohort, store: FeatureStore) -> dict[str, Callable]:
    """The arguments with which `first_pass_engine` looks for scans that lie turned."""
    return {"chain": chain_of(cohort, store.spacing), "inferer": TokenInferer()}


def write_copy(folder: Path, cohort: Cohort, case: Case, name: str, scan: Scan) -> Case:
    """Write a changed copy of a pool scan as NIfTI, with its label."""
    numbers = np.array(cohort.class_numbers)[scan.label]
    files = [folder / f"{name}_{part}.nii" for part in ("image", "label")]
    for file, values in zip(files, (scan.image.astype(np.float32), numbers.astype(np.int16))):
        nibabel.save(nibabel.Nifti1Image(values, scan.affine), file)
    return replace(case, name=name, image=files[0], label=files[1])


def read_scan(cohort: Cohort, case: Case) -> Scan:
    volume = cohort.reader.volume(case.image)
    return Scan(volume[0].numpy(), cohort.label(case).numpy(), np.asarray(volume.affine, float))


def propagated(
    store: FeatureStore, cohort: Cohort, groups: Sequence[tuple[Sequence[Case], Sequence[Case]]], folder: Path
) -> None:
    """Round 0 with its defaults, in the run ``folder``: the first pass of all, then label fusion group by group.

    A group is the cases to label and the pool in which their atlases are looked for. The vote near borders is decided
    once, for all.
    """
    cases = list({case.name: case for asked, pool in groups for case in (*asked, *pool)}.values())
    poses = pose_parts(cohort, store)
    first_pass_engine(store, cohort, DEFAULT, folder, guard=True, **poses).run(cases, epoch_length=len(cases))
    for asked, pool in groups:
        if asked:  # a data set may have no test list
            label_fusion_engine(store, cohort, pool, folder).run(asked, epoch_length=len(asked))


def propagated_dice(store, cohort: Cohort, cases: Sequence[Case], label_fusion: bool = True) -> np.ndarray:
    """True Dice of each case's label from the default propagation of the cohort's templates."""
    with tempfile.TemporaryDirectory() as name:  # a new folder, because an engine keeps existing results
        folder = Path(name)
        if label_fusion:
            propagated(store, cohort, [(cases, cases)], folder)
        else:
            poses = pose_parts(cohort, store)
            first_pass_engine(store, cohort, DEFAULT, folder, guard=True, **poses).run(cases, epoch_length=len(cases))
        return np.array([dice_of(label_in(folder, cohort, case), case, cohort) for case in cases])


def label_in(folder: Path, cohort: Cohort, case: Case) -> torch.Tensor:
    """A case's label of round 0 of the run ``folder``, (H, W, D) channels; background alone if the case failed."""
    path = RunFolder(folder).round(0).label(case.name)
    if not path.is_file():
        print(f"{case.name}: no label", flush=True)
        return torch.zeros_like(cohort.label(case))
    return cohort.label(case, path)


def dice_of(label: torch.Tensor, case: Case, cohort: Cohort) -> float:
    """Mean Dice over foreground classes; a class that neither label has counts as 1, as in a run's own figures."""
    return mean_dice(label, cohort.label(case), cohort.num_classes)
