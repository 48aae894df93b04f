"""What round 0 gives a class that lies outside of a scan's field of view.

    python -m benchmarks cropped [DIR] [--cases N] [--pool N] [--table FILE] [--work FOLDER]

Without DIR: synthetic data. Each drawn scan is copied and cropped along one axis, just beyond one of its classes.
Round 0 labels the originals, and a pool of the copies and the originals that were not drawn. Voxels given to the class
that is outside are wrong. Dice of the classes that are still there is compared with that of the original's label within
the same part of the scan. A class is emptied if it is there and the label has no voxel of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.pools import (
    Rows,
    Scan,
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
from semisam_o1.tables import COUNT, TEXT

COLUMNS = dict.fromkeys(("set", "template", "case", "kind"), TEXT) | {
    "class": COUNT,  # that is outside
    "kept": ".3f",  # share of the scan
    "voxels": COUNT,  # given to the class that is outside
    "dice": ".4f",  # of the classes that are there
    "uncropped": ".4f",
    "there": COUNT,  # classes that are there
    "emptied": COUNT,
}
MOST = 0.5  # of the scan that may be cut off

options = pool_options


class Cut(NamedTuple):
    """A part of a scan, a slice for each axis, without the class of a channel; other classes lose ``lost`` voxels."""

    channel: int
    part: tuple[slice, ...]
    lost: int


def best_cut(label: np.ndarray) -> Cut | None:
    """The cut that takes away a class and the fewest voxels of others; None if each loses more than `MOST`."""
    found = []
    for channel in there(label):
        for axis, n in enumerate(label.shape):
            places = np.nonzero((label == channel).any(tuple({0, 1, 2} - {axis})))[0]
            for kept in (slice(places[-1] + 1, n), slice(0, places[0])):
                length = kept.stop - kept.start
                part = tuple(kept if a == axis else slice(0, m) for a, m in enumerate(label.shape))
                if length >= (1 - MOST) * n:
                    lost = int((label > 0).sum() - (label == channel).sum() - (label[part] > 0).sum())
                    found.append((lost, -length / n, Cut(channel, part, lost)))
    return min(found, key=lambda row: row[:2])[2] if found else None


def there(label: np.ndarray) -> list[int]:
    """The channels of the foreground classes that a label has."""
    return [int(channel) for channel in np.unique(label) if channel > 0]


def cropped(scan: Scan, part: tuple[slice, ...]) -> Scan:
    """A part of a scan, in its place."""
    affine = scan.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [kept.start for kept in part]
    return Scan(scan.image[part], scan.label[part], affine)


def dice_over(label: np.ndarray, truth: np.ndarray, channels: Iterable[int]) -> float | None:
    """Mean Dice of some classes; None without any."""
    pairs = [(label == channel, truth == channel) for channel in channels]
    return float(np.mean([2 * (p & t).sum() / (p.sum() + t.sum()) for p, t in pairs])) if pairs else None


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def run(options) -> None:
    with work_folder(options) as folder:
        root = Path(options.dataset_dir or write_demo_data(folder / "data"))
        cohort = open_cohort(root, check=False)
        pool = drawn([case for case in cohort.pool if case.label], options.pool)
        cuts, copies = {}, {}  # by case
        for case in drawn(pool, options.cases):
            scan = read_scan(cohort, case)
            if cut := best_cut(scan.label):
                cuts[case] = cut
                copies[case] = write_copy(folder, cohort, case, f"{case.name} cropped", cropped(scan, cut.part))
            else:
                print(f"{case.name}: no class can be cut off without half of the scan")
        mixed = [*copies.values(), *(case for case in pool if case not in copies)]
        cohort = replace(cohort, pool=(*pool, *copies.values()))
        store = empty_store(folder / "features", cohort, options.voxels)
        fill(store, cohort, [*cohort.templates, *cohort.pool], store.spacing)
        propagated(store, cohort, [(pool, pool), ([*copies.values()], mixed)], folder / "run")

        template, rows = cohort.templates[0].name, []
        labels = {case: label_in(folder / "run", cohort, case).numpy() for case in cohort.pool}
        print(f"\n{len(copies)} scans of a pool of {len(pool)}, template {template}")
        print(f"{'case':24}{'outside':>8}{'kept':>7}{'voxels':>8}{'others':>8}{'uncropped':>10}{'emptied':>8}")
        for case, copy in copies.items():
            found, truth, cut = labels[copy], cohort.label(copy).numpy(), cuts[case]
            share, voxels = truth.size / labels[case].size, int((found == cut.channel).sum())
            dice, before = (dice_over(label, truth, there(truth)) for label in (found, labels[case][cut.part]))
            gone = len(set(there(truth)) - set(there(found)))
            number = cohort.class_numbers[cut.channel]
            rows.append((case.name, "cropped", number, share, voxels, dice, before, len(there(truth)), gone))
            figures = "".join(
                f"{'-' if value is None else f'{value:.3f}':>{n}}" for value, n in ((dice, 8), (before, 10))
            )
            print(f"{case.name[:23]:24}{number:8}{share:7.2f}{voxels:8}{figures}{gone:8}", flush=True)
        emptied = 0
        for case in pool:
            known = there(cohort.label(case).numpy())
            gone = len(set(known) - set(there(labels[case])))
            emptied += gone
            rows.append((case.name, "original", *[None] * 5, len(known), gone))
        print(
            f"originals: {emptied} of {sum(row[-2] for row in rows[len(copies) :])} classes that are there are emptied"
        )
        table = Rows(options.table, COLUMNS, list(COLUMNS)[:4])
        table.add(dict(zip(COLUMNS, (root.resolve().name, template, *row))) for row in rows)
