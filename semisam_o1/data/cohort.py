"""A data set as a run uses it: templates, pool, validation and test cases."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor

from semisam_o1.data.findings import Fault, Problem
from semisam_o1.data.formats import format_of
from semisam_o1.data.grids import Grid, cropped
from semisam_o1.data.labels import read_label
from semisam_o1.data.no_data import Box, data_box, no_data
from semisam_o1.data.reader import ScanReader, meta_of
from semisam_o1.types import Case, DatasetError

LISTS = {"pool": "train.txt", "val": "val.txt", "test": "test.txt"}  # split -> the file that lists its cases


@dataclass(frozen=True, eq=False)
class Cohort:
    """A data set as a run uses it: the cases of each split, the class names, the cases set aside.

    Two are never equal, so that what takes long to find in one can be kept in memory (`functools.lru_cache`).

    Attributes:
        root: the data set's folder.
        templates: the cases whose labels are used for learning (``split`` is "template"), sorted by name; they are in
            no other split.
        pool, val, test: the usable cases; their labels, if any, are used only for metrics.
        classes: class number -> name, in order of the numbers, 0 being the background. The networks' channels have
            the same order.
        set_aside: unusable case -> reason.
        reader: how files are read.
        problems: all problems found, for `findings.table`.
        binary: all foreground classes are one.
        named: class number -> name as the data set says; None if it says none.
        find_no_data: whether scans are cropped to their data and the rest is not taken for tissue, see `no_data`.
        touched: case of the pool -> the label that a person gave for it in a run, see `review`.
    """

    root: Path
    templates: tuple[Case, ...]
    pool: tuple[Case, ...]
    val: tuple[Case, ...]
    test: tuple[Case, ...]
    classes: dict[int, str]
    set_aside: dict[str, str]
    reader: ScanReader = field(default_factory=ScanReader)
    problems: tuple[Problem, ...] = ()
    binary: bool = False
    named: Mapping[int, str] | None = None
    find_no_data: bool = True
    touched: Mapping[str, Path] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Including background."""
        return len(self.classes)

    @property
    def class_numbers(self) -> list[int]:
        """The class number of each channel of a network, ascending from 0; label files hold these numbers."""
        return sorted(self.classes)

    @property
    def cases(self) -> tuple[Case, ...]:
        """Every usable case: templates, pool, val, test."""
        return self.templates + self.pool + self.val + self.test

    @property
    def labelled(self) -> tuple[Case, ...]:
        """The cases with labels of people, and these labels: the templates, then the touched cases of the pool."""
        return self.templates + tuple(
            replace(case, label=self.touched[case.name]) for case in self.pool if case.name in self.touched
        )

    @property
    def untouched(self) -> tuple[Case, ...]:
        """The cases of the pool for which no person gave a label."""
        return tuple(case for case in self.pool if case.name not in self.touched)

    @property
    def unsaid_spacing(self) -> bool:
        """Whether voxels are assumed to be 1 mm because neither the files nor the user give a size."""
        return self.reader.spacing is None and not format_of(self.templates[0].image).has_geometry

    def without(self, failed: Mapping[str, str]) -> Cohort:
        """The cohort without the cases of ``failed`` (case -> reason), which are set aside. Templates stay."""
        pool, val, test = (tuple(case for case in self.split(part) if case.name not in failed) for part in LISTS)
        return replace(self, pool=pool, val=val, test=test, set_aside=self.set_aside | dict(failed))

    def none_left(self) -> DatasetError:
        """The error where a step has no scan to work on."""
        reasons = "; ".join(f"{name}: {why}" for name, why in list(self.set_aside.items())[:3])
        return DatasetError(f"No usable scan is left ({reasons}).")

    def with_reviewed(self, labels: Mapping[str, Path], rejected: Iterable[str] = ()) -> Cohort:
        """The cohort with what people gave in a run: ``labels``, case -> file, and scans that they ``rejected``.

        A label of a validation or test case is its truth, and never trains.
        """
        pool = {case.name for case in self.pool}
        val, test = (
            tuple(replace(case, label=labels.get(case.name, case.label)) for case in cases)
            for cases in (self.val, self.test)
        )
        touched = {name: path for name, path in labels.items() if name in pool}
        found = replace(self, val=val, test=test, touched=touched)
        return found.without({name: "rejected in review" for name in rejected if name in pool})

    def split(self, name: str) -> tuple[Case, ...]:
        """The cases of "pool", "val" or "test"."""
        if name not in LISTS:
            raise DatasetError(f"There is no split '{name}': choose one of {', '.join(LISTS)}.")
        return getattr(self, name)

    def case(self, name: str) -> Case:
        """The case of that name, templates included."""
        for case in self.cases:
            if case.name == name:
                return case
        if name in self.set_aside:
            raise DatasetError(f"{self.root} has no usable case '{name}': it was set aside: {self.set_aside[name]}.")
        near = difflib.get_close_matches(name, [*(case.name for case in self.cases), *self.set_aside], cutoff=0)
        raise DatasetError(f"the data set {self.root} has no case '{name}'; the nearest names: {', '.join(near)}.")

    def grid(self, case: Case) -> Grid:
        """The stored grid of a case's image: affine (4, 4), voxel index to RAS mm, and shape (H, W, D)."""
        return self.reader.grid(case.image)

    def data_box(self, case: Case) -> Box:
        """The part of a case's stored grid that the working space covers: the box of the voxels with data, or all."""
        if not self.find_no_data:
            return data_box(None, self.grid(case).shape)
        return box_of(self.reader, case.image)

    def label(self, case: Case, path: Path | None = None) -> torch.Tensor:
        """`label_volume` as (H, W, D) int64."""
        return self.label_volume(case, path).as_tensor()[0].long()

    def label_volume(self, case: Case, path: Path | None = None) -> MetaTensor:
        """A label on the case's stored grid, by default its own: (1, H, W, D), the channel of each voxel's class.

        Raises:
            DatasetError: the label cannot be used, or has a class that the cohort does not know.
        """
        path = path or case.label
        try:
            scan = self.reader.open(case.image)
            values = read_label(path, self.reader, scan, self.named).values
        except Fault as fault:
            raise DatasetError(f"{path}: {fault}") from fault
        return MetaTensor(torch.from_numpy(self.channels(values))[None].float(), meta=meta_of(scan.grid, path))

    def channels(self, values: np.ndarray) -> np.ndarray:
        """The channel (int64) of each class number in ``values``.

        Raises:
            DatasetError: a class number is none of the cohort's.
        """
        if self.binary:
            return (values > 0).astype(np.int64)
        numbers = np.array(self.class_numbers)
        found = np.searchsorted(numbers, values).clip(max=len(numbers) - 1)
        if (other := values[numbers[found] != values]).size:
            raise DatasetError(f"a label holds class {other[0]}; expected one of {', '.join(map(str, numbers[:9]))}.")
        return found

    @property
    def template_grids(self) -> list[Grid]:
        """The grids of the templates where they have data, which determine the working space."""
        return [cropped(self.grid(case), self.data_box(case)) for case in self.templates]


def box_of(reader: ScanReader, image: Path) -> Box:
    """The box of an image's voxels with data; found once in a process."""
    seen = image.stat()
    return _found_box(reader, image, seen.st_size, seen.st_mtime_ns)


@functools.lru_cache(maxsize=10_000)
def _found_box(reader: ScanReader, image: Path, size: int, changed_ns: int) -> Box:
    """`data_box` of an image; ``size`` and ``changed_ns`` make a changed file another one."""
    volume = reader.volume(image)[0].numpy()
    return data_box(no_data(volume), volume.shape)
