"""Dice of round 0 on scans of the pool that lie turned, which their headers do not tell.

    python -m benchmarks turned [DIR] [--cases N] [--pool N] [--only TEXT ...] [--table FILE] [--work FOLDER]

Without DIR: synthetic data. Each drawn scan is copied with its content turned: by 90 and 180 degrees about each axis,
and twice by a random angle about a random axis. A copy's header names the axes of the original. The first pass labels
originals and copies together. In label fusion each scan is in the pool once: the copies of one kind of turn, and the
originals of the scans that were not drawn. With ``--only``: the kinds of turns whose names start so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from benchmarks.pools import (
    Rows,
    Scan,
    dice_of,
    drawn,
    empty_store,
    fill,
    label_in,
    pool_options,
    propagated,
    read_scan,
    work_folder,
    write_copy,
)
from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.phantoms import write_demo_data
from semisam_o1.tables import TEXT

COLUMNS = dict.fromkeys(("set", "template", "case", "kind"), TEXT) | {
    "degrees": ".0f",
    "unturned": ".4f",
    "turned": ".4f",
}
AXES = ("left-right", "back-front", "foot-head")
RANDOM = 2  # random turns of each scan
ANGLES = (20, 180)  # degrees, the range of random turns
SEED = 0


def options(parser) -> None:
    pool_options(parser)
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="kinds of turns whose names start so")


def right_turned(scan: Scan, axis: int, times: int) -> Scan:
    """The content turned ``times`` by 90 degrees about a stored axis; voxels are only moved."""
    plane = [(axis + 1) % 3, (axis + 2) % 3]
    spacing = np.linalg.norm(scan.affine[:3, :3], axis=0)
    if times % 2:
        spacing[plane] = spacing[plane[::-1]]
    image, label = (np.ascontiguousarray(np.rot90(values, times, plane)) for values in (scan.image, scan.label))
    return Scan(image, label, same_axes(scan, image.shape, spacing))


def rotated(scan: Scan, rotation: np.ndarray) -> Scan:
    """The content turned by ``rotation`` (3, 3) of the stored axes about the middle, on a grid that holds all of it."""
    spacing = np.linalg.norm(scan.affine[:3, :3], axis=0)
    extent = np.array(scan.image.shape) * spacing
    shape = np.ceil(np.abs(rotation) @ extent / spacing - 1e-6).astype(int)
    middle = (extent - spacing) / 2
    to_original = sitk.AffineTransform(3)
    to_original.SetMatrix(rotation.T.flatten().tolist())
    to_original.SetCenter(middle.tolist())

    def resampled(values: np.ndarray, method: int, outside: float) -> np.ndarray:
        image = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
        image.SetSpacing(spacing.tolist())
        start = (middle - (shape - 1) / 2 * spacing).tolist()
        grid = (start, spacing.tolist(), np.eye(3).flatten().tolist())
        found = sitk.Resample(image, shape.tolist(), to_original, method, *grid, outside)
        return sitk.GetArrayFromImage(found).T

    image = resampled(scan.image.astype(np.float32), sitk.sitkLinear, float(scan.image.min()))
    label = resampled(scan.label.astype(np.int16), sitk.sitkNearestNeighbor, 0)
    return Scan(image, label, same_axes(scan, shape, spacing))


def same_axes(scan: Scan, shape: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """The affine of another grid with the scan's axes and middle."""
    affine = scan.affine.copy()
    affine[:3, :3] *= spacing / np.linalg.norm(scan.affine[:3, :3], axis=0)
    middle = scan.affine[:3, :3] @ ((np.array(scan.image.shape) - 1) / 2)
    affine[:3, 3] += middle - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def turns(scan: Scan, draw: np.random.RandomState) -> Iterator[tuple[str, float, Scan]]:
    """Name, degrees and copy of each kind of turn."""
    stored = np.argsort(nibabel.io_orientation(scan.affine)[:, 0])  # the stored axis nearest to each anatomical one
    for times in (1, 2):
        for name, axis in zip(AXES, stored):
            yield f"{90 * times} degrees, {name}", 90 * times, right_turned(scan, int(axis), times)
    for number in range(RANDOM):
        axis, degrees = draw.randn(3), draw.uniform(*ANGLES)
        turn = Rotation.from_rotvec(np.radians(degrees) * axis / np.linalg.norm(axis)).as_matrix()
        yield f"random {number + 1}", degrees, rotated(scan, turn)


def run(options) -> None:
    with work_folder(options) as folder:
        root = Path(options.dataset_dir or write_demo_data(folder / "data"))
        cohort = open_cohort(root, check=False)
        pool = drawn([case for case in cohort.pool if case.label], options.pool)
        chosen = drawn(pool, options.cases)
        copies, degrees = {}, {}  # kind of turn -> case -> copy; copy -> degrees
        for number, case in enumerate(chosen):
            for kind, angle, scan in turns(read_scan(cohort, case), np.random.RandomState(SEED + number)):
                if not kind.startswith(tuple(options.only)):
                    continue
                copy = write_copy(folder, cohort, case, f"{case.name} {kind}", scan)
                copies.setdefault(kind, {})[case], degrees[copy.name] = copy, angle
        others = [case for case in pool if case not in chosen]
        mixed = [*pool, *(copy for made in copies.values() for copy in made.values())]
        cohort = replace(cohort, pool=tuple(mixed))
        store = empty_store(folder / "features", cohort, options.voxels)
        fill(store, cohort, [*cohort.templates, *mixed], store.spacing)
        groups = [([*made.values()], [*made.values(), *others]) for made in copies.values()]
        propagated(store, cohort, [(chosen, pool), *groups], folder / "run")

        template = cohort.templates[0].name
        table = Rows(options.table, COLUMNS, list(COLUMNS)[:4])
        dice = {case.name: dice_of(label_in(folder / "run", cohort, case), case, cohort) for case in mixed}
        print(f"\n{len(chosen)} scans of a pool of {len(pool)}, template {template}")
        print(f"{'case':24}{'turn':28}{'degrees':>8}{'unturned':>10}{'turned':>8}")
        for kind, made in copies.items():
            rows = []
            for case, copy in made.items():
                figures = (degrees[copy.name], dice[case.name], dice[copy.name])
                rows.append(dict(zip(COLUMNS, (root.resolve().name, template, case.name, kind, *figures))))
                print(f"{case.name[:23]:24}{kind:28}{figures[0]:8.0f}{figures[1]:10.3f}{figures[2]:8.3f}", flush=True)
            table.add(rows)
            means = [np.mean([row[column] for row in rows]) for column in ("unturned", "turned")]
            print(f"{'mean':24}{kind:36}{means[0]:10.3f}{means[1]:8.3f}", flush=True)
