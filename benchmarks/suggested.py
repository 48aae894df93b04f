"""Dice with the suggested template, compared with templates drawn at random.

    python -m benchmarks suggested [DIR] [--cases N] [--templates N]

Without DIR: synthetic data. Cases and templates are drawn with a seed from train.txt, without overlap. First pass only.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.pools import drawn, fill, propagated_dice
from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.grids import choose_spacing
from semisam_o1.data.phantoms import write_demo_data
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.features import FeatureStore
from semisam_o1.round_0.suggest import suggest_template


def options(parser) -> None:
    parser.add_argument("dataset_dir", nargs="?", metavar="DIR")
    parser.add_argument("--cases", type=int, default=12, help="number of cases to label")
    parser.add_argument("--templates", type=int, default=10, help="number of random templates")
    parser.add_argument("--voxels", type=int, default=400000, help="of the working space")


def run(options) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = options.dataset_dir or write_demo_data(folder / "data")
        cohort = open_cohort(root, check=False)
        usable = [case for case in (*cohort.templates, *cohort.pool) if case.label]
        best = suggest_template(root, folder / "suggestion", top=1, feature_voxels=options.voxels)[0].case
        others = [case for case in usable if case.name != best]
        cases = drawn(others, min(options.cases, len(others) - 1))
        rest = [case for case in others if case not in cases]
        templates = drawn(rest, options.templates, seed=5)
        suggested = [case for case in usable if case.name == best]
        spacing = choose_spacing(cohort.template_grids, options.voxels)
        store = FeatureStore(folder / "features", mind(), spacing)
        fill(store, cohort, [*cases, *templates, *suggested], spacing)
        print(f"\n{len(cases)} cases\n{'template':40}{'mean':>8}{'median':>8}{'worst':>8}", flush=True)
        means = []
        for case in templates + suggested:
            alone = replace(cohort, templates=(replace(case, split="template"),))
            dice = propagated_dice(store, alone, cases, label_fusion=False)
            means.append(dice.mean())
            mark = "suggested: " if case.name == best else ""
            print(f"{mark + case.name:40}{dice.mean():8.3f}{np.median(dice):8.3f}{dice.min():8.3f}", flush=True)
        drawn_means, mine = np.array(means[:-1]), means[-1]
        quarter = np.quantile(drawn_means, 0.75)
        print(
            f"random templates: mean {drawn_means.mean():.3f}, 75th percentile {quarter:.3f}; suggested {mine:.3f}, ",
            end="",
        )
        print(f"better than {(drawn_means < mine).sum()} of {len(drawn_means)}")
