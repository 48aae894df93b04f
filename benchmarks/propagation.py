"""Dice, seconds per scan and memory of round 0, compared with registration, in one table.

    python -m benchmarks propagation [DIR] [--split test] [--cases N] [--template CASE] [--rivals [NAME]] [--ablation]

Without DIR: synthetic data. The cases are drawn with a seed. Features have their own line.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import rivals
from semisam_o1.data import ScanReader
from semisam_o1.data.cohort import Cohort
from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.grids import choose_spacing, to_grid
from semisam_o1.data.phantoms import write_demo_data
from semisam_o1.data.transforms import image_chain
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.features import FeatureStore, TokenInferer
from semisam_o1.job.stopwatch import Stopwatch
from semisam_o1.round_0 import propagation
from semisam_o1.round_0.engines import first_pass_engine, label_fusion_engine
from semisam_o1.round_0.templates import templates_of
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import Case

DRAW = 4  # seed for drawing cases
SEED = 1337  # seed of the propagation, the default of a run
FIRST_PASSES = {
    "no emphasis on the label": partial(propagation.nearest, emphasised=False),
    "no alignment at full resolution": partial(propagation.nearest, sharp=False),
    "no vote at borders": partial(propagation.nearest, neighbours=0),
    "no displacement": partial(propagation.nearest, deformation=False),
    "no alignment": partial(propagation.nearest, alignment=False),
    "prototype": propagation.prototype,
    "prototype, k = 32": partial(propagation.prototype, k=32),
    "copy": propagation.copy,
}
RIVALS = {"syn": ("ANTs SyN", rivals.ants_syn), "convexadam": ("ANTs affine + convexAdam", rivals.ants_convex_adam)}
FUSIONS = {"1 atlas": dict(atlases=1), "3 atlases": dict(atlases=3), "8 atlases": dict(atlases=8)}


def options(parser) -> None:
    parser.add_argument("dataset_dir", nargs="?", metavar="DIR")
    parser.add_argument("--split", default="pool", choices=("pool", "val", "test"))
    parser.add_argument("--cases", type=int, default=12, help="largest number of cases, drawn with a fixed seed")
    parser.add_argument("--template", nargs="+", default=[], metavar="CASE")
    parser.add_argument("--voxels", type=int, default=400000, help="of the working space")
    parser.add_argument(
        "--rivals",
        nargs="*",
        choices=tuple(RIVALS),
        help="registration methods to compare (all); without names: none",
    )
    parser.add_argument("--ablation", action="store_true", help="also leave out each part of the default in turn")
    parser.add_argument("--details", action="store_true", help="also print the Dice of each case")


def run(options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = options.dataset_dir or write_demo_data(Path(folder) / "data")
        cohort = open_cohort(root, check=False, template=options.template)
        cases = [case for case in cohort.split(options.split) if case.label]
        cases = drawn(cases, options.cases)
        spacing = choose_spacing([cohort.grid(case) for case in cohort.templates], options.voxels)
        store, rows = FeatureStore(Path(folder) / "features", mind(), spacing), []
        with Stopwatch("features", lambda *row: rows.append(row)):
            fill(store, cohort, [*cohort.templates, *cases], spacing)
        print(f"\n{options.split}, {len(cases)} cases, template {cohort.templates[0].name}")
        print(f"working spacing {spacing} mm, {torch.get_num_threads()} threads")
        print(f"features: {rows[0][1] / (len(cases) + 1):.1f} s a scan, peak {rows[0][2]:.0f} MiB")
        print(f"{'method':30}{'mean':>8}{'median':>8}{'worst':>8}{'s/scan':>8}{'MiB':>8}", flush=True)
        for name, labels, seconds, peak in competitors(options, store, cohort, cases, spacing, Path(folder)):
            dice = [mean_dice(labels(case), case, cohort) for case in cases]
            figures = f"{np.mean(dice):8.3f}{np.median(dice):8.3f}{min(dice):8.3f}{seconds:8.1f}{peak:8.0f}"
            print(f"{name:30}{figures}", flush=True)
            if options.details:
                print("  " + " ".join(f"{case.name[:8]}:{value:.3f}" for case, value in zip(cases, dice)), flush=True)


def drawn(cases: Sequence[Case], count: int, seed: int = DRAW) -> list[Case]:
    """At most ``count`` of the cases, drawn with a seed, in their order."""
    return [cases[i] for i in sorted(np.random.RandomState(seed).permutation(len(cases))[:count])]


def propagated_dice(store, cohort: Cohort, cases: Sequence[Case], label_fusion: bool = True) -> np.ndarray:
    """True Dice of each case's label from the default propagation of the cohort's templates."""
    count = len(cases)
    with tempfile.TemporaryDirectory() as name:  # a new folder, because an engine keeps existing results
        folder = Path(name)
        first_pass_engine(store, cohort, partial(propagation.nearest, seed=SEED), folder).run(cases, epoch_length=count)
        if label_fusion:
            label_fusion_engine(store, cohort, cases, folder).run(cases, epoch_length=count)
        found = RunFolder(folder).round(0)
        labels = (ScanReader().volume(found.label(case.name))[0].numpy().astype(int) for case in cases)
        return np.array([mean_dice(label, case, cohort) for label, case in zip(labels, cases)])


def competitors(options, store, cohort, cases, spacing, folder: Path) -> Iterator[tuple[str, Callable, float, float]]:
    """Name, a function from case to label (H, W, D), seconds per case, peak MiB."""
    count = len(cases)

    def first_pass(name: str, propagate: Callable):
        engine = first_pass_engine(store, cohort, propagate, folder / name)
        return timed(lambda: engine.run(cases, epoch_length=count), folder / name, count)

    label, *figures = first_pass("ours", partial(propagation.nearest, seed=SEED))
    kept = {case.name: label(case) for case in cases}  # before label fusion overwrites them
    yield "first pass alone", lambda case: kept[case.name], *figures
    for name, settings in ({"default, with label fusion": {}} | (FUSIONS if options.ablation else {})).items():
        engine = label_fusion_engine(store, cohort, cases, folder / "ours", **settings)
        yield name, *timed(lambda engine=engine: engine.run(cases, epoch_length=count), folder / "ours", count)
    names = FIRST_PASSES if options.ablation else ("prototype", "copy")
    for name in names:
        yield name, *first_pass(name, FIRST_PASSES[name])
    wanted = RIVALS if options.rivals is None else options.rivals
    if wanted and not rivals.AVAILABLE:
        print("registration left out: ANTs and convexAdam come with pip install -c constraints.txt .[bench]")
        return
    for name, method in (RIVALS[key] for key in wanted):
        yield name, *rival(method, store, cohort, cases, spacing)


def timed(work: Callable, folder: Path, count: int) -> tuple[Callable, float, float]:
    """A function from case to its label in round 0 of the run ``folder``, seconds per case and peak MiB."""
    rows: list[tuple] = []
    with Stopwatch("work", lambda *row: rows.append(row)):
        work()

    def label(case: Case) -> np.ndarray:
        return ScanReader().volume(RunFolder(folder).round(0).label(case.name))[0].numpy().astype(int)

    return label, rows[0][1] / count, rows[0][2]


def rival(method: Callable, store, cohort: Cohort, cases: Sequence[Case], spacing: float):
    reference = templates_of(store, cohort)[0].reference
    chain = image_chain(spacing, cohort.reader)
    template = chain(cohort.templates[0].item())["image"][0].numpy()
    rows, labels, seconds = [], {}, 0.0
    with Stopwatch("rival", lambda *row: rows.append(row)):
        for case in cases:
            image = chain(case.item())["image"]
            began = time.perf_counter()
            shares = method(template, reference.label, image[0].numpy(), spacing, 0)
            labels[case.name] = to_grid(shares, image.affine, cohort.grid(case)).argmax(0).numpy()
            seconds += time.perf_counter() - began
    return lambda case: labels[case.name], seconds / len(cases), rows[0][2]


def fill(store: FeatureStore, cohort: Cohort, cases: Sequence[Case], spacing: float) -> None:
    chain, inferer = image_chain(spacing, cohort.reader), TokenInferer()
    for case in cases:
        tokens = inferer(chain(case.item())["image"][None], store.encoder)
        store.save(case, tokens.as_tensor()[0], np.asarray(tokens.affine).reshape(-1, 4, 4)[0], cohort.grid(case))


def mean_dice(label: np.ndarray, case: Case, cohort: Cohort) -> float:
    truth = cohort.label(case).numpy()
    pairs = [(label == number, truth == number) for number in range(1, cohort.num_classes)]
    return float(np.mean([2 * (p & t).sum() / max(1, p.sum() + t.sum()) for p, t in pairs]))
