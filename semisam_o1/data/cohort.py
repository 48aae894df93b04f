"""A data set as a run sees it: which scan plays which part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from semisam_o1.data.findings import Problem
from semisam_o1.data.formats import case_grid, format_of
from semisam_o1.data.grids import Grid
from semisam_o1.types import Case, DatasetError

LISTS = {"pool": "train.txt", "val": "val.txt", "test": "test.txt"}  # split -> the file that lists its cases


@dataclass(frozen=True)
class Cohort:
    """A data set as a run sees it: which scan plays which part, what classes are called, what was left out.

    Attributes:
        root: the data set's folder.
        templates: the cases whose labels may be learnt from (``split`` is "template"), in no other split; by name.
        pool, val, test: the cases still usable; their labels, where they have one, only serve to measure.
        num_classes: background counted.
        classes: a name for each class number, 0 being the background.
        set_aside: the cases that cannot be used, each with the reason.
        hdf5_key: the HDF5 dataset that is the image.
        hdf5_spacing: voxel size in mm that HDF5 files lack: one number, three (stored axes), or unsaid.
        problems: all that was found, as `findings.table` prints it.
    """

    root: Path
    templates: tuple[Case, ...]
    pool: tuple[Case, ...]
    val: tuple[Case, ...]
    test: tuple[Case, ...]
    num_classes: int
    classes: dict[int, str]
    set_aside: dict[str, str]
    hdf5_key: str = "image"
    hdf5_spacing: float | tuple[float, ...] | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def cases(self) -> tuple[Case, ...]:
        """Every usable case: templates, pool, val, test."""
        return self.templates + self.pool + self.val + self.test

    @property
    def unsaid_spacing(self) -> bool:
        """Whether scans are taken to have voxels of 1 mm because neither files nor user say otherwise."""
        return self.hdf5_spacing is None and not format_of(self.templates[0].image).has_geometry

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
        why = f"it was set aside: {self.set_aside[name]}" if name in self.set_aside else "none of the lists names it"
        raise DatasetError(f"{self.root} has no usable case '{name}': {why}.")

    def grid(self, case: Case) -> Grid:
        """The stored grid of a case's image: affine (4, 4), voxel index to RAS mm, and shape (H, W, D)."""
        return case_grid(case, self.hdf5_key, self.hdf5_spacing)

    @property
    def template_grids(self) -> list[Grid]:
        """The stored grids of the templates, by which the working space is chosen."""
        return [self.grid(case) for case in self.templates]
