"""Speed and size of the feature store with many cases, from synthetic entries.

python -m benchmarks store [--cases 10000]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from semisam_o1.data.grids import Grid
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.features import FeatureStore
from semisam_o1.types import Case

LOOKED_UP = 100  # cases; the mean is shown


def options(parser) -> None:
    parser.add_argument("--cases", type=int, default=10000)


def run(options) -> None:
    draw, grid = np.random.default_rng(0), Grid(np.eye(4), (128, 128, 128))
    tokens = torch.randn(384, 2, 2, 2)
    head = f"{'cases':>7}{'add':>10}{'open, find':>12}{'all fresh?':>12}{'descriptors':>13}{'bytes/case':>12}"
    print(f"\nfeature store\n{head}")
    with tempfile.TemporaryDirectory() as name:
        image = Path(name) / "scan.nii"
        image.write_bytes(bytes(1000))
        folder, cases = Path(name) / "features", []
        for size in sorted({options.cases // 100, options.cases // 10, options.cases} - {0}):
            store, began = FeatureStore(folder, mind(), 1.5), len(cases)
            cases += [Case(f"case_{i:06d}", image, None, "pool") for i in range(began, size)]
            for case in cases[began:-LOOKED_UP]:
                store.save(case, tokens, np.eye(4), grid)
            last = cases[max(began, size - LOOKED_UP) :]
            adding = seconds(lambda: [store.save(case, tokens, np.eye(4), grid) for case in last]) / len(last)
            wanted = [cases[i].name for i in draw.integers(size, size=LOOKED_UP)]
            finding = seconds(lambda: [FeatureStore(folder, mind(), 1.5).load(name) for name in wanted]) / LOOKED_UP
            fresh = seconds(lambda: store.missing(cases))
            descriptors = seconds(lambda: store.descriptors(case.name for case in cases))
            stored = sum(path.stat().st_size for path in folder.iterdir()) / size
            figures = f"{adding * 1e3:7.1f} ms{finding * 1e3:9.1f} ms{fresh:10.1f} s{descriptors:11.1f} s{stored:12.0f}"
            print(f"{size:7}{figures}", flush=True)


def seconds(work: Callable) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
