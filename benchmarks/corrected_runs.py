"""Dice of whole runs, by the number of labelled scans: round 0, final labels, the trained model; and with all labels.

    python -m benchmarks corrected_runs [DIR] [--points N ...] [--table FILE] [--work FOLDER] [--set ID=VALUE ...]

Without DIR: synthetic data. The truth stands for the person. The first start has one template; before each later point,
the scans that `semisam-o1 review` names are corrected, and the same command is given again. A third of the pool, the
one that `corrections` draws, is never touched: it judges, and so does the test list. "seconds" are those of the
command. The last row trains the same network, as many rounds, on the true labels of the whole pool (``--no-ceiling``
leaves it out). With ``--table`` and ``--work`` the same command goes on after a kill.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.corrections import never_touched
from benchmarks.pools import Rows, work_folder
from benchmarks.rounds import ROWS
from semisam_o1.clinic.next_scan import ranked
from semisam_o1.data.cohort import Cohort
from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.export import write_label
from semisam_o1.data.phantoms import write_demo_data
from semisam_o1.job.review import review
from semisam_o1.report.metrics import read_csv
from semisam_o1.report.overlap import mean_dice
from semisam_o1.reviewed import Reviewed
from semisam_o1.runfolder import RunFolder, volume
from semisam_o1.tables import TEXT

KEYS = ("set", "template", "labelled", "judges", "case")
COLUMNS = dict.fromkeys(KEYS, TEXT) | dict.fromkeys(("round_0", "network", "handed_out"), ".4f") | {"seconds": ".0f"}
ALL = "all"  # labelled scans of the row with all true labels
QUICKLY = ["label_fusion=false", "template_copies=0"]  # there: round 0 is not used


def options(parser) -> None:
    parser.add_argument("dataset_dir", nargs="?", metavar="DIR")
    parser.add_argument("--points", type=int, nargs="+", default=[1, 5], help="numbers of labelled scans; 1 always")
    parser.add_argument("--no-ceiling", action="store_true", help="without the row of all true labels")
    parser.add_argument("--table", metavar="FILE", help="CSV of the printed figures; rows are added or replaced")
    parser.add_argument("--work", metavar="FOLDER", help="keep the run folders, so that a killed run goes on")
    parser.add_argument("--set", nargs="+", default=[], metavar="ID=VALUE", dest="settings")


def start(data: Path, folder: Path, settings: Sequence[str]) -> float:
    """Give the command ``run``, and return its seconds."""
    command = [sys.executable, "-m", "semisam_o1.cli", "run", str(data), "--output", str(folder)]
    began = time.perf_counter()
    done = subprocess.run([*command, *(["--set", *settings] if settings else [])], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{folder.name} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


def correct(run: RunFolder, cohort: Cohort, free: Sequence[str], count: int) -> None:
    """Give the truth of the scans that the run names next, until ``count`` are given."""
    while len(Reviewed(run.reviewed).entries()) < count:
        name = next(name for name in ranked(run) if name in free)
        case, file = cohort.case(name), volume(run.path.with_name("truth"), name)
        write_label(file, cohort.label(case).numpy(), case.image, cohort.grid(case), cohort.class_numbers)
        said, whole = review(run.path, take=[file])
        if not whole:
            sys.exit(f"{name} was not taken:\n{said}")


def dice(run: RunFolder, cohort: Cohort, judges: dict[str, str], last: int) -> dict[str, dict[str, float]]:
    """Case -> column -> Dice; a test scan has no label that is handed out."""
    rows = [row for row in read_csv(run.metrics) if row["class"] == "mean"]
    known = {(row["case"], row["stage"], row["round"]): row["dice"] for row in rows}
    found: dict[str, dict[str, float]] = {}
    for name in judges:
        case, label = cohort.case(name), run.pseudo_label(name)
        found[name] = {
            "round_0": known.get((name, "propagated", 0), np.nan),
            "network": known.get((name, "predicted", last), np.nan),
            "handed_out": np.nan,
        }
        if label.is_file():
            found[name]["handed_out"] = mean_dice(cohort.label(case, label), cohort.label(case), cohort.num_classes)
    return found


def run(options) -> None:
    with work_folder(options) as folder:
        root, settings = Path(options.dataset_dir or write_demo_data(folder / "data", cases=9)), options.settings
        if options.dataset_dir is None:
            settings = settings or ["max_iterations=50", "num_rounds=1"]
        cohort, table = open_cohort(root, check=False), Rows(options.table, COLUMNS, KEYS)
        (template,) = cohort.templates
        names = [case.name for case in cohort.pool if case.label]
        drawn = never_touched(names)
        judges = dict.fromkeys(drawn, "pool") | {case.name: "test" for case in cohort.test if case.label}
        free = [name for name in names if name not in drawn]
        print(
            f"{'labelled':>8} {'round 0':>8} {'network':>8} {'handed out, worst':>18} {'test':>8} {'worst':>8} {'s':>8}"
        )
        mine = RunFolder(folder / "run")
        points = [str(point) for point in sorted({1, *options.points}) if point <= 1 + len(free)]
        for point in [*points, *([] if options.no_ceiling else [ALL])]:
            keys = {name: (root.resolve().name, template.name, point, whose, name) for name, whose in judges.items()}
            if any(key not in table.read() for key in keys.values()):
                if point == ALL:
                    of, given = all_true(mine), [*ROWS["all true labels"], *QUICKLY, *settings]
                else:
                    of, given = mine, settings
                    correct(of, cohort, free, int(point) - 1)
                seconds = start(root, of.path, given)
                found = dice(of, cohort, judges, of.read_record()["handed_out"][-1]["rounds"])
                table.add(dict(zip(KEYS, key)) | found[name] | {"seconds": seconds} for name, key in keys.items())
            say(point, [table.held[key] for key in keys.values()])


def all_true(mine: RunFolder) -> RunFolder:
    """A copy of a run's features, which the run on all true labels begins from."""
    other = RunFolder(mine.path.with_name("all_true"))
    if not other.path.is_dir():
        aside = mine.path.with_name("copied")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(mine.features, aside / mine.features.name)
        os.replace(aside, other.path)
    return other


def say(point: str, rows: Sequence[dict]) -> None:
    pool, test = ([row for row in rows if row["judges"] == of] for of in ("pool", "test"))
    mean = {name: np.mean([row[name] for row in pool]) for name in ("round_0", "network", "handed_out")}
    worst = min(row["handed_out"] for row in pool)
    of_test = [row["network"] for row in test] or [np.nan]
    print(
        f"{point:>8} {mean['round_0']:8.3f} {mean['network']:8.3f} {mean['handed_out']:10.3f}, {worst:.3f} "
        f"{np.mean(of_test):8.3f} {min(of_test):8.3f} {rows[0]['seconds']:8.0f}",
        flush=True,
    )
