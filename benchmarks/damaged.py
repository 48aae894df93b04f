"""How well predicted_dice judges the labels of padded, clipped, blurred and noisy scans.

    python -m benchmarks damaged [DIR] [--cases N] [--pool N] [--table FILE] [--work FOLDER]

Without DIR: synthetic data. Each drawn scan is copied and damaged in five ways. Round 0 labels originals and copies. In
label fusion and in the calibration each scan is in the pool once: the copies of one kind of damage, and the originals
of the scans that were not drawn. A label of which the estimate says that it cannot tell has no predicted Dice and does
not count in the errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from benchmarks.pools import (
    DEFAULT,
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
from semisam_o1.data.transforms import image_chain
from semisam_o1.features import TokenInferer
from semisam_o1.round_0.calibration import calibrate
from semisam_o1.round_0.copy_maker import plans
from semisam_o1.round_0.engines import copies_engine
from semisam_o1.round_0.quality_estimate import QualityEstimate, copies_evidence
from semisam_o1.runfolder import CANNOT_TELL, RunFolder
from semisam_o1.tables import TEXT
from semisam_o1.types import Case

COLUMNS = dict.fromkeys(("set", "template", "case", "kind", "amount"), TEXT) | {
    "dice": ".4f",
    "predicted": ".4f",  # empty: cannot tell
    "low": ".4f",
    "high": ".4f",
    CANNOT_TELL: TEXT,
}
TEMPLATE_COPIES = 6  # the default of a run
CONSTANTS = (-1000.0, 0.0)  # that scanners and viewers pad with
MOST_PADDED, SATURATED, MOST_CUT = 0.25, 0.9, (0.1, 0.25)  # share of a side; quantile; share of one side
BLUR, NOISE = (1, 2), (0.2, 0.5)  # voxels; of the standard deviation
PLAIN = "as it is"
CLOSE = 0.1  # an error of predicted_dice that is small enough
SEED = 0

options = pool_options


def padded(scan: Scan, widths: Sequence[tuple[int, int]], constant: float) -> Scan:
    """The scan with ``widths`` voxels of a constant before and after, for each axis."""
    affine = scan.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ [before for before, _ in widths]
    return Scan(np.pad(scan.image, widths, constant_values=constant), np.pad(scan.label, widths), affine)


def cut(scan: Scan, axis: int, share: float, at_start: bool) -> Scan:
    """The scan without ``share`` of an axis, at its start or its end."""
    n, lost = scan.label.shape[axis], int(share * scan.label.shape[axis])
    kept = slice(lost, n) if at_start else slice(0, n - lost)
    part = tuple(kept if a == axis else slice(None) for a in range(3))
    affine = scan.affine.copy()
    affine[:3, 3] += affine[:3, axis] * kept.start
    return Scan(scan.image[part], scan.label[part], affine)


def damages(scan: Scan, draw: np.random.RandomState) -> Iterator[tuple[str, str, Scan]]:
    """Name, amount and copy of each kind of damage."""
    image = scan.image.astype(np.float32)
    ends = [[int(draw.uniform(0, MOST_PADDED) * n) for _ in range(2)] for n in image.shape]
    widths = [(before, after) for before, after in ends]
    constant = CONSTANTS[draw.randint(len(CONSTANTS))]
    sides = " ".join(f"{before}+{after}" for before, after in widths)
    yield "padded", f"{sides} voxels of {constant:g}", padded(scan, widths, constant)
    limit = float(np.quantile(image, SATURATED))
    yield "saturated", f"quantile {SATURATED:g}", scan._replace(image=np.minimum(image, limit))
    axis, share, at_start = draw.randint(3), draw.uniform(*MOST_CUT), bool(draw.randint(2))
    end = "start" if at_start else "end"
    yield "cut", f"{share:.2f} of axis {axis} at its {end}", cut(scan, axis, share, at_start)
    sigma = draw.uniform(*BLUR)
    yield "blurred", f"{sigma:.2f} voxels", scan._replace(image=gaussian_filter(image, sigma))
    noise = draw.uniform(*NOISE)
    added = noise * image.std() * draw.standard_normal(image.shape)
    yield "noisy", f"{noise:.2f} deviations", scan._replace(image=(image + added).astype(np.float32))


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Labels, their true and predicted Dice, errors, and the share that the estimate cannot tell, as one line."""
    told = [row for row in rows if row["predicted"] is not None]
    errors = np.array([abs(row["predicted"] - row["dice"]) for row in told])
    line = f"{len(rows):7}{np.mean([row['dice'] for row in rows]):8.3f}"
    if told:
        line += f"{np.mean([row['predicted'] for row in told]):11.3f}{errors.mean():12.3f}{errors.max():15.3f}"
        line += f"{(errors <= CLOSE).mean():14.2f}"
    else:
        line += f"{'-':>11}{'-':>12}{'-':>15}{'-':>14}"
    return line + f"{1 - len(told) / len(rows):13.2f}"


def run(options) -> None:
    with work_folder(options) as folder:
        root = Path(options.dataset_dir or write_demo_data(folder / "data"))
        cohort = open_cohort(root, check=False)
        pool = drawn([case for case in cohort.pool if case.label], options.pool)
        chosen = drawn(pool, options.cases)
        copies: dict[str, dict[Case, Case]] = {}  # kind of damage -> case -> copy
        amounts: dict[str, str] = {}  # by copy
        for number, case in enumerate(chosen):
            for kind, amount, scan in damages(read_scan(cohort, case), np.random.RandomState(SEED + number)):
                copy = write_copy(folder, cohort, case, f"{case.name} {kind}", scan)
                copies.setdefault(kind, {})[case], amounts[copy.name] = copy, amount
        others = [case for case in pool if case not in chosen]
        mixed = [*pool, *(copy for made in copies.values() for copy in made.values())]
        cohort = replace(cohort, pool=tuple(mixed))
        store = empty_store(folder / "features", cohort, options.voxels)
        fill(store, cohort, [*cohort.templates, *mixed], store.spacing)
        run_folder = RunFolder(folder / "run")
        groups = {PLAIN: (pool, pool)}
        groups |= {kind: ([*made.values()], [*made.values(), *others]) for kind, made in copies.items()}
        propagated(store, cohort, list(groups.values()), run_folder.path)

        def chain(frame):
            return image_chain(
                store.spacing, cohort.reader, frame=frame, find_no_data=cohort.find_no_data, keep_mask=True
            )

        todo = plans(run_folder.round(0).work("first"), [case.name for case in pool], TEMPLATE_COPIES)
        engine = copies_engine(store, cohort, pool, chain, TokenInferer(), DEFAULT, run_folder.path)
        engine.run(todo, epoch_length=len(todo))
        estimate, known = QualityEstimate(store, cohort, run_folder.path), copies_evidence(run_folder, 0)
        evidence = {case: estimate.evidence(case, run_folder.round(0).label(case.name)) for case in mixed}

        template = cohort.templates[0].name
        table = Rows(options.table, COLUMNS, list(COLUMNS)[:4])
        rows: dict[str, list[dict[str, Any]]] = {}
        print(f"\n{len(chosen)} scans of a pool of {len(pool)}, template {template}")
        print(f"{'case':24}{'damage':11}{'amount':36}{'Dice':>7}{'predicted':>11}")
        for kind, (asked, everyone) in groups.items():
            calibration = calibrate([evidence[case] for case in everyone], *known)
            for case in asked:
                found = calibration.predict(evidence[case]).row(cohort.class_numbers)
                dice = dice_of(label_in(run_folder.path, cohort, case), case, cohort)
                name = case.name.removesuffix(f" {kind}")
                figures = (dice, found["predicted_dice"], found["low"], found["high"], found[CANNOT_TELL])
                row = dict(zip(COLUMNS, (root.resolve().name, template, name, kind, amounts.get(case.name), *figures)))
                rows.setdefault(kind, []).append(row)
                told = f"{row['predicted']:11.3f}" if row["predicted"] is not None else f"   {row[CANNOT_TELL]}"
                print(f"{name[:23]:24}{kind:11}{(row['amount'] or '')[:35]:36}{dice:7.3f}{told}", flush=True)
            table.add(rows[kind])
        print(f"\n{'':12}{'labels':>7}{'Dice':>8}{'predicted':>11}{'mean error':>12}{'largest error':>15}", end="")
        print(f"{'within 0.1':>14}{'cannot tell':>13}")
        rows["all damaged"] = [row for kind in copies for row in rows[kind]]
        for kind, own in rows.items():
            print(f"{kind:12}{summary(own)}", flush=True)
