"""Dice of round 0 on scans that nobody touched, by the number of labelled scans and the order of choosing them.

    python -m benchmarks corrections [DIR] [--pool N] [--templates N] [--points N ...] [--table FILE] [--work FOLDER]

Without DIR: synthetic data. The truth stands for the person. A third of the pool is drawn by a fixed seed and never
touched; it and the test list judge all strategies at all points. At point 1 the template alone is labelled, at point 5
four more scans. The features, the first pass and the predicted Dice of round 0 with one template are made once for each
template; the labels of the judging scans are fused anew at each point, as a run does; "plain" is the Dice without what
is learned there of how people outline (`round_0.outlines`). With ``--table`` and ``--work`` the same command goes on
after a kill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.pools import Rows, drawn, empty_store, fill, propagated, work_folder
from semisam_o1.data.cohort import Cohort
from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.export import write_label
from semisam_o1.data.grids import to_grid
from semisam_o1.data.phantoms import write_demo_data
from semisam_o1.features import FeatureStore
from semisam_o1.report.overlap import mean_dice
from semisam_o1.review.ranking import DEFAULT, STRATEGIES, known_of
from semisam_o1.round_0.engines import quality_engine
from semisam_o1.round_0.label_fusion import LabelFusion
from semisam_o1.round_0.outlines import Outlined, applied, learn
from semisam_o1.round_0.passes import FirstPass
from semisam_o1.runfolder import RunFolder, volume
from semisam_o1.tables import TEXT
from semisam_o1.types import Case, Probabilities

KEYS = ("set", "template", "strategy", "labelled", "judges", "case")
COLUMNS = dict.fromkeys(KEYS, TEXT) | {"plain": ".4f", "dice": ".4f"}
RANDOM = "random"
THIRD = 3  # one scan of the pool in so many is never touched
LEAST = 3  # scans that are never touched, if the pool has twice as many
FIRST = 3  # names of train.txt that are templates in turn, and so do not judge
SEED = 3
BY_QUALITY = {"worst predicted", "expected win"}  # the strategies that ask for the predicted Dice


def options(parser) -> None:
    parser.add_argument("dataset_dir", nargs="?", metavar="DIR")
    parser.add_argument("--pool", type=int, default=40, help="largest number of scans of the pool, drawn")
    parser.add_argument("--templates", type=int, default=1, help="first names of train.txt that are templates in turn")
    parser.add_argument("--points", type=int, nargs="+", default=[1, 3, 5], help="numbers of labelled scans")
    parser.add_argument("--strategies", nargs="+", default=[DEFAULT, RANDOM], choices=[*STRATEGIES, RANDOM])
    parser.add_argument("--draws", type=int, default=2, help="random orders")
    parser.add_argument("--voxels", type=int, default=400000, help="of the working space")
    parser.add_argument("--table", metavar="FILE", help="CSV of the printed figures; rows are added or replaced")
    parser.add_argument("--work", metavar="FOLDER", help="keep features and first pass, so that a killed run goes on")


def never_touched(names: Sequence[str], templates: Sequence[str] = ()) -> list[str]:
    """A third of a pool, at least `LEAST` scans, drawn by a fixed seed from those that are no templates in turn."""
    drawn = [name for name in names if name not in templates] or list(names)
    order = np.random.RandomState(SEED).permutation(len(drawn))
    count = max(len(names) // THIRD, min(LEAST, len(names) // 2), 1)
    return [drawn[i] for i in sorted(order[:count])]


class Remembering(LabelFusion):
    """Label fusion that carries an atlas to a scan once; ``known`` holds what was carried to the scan at hand."""

    known: dict[tuple[str, bool], tuple]

    def carried(self, name, scan, tokens):
        key = name, name in self.labelled
        if key not in self.known:
            self.known[key] = super().carried(name, scan, tokens)
        return self.known[key]


class Pool:
    """A pool with one template, after round 0: who is never touched, and labels for any set of touched scans."""

    def __init__(self, cohort: Cohort, store: FeatureStore, run: RunFolder, truths: Path, judges: Sequence[str]):
        self.cohort, self.store, self.run, self.truths = cohort, store, run, truths
        self.records = run.round(0).work("first")
        names = [case.name for case in cohort.pool if self.records.has(case.name, "alignments")]
        tests = [case.name for case in cohort.test if self.records.has(case.name, "alignments")]
        self.carried: dict[str, dict] = {}  # scan -> what was carried to it
        self.judges = dict.fromkeys(judges, "pool") | dict.fromkeys(tests, "test")  # scan -> its list
        self.free = [name for name in names if name not in self.judges]

    def touched(self, names: Sequence[str]) -> Cohort:
        """The cohort with the truth as the labels of ``names``."""
        return self.cohort.with_reviewed({name: self._truth(name) for name in names})

    def _truth(self, name: str) -> Path:
        """The truth in a file of its own."""
        case, path = self.cohort.case(name), volume(self.truths, name)
        if not path.is_file():
            numbers, label = self.cohort.class_numbers, self.cohort.label(case).numpy()
            write_label(path, label, case.image, self.cohort.grid(case), numbers)
        return path

    def dice(self, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """The Dice of each judging scan with the truth of ``names`` given: without and with what outlines teach."""
        cohort, found = self.touched(names), {}
        fusion = Remembering(self.store, self.records, cohort, cohort.pool)

        def fused(name: str) -> Probabilities:
            """The label that is carried to a scan from all others."""
            scan, fusion.known = fusion.scan(name), self.carried.setdefault(name, {})
            result = fusion(scan, {name})
            return scan.probabilities if result is None else result.probabilities

        outlines = learn([Outlined(fused(name), fusion.label_of(name)) for name in names])
        for judge in self.judges:
            features = self.store.frame(FirstPass.load(self.records, judge, "frame").frame).load(judge)
            plain, truth = fused(judge), cohort.label(cohort.case(judge))
            labels = [plain] if outlines.gain is None else [plain, applied(plain, outlines.factors)]
            dices = [
                mean_dice(to_grid(label, features.affine, features.scan).argmax(0), truth, cohort.num_classes)
                for label in labels
            ]
            found[judge] = dices[0], dices[-1]
        return found

    def following(self, names: Sequence[str], strategy: str, draw: np.random.RandomState) -> str:
        """The scan that a strategy touches after ``names``."""
        if strategy == RANDOM:
            return str(draw.choice([name for name in self.free if name not in names]))
        ranked, known = known_of(self.run, self.touched(names), self.store, self.run.round(0))
        order = np.argsort(-STRATEGIES[strategy](known), kind="stable")
        return next(ranked[i] for i in order if ranked[i] in self.free)


def prepared(cohort: Cohort, template: Case, folder: Path, voxels: int, predict: bool, judges: Sequence[str]) -> Pool:
    """Round 0 of a pool with one template, in ``folder``; with the predicted Dice if ``predict``."""
    others = [case for case in (*cohort.templates, *cohort.pool) if case.name != template.name]
    pool = tuple(replace(case, split="pool") for case in others if case.label)
    test = tuple(case for case in cohort.test if case.label)
    cohort = replace(cohort, templates=(replace(template, split="template"),), pool=pool, val=(), test=test)
    store, run = empty_store(folder / "features", cohort, voxels), RunFolder(folder / "run")
    fill(store, cohort, cohort.cases, store.spacing)
    if not run.round(0).quality.path.is_file():
        propagated(store, cohort, [(pool, pool), (test, pool)], run.path)
    if predict and not run.round(0).quality.path.is_file():
        quality_engine(store, cohort, run.path, 0).run(pool, epoch_length=len(pool))
    return Pool(cohort, store, run, folder / "truth", judges)


@torch.no_grad()
def run(options) -> None:
    with work_folder(options) as folder:
        root = Path(options.dataset_dir or write_demo_data(folder / "data", cases=12))
        cohort = open_cohort(root, check=False)
        table = Rows(options.table, COLUMNS, KEYS)
        everyone = [*cohort.templates, *cohort.pool]
        templates = everyone[: options.templates]
        chosen = drawn([case for case in cohort.pool if case.label], options.pool)
        judges = never_touched([case.name for case in chosen], [case.name for case in everyone[:FIRST]])
        cohort = replace(cohort, pool=tuple(chosen))
        columns = f"{'labelled':>8}{'pool':>8}{'worst':>8}{'test':>8}{'all plain':>10}  touched last"
        print(f"{'template':20}{'strategy':18}{columns}")
        for template in templates:
            predict = bool(BY_QUALITY & {*options.strategies})
            pool = prepared(cohort, template, folder / template.name, options.voxels, predict, judges)
            chains = [(name, 0) for name in options.strategies if name != RANDOM]
            chains += [(RANDOM, draw) for draw in range(options.draws) if RANDOM in options.strategies]
            for strategy, draw in chains:
                follow(pool, template.name, root.resolve().name, strategy, draw, options.points, table)


def follow(
    pool: Pool, template: str, root: str, strategy: str, number: int, points: Sequence[int], table: Rows
) -> None:
    """One order of scans, judged at each point; rows that are there already are not made again."""
    name = f"{strategy} {number + 1}" if strategy == RANDOM else strategy
    names: list[str] = []
    draw = np.random.RandomState(number)
    for labelled in range(1, min(max(points), 1 + len(pool.free)) + 1):
        if labelled > 1:
            names.append(pool.following(names, strategy, draw))
        if labelled not in points:
            continue
        keys = {judge: (root, template, name, str(labelled), of, judge) for judge, of in pool.judges.items()}
        if any(key not in table.read() for key in keys.values()):
            dice = pool.dice(names)
            table.add([dict(zip(COLUMNS, (*key, *dice[judge]))) for judge, key in keys.items()])
        dice = {of: [table.held[key]["dice"] for key in keys.values() if key[4] == of] for of in ("pool", "test")}
        means = [np.mean(values) if values else np.nan for values in dice.values()]
        plain = np.mean([table.held[key]["plain"] for key in keys.values()])
        line = f"{means[0]:8.3f}{min(dice['pool']):8.3f}{means[1]:8.3f}{plain:10.3f}  {names[-1] if names else ''}"
        print(f"{template[:19]:20}{name:18}{labelled:8}{line}", flush=True)
