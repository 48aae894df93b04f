"""Dice and seconds of round 0, with each part left out and compared with registration, in one table.

    python -m benchmarks propagation [DIR] [--split test] [--cases N] [--template CASE] [--rivals [NAME ...]]
        [--rival-voxels N ...] [--ablation] [--only TEXT ...] [--table FILE]

Without DIR: synthetic data. The cases are drawn with a seed. Features have their own line. With --table, there is a row
for each case, and the same command goes on where it was killed: a method of which each case has a row is not run again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from benchmarks import rivals
from benchmarks.pools import DEFAULT, SEED, Rows, dice_of, drawn, empty_store, fill, label_in, pose_parts
from semisam_o1.data.cohort import Cohort
from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.phantoms import write_demo_data
from semisam_o1.features import FeatureStore
from semisam_o1.job.stopwatch import Stopwatch
from semisam_o1.round_0 import atlases, detail, displacement, propagation
from semisam_o1.round_0.engines import first_pass_engine, label_fusion_engine
from semisam_o1.tables import TEXT
from semisam_o1.types import Case

COLUMNS = {"set": TEXT, "template": TEXT, "method": TEXT, "case": TEXT, "dice": ".4f", "seconds": ".1f"}
KEYS = ("set", "template", "method", "case")
ALONE = ", first pass alone"


class Way(NamedTuple):
    """A way to label a pool: the first pass, and the label fusions on top of it by name; without any, it is alone.

    A fusion is its arguments and `atlases.STRAIGHT`, the weight of a scan's own label.
    """

    propagate: Callable = DEFAULT
    guard: bool = True
    turns: bool = True
    find_no_data: bool = True
    squeezed_cost: float = displacement.SQUEEZED_COST
    small: float = detail.SMALL
    fusions: Mapping[str, tuple[dict, float]] | None = None

    def methods(self, name: str) -> dict[str, tuple[dict, float] | None]:
        """The rows of the table: method -> its label fusion, None for the first pass alone."""
        fusions = {name: ({}, atlases.STRAIGHT)} if self.fusions is None else self.fusions
        return {name + ALONE: None, **fusions} if fusions else {name: None}


def without(**settings) -> Callable:
    return partial(propagation.nearest, seed=SEED, **settings)


FUSIONS = {f"{number} atlas{'es' * (number > 1)}": (dict(atlases=number), atlases.STRAIGHT) for number in (1, 3, 8)}
FUSIONS["the template's label counts once"] = ({}, 1.0)
PLAIN = {
    "default": Way(),
    "prototype": Way(propagation.prototype, fusions={}),
    "copy": Way(propagation.copy, fusions={}),
}
PARTS = {
    "default": Way(fusions={"default": ({}, atlases.STRAIGHT), **FUSIONS}),
    "no emphasis on the label": Way(without(emphasised=False)),
    "no alignment at full resolution": Way(without(sharp=False)),
    "no cost of squeezed places": Way(squeezed_cost=0.0),
    "small classes on tokens alone": Way(small=0.0),
    "no vote guard, vote always": Way(guard=False),
    "no vote at borders": Way(without(neighbours=0)),
    "no search for turned poses": Way(turns=False),
    "no find_no_data": Way(find_no_data=False),
    "no displacement": Way(without(deformation=False)),
    "no alignment": Way(without(alignment=False), fusions={}),
    "prototype, k = 32": Way(partial(propagation.prototype, k=32), fusions={}),
}


def options(parser) -> None:
    parser.add_argument("dataset_dir", nargs="?", metavar="DIR")
    parser.add_argument("--split", default="pool", choices=("pool", "val", "test"))
    parser.add_argument("--cases", type=int, default=12, help="largest number of cases, drawn with a fixed seed")
    parser.add_argument("--template", nargs="+", default=[], metavar="CASE")
    parser.add_argument("--voxels", type=int, default=400000, help="of the working space")
    parser.add_argument(
        "--rivals",
        nargs="*",
        choices=tuple(rivals.RIVALS),
        help="registration methods to compare (all); without names: none",
    )
    parser.add_argument(
        "--rival-voxels",
        nargs="+",
        type=int,
        default=[400000],
        metavar="N",
        help="rivals get scans of N isotropic voxels, and of their own voxel size, coarsened to at most N voxels",
    )
    parser.add_argument("--ablation", action="store_true", help="also leave out each part of the default in turn")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="methods whose names start so")
    parser.add_argument("--table", metavar="FILE", help="CSV of the Dice of each case, continued if it exists")
    parser.add_argument("--details", action="store_true", help="also print the Dice of each case")


def run(options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(options.dataset_dir or write_demo_data(Path(folder) / "data"))
        cohort = open_cohort(root, check=False, template=options.template)
        cases = drawn([case for case in cohort.split(options.split) if case.label], options.cases)
        bench = Bench(root.resolve().name, cohort, cases, Rows(options.table, COLUMNS, KEYS), options)
        print(f"\n{options.split}, {len(cases)} cases, template {bench.template}, {torch.get_num_threads()} threads")
        print(f"{'method':56}{'mean':>8}{'median':>8}{'worst':>8}{'s/scan':>8}{'MiB':>8}", flush=True)
        ways = PARTS | {name: PLAIN[name] for name in ("prototype", "copy")} if options.ablation else PLAIN
        for name, way in ways.items():
            squeezed = patch.object(displacement, "SQUEEZED_COST", way.squeezed_cost)
            with squeezed, patch.object(detail, "SMALL", way.small):
                own_methods(bench, name, way, Path(folder))
        wanted = rivals.RIVALS if options.rivals is None else options.rivals
        if wanted and not rivals.AVAILABLE:
            print("registration left out: ANTs and convexAdam come with pip install -c constraints.txt .[bench]")
            return
        for key in wanted:
            for grid, spacing in rivals.grids(cohort, options.rival_voxels).items():
                rival(bench, f"{rivals.RIVALS[key][0]}, {grid}", rivals.RIVALS[key][1], spacing)


class Bench(NamedTuple):
    """A data set's name, its cohort, the drawn cases, the table of results and the options of the command."""

    set: str
    cohort: Cohort
    cases: Sequence[Case]
    rows: Rows
    options: object

    @property
    def template(self) -> str:
        return " ".join(case.name for case in self.cohort.templates)

    def key(self, method: str, case: Case) -> tuple[str, ...]:
        return self.set, self.template, method, case.name

    def lacking(self, method: str) -> list[Case]:
        """The cases without a row; none if the method is not asked for."""
        known = self.rows.read()
        asked = method.startswith(tuple(self.options.only))
        return [case for case in self.cases if asked and self.key(method, case) not in known]

    def add(self, method: str, dice: Mapping[str, float], seconds: float) -> None:
        found = [case for case in self.cases if case.name in dice]
        figures = [{"dice": dice[case.name], "seconds": seconds} for case in found]
        self.rows.add(dict(zip(KEYS, self.key(method, case))) | row for case, row in zip(found, figures))

    def show(self, method: str, peak: float | None = None) -> None:
        """Print a method's line, if each case has its row."""
        known = self.rows.read()
        found = [row for case in self.cases if (row := known.get(self.key(method, case)))]
        if len(found) < len(self.cases) or not method.startswith(tuple(self.options.only)):
            return
        dice, seconds = ([row[name] for row in found] for name in ("dice", "seconds"))
        figures = f"{np.mean(dice):8.3f}{np.median(dice):8.3f}{min(dice):8.3f}{np.mean(seconds):8.1f}"
        print(f"{method:56}{figures}{'' if peak is None else f'{peak:8.0f}'}", flush=True)
        if self.options.details:
            print("  " + " ".join(f"{case.name[:12]}:{value:.3f}" for case, value in zip(self.cases, dice)), flush=True)


def own_methods(bench: Bench, name: str, way: Way, folder: Path) -> None:
    """Run the first pass of a way and each of its label fusions, unless the table has them."""
    methods, peaks = way.methods(name), {}
    if any(bench.lacking(method) for method in methods):
        cases, run = bench.cases, folder / name
        cohort = replace(bench.cohort, find_no_data=way.find_no_data)
        store = features(bench, cohort, folder / f"features {way.find_no_data}")
        poses = pose_parts(cohort, store) if way.turns else {}
        engine = first_pass_engine(store, cohort, way.propagate, run, guard=way.guard, **poses)
        first, peak = timed(lambda: engine.run(cases, epoch_length=len(cases)))
        for method, fusion in methods.items():
            if not bench.lacking(method):
                continue
            seconds, peaks[method] = first, peak
            if fusion is not None:
                engine = label_fusion_engine(store, cohort, cases, run, **fusion[0])
                with patch.object(atlases, "STRAIGHT", fusion[1]):
                    more, peaks[method] = timed(lambda engine=engine: engine.run(cases, epoch_length=len(cases)))
                seconds += more
            dice = {case.name: dice_of(label_in(run, cohort, case), case, cohort) for case in cases}
            bench.add(method, dice, seconds / len(cases))
    for method in methods:
        bench.show(method, peaks.get(method))


def features(bench: Bench, cohort: Cohort, folder: Path) -> FeatureStore:
    """The features of templates and cases, computed when they are first needed."""
    store = empty_store(folder, cohort, bench.options.voxels)
    scans = store.missing([*cohort.templates, *bench.cases])
    if scans:
        seconds, peak = timed(lambda: fill(store, cohort, scans, store.spacing))
        print(f"features at {store.spacing} mm: {seconds / len(scans):.1f} s a scan, {peak:.0f} MiB", flush=True)
    return store


def timed(work: Callable) -> tuple[float, float]:
    """Seconds of ``work`` and peak MiB."""
    rows: list[tuple] = []
    with Stopwatch("work", lambda *row: rows.append(row)):
        work()
    return rows[0][1:]


def rival(bench: Bench, method: str, register: Callable, spacing: rivals.Spacing) -> None:
    """Run a rival on each case that has no row; each case is written at once."""

    def work() -> None:
        for case in bench.lacking(method):
            began = time.perf_counter()
            label = rivals.carried(register, bench.cohort, case, spacing)
            bench.add(method, {case.name: dice_of(label, case, bench.cohort)}, time.perf_counter() - began)

    bench.show(method, timed(work)[1])
