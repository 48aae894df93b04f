"""A data set as a run uses it: templates, pool, validation and test cases."""

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
    """A data set as a run uses it: the cases of each split, the class names, the cases set aside.

    Attributes:
        root: the data set's folder.
        templates: the cases whose labels are used for learning (``split`` is "template"), sorted by name; they are in
            no other split.
        pool, val, test: the usable cases; their labels, if any, are used only for metrics.
        num_classes: including background.
        classes: a name for each class number, 0 being the background.
        set_aside: unusable case -> reason.
        hdf5_key: the HDF5 dataset of the image.
        hdf5_spacing: voxel size of HDF5 scans in mm: one number, three (stored axes), or None if unknown.
        problems: all problems found, for `findings.table`.
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
        """Whether voxels are assumed to be 1 mm because neither the files nor the user give a size."""
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
        why = f"it was set aside: {self.set_aside[name]}" if name in self.set_aside else "no list names it"
        raise DatasetError(f"{self.root} has no usable case '{name}': {why}.")

    def grid(self, case: Case) -> Grid:
        """The stored grid of a case's image: affine (4, 4), voxel index to RAS mm, and shape (H, W, D)."""
        return case_grid(case, self.hdf5_key, self.hdf5_spacing)

    @property
    def template_grids(self) -> list[Grid]:
        """The stored grids of the templates, which determine the working space."""
        return [self.grid(case) for case in self.templates]
