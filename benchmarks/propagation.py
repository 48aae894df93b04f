"""Round 0 without training: `nearest` against `prototype` and `copy`; Dice, seconds and memory a scan.

    python -m benchmarks propagation [DIR] [--split test] [--cases N]

Without DIR: a made-up cohort. The encoder is `mind`; its time stands in a line of its own.
"""

import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from semisam_o1 import propagation
from semisam_o1.alignment import turn_between
from semisam_o1.datasets import open_cohort
from semisam_o1.encoders import mind
from semisam_o1.engine import reference
from semisam_o1.features import FeatureStore, TokenInferer
from semisam_o1.phantoms import write_demo_data
from semisam_o1.stopwatch import Stopwatch
from semisam_o1.transforms import choose_spacing, image_chain, read_volume, to_grid

METHODS = {
    "nearest": propagation.nearest,
    "nearest, no deformation": partial(propagation.nearest, deformation=False),
    "nearest, no alignment": partial(propagation.nearest, alignment=False),
    "prototype": propagation.prototype,
    "prototype, k = 32": partial(propagation.prototype, k=32),
    "copy": propagation.copy,
}


def options(parser) -> None:
    parser.add_argument("dataset_dir", nargs="?", metavar="DIR")
    parser.add_argument("--split", default="pool", choices=("pool", "val", "test"))
    parser.add_argument("--cases", type=int, default=12, help="at most so many, the first of the list")
    parser.add_argument("--voxels", type=int, default=400000, help="of the working space")


def run(options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = options.dataset_dir or write_demo_data(Path(folder) / "data")
        cohort = open_cohort(root, check=False)
        cases = [case for case in cohort.split(options.split) if case.label][: options.cases]
        spacing = choose_spacing([cohort.grid(case) for case in cohort.templates], options.voxels)
        store, rows = FeatureStore(Path(folder) / "features", mind(), spacing), []
        with Stopwatch("features", lambda *row: rows.append(row)):
            fill(store, cohort, [*cohort.templates, *cases], spacing)
        print(f"\n{options.split}, {len(cases)} cases, working spacing {spacing} mm, {torch.get_num_threads()} threads")
        print(f"features: {rows[0][1] / (len(cases) + 1):.1f} s a scan, peak {rows[0][2]:.0f} MiB")
        print(f"{'method':26}{'mean':>8}{'median':>8}{'worst':>8}{'s/scan':>8}{'MiB':>8}")
        for name, method in METHODS.items():
            dice, seconds, peak = measure(method, store, cohort, cases)
            print(f"{name:26}{np.mean(dice):8.3f}{np.median(dice):8.3f}{min(dice):8.3f}{seconds:8.1f}{peak:8.0f}")


def fill(store: FeatureStore, cohort, cases, spacing: float) -> None:
    chain, inferer = image_chain(spacing, cohort.hdf5_key, cohort.hdf5_spacing), TokenInferer()
    for case in cases:
        tokens = inferer(chain(case.item())["image"][None], store.encoder)
        store.save(case, tokens.as_tensor()[0], np.asarray(tokens.affine).reshape(-1, 4, 4)[0], cohort.grid(case))


def measure(method, store: FeatureStore, cohort, cases) -> tuple[list[float], float, float]:
    """Dice of each case, seconds a case and peak memory in MiB."""
    found = [(case, store.load(case.name)) for case in cohort.templates]
    references = [reference(case, features, cohort.num_classes, cohort.hdf5_spacing) for case, features in found]
    dice, rows, seconds = [], [], 0.0
    with Stopwatch("method", lambda *row: rows.append(row)):
        for case in cases:
            scan = store.load(case.name)
            began = time.perf_counter()
            turn = turn_between(scan.scan.affine, found[0][1].scan.affine)
            probabilities = method(references, scan.tokens, step_mm=scan.step_mm, turn=turn)
            label = to_grid(probabilities, scan.affine, scan.scan).argmax(0).numpy()
            seconds += time.perf_counter() - began
            truth = read_volume(case.label, "label", cohort.hdf5_spacing)[0].numpy().astype(int)
            pairs = [(label == c, truth == c) for c in range(1, cohort.num_classes)]
            dice.append(float(np.mean([2 * (p & t).sum() / max(1, p.sum() + t.sum()) for p, t in pairs])))
    return dice, seconds / len(cases), rows[0][2]
