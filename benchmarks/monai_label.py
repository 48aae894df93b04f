"""Dice of suggestions by a real MONAI Label server, after one final label and after corrections made through it.

    python -m benchmarks monai_label DIR [--scans N] [--judges N] [--corrections N] [--template CASE] [--table FILE]

It needs the environment that `make clinic` makes. The studies are the template and drawn scans of the pool of DIR, in
NIfTI; the truth stands for the person. The judges are never labelled. The corrected scans are those that the app's
strategy names, without the judges. Seconds are those of a training: from the final label to the model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.pools import Rows, drawn
from semisam_o1 import BUNDLE_ROOT
from semisam_o1.clinic.make_app import make_app
from semisam_o1.clinic.next_scan import RUN, ranked
from semisam_o1.data.cohort import Cohort
from semisam_o1.data.datasets import open_cohort
from semisam_o1.report.overlap import mean_dice
from semisam_o1.runfolder import RunFolder
from semisam_o1.tables import TEXT
from tests.clinic.server import CLINIC, Server

COLUMNS = {"set": TEXT, "template": TEXT, "labelled": ".0f", "case": TEXT, "dice": ".4f", "seconds": ".0f"}
LONGEST = 4 * 3600  # seconds that a training may take


def options(parser) -> None:
    parser.add_argument("dataset_dir", nargs="?", metavar="DIR")
    parser.add_argument("--scans", type=int, default=12, help="scans of the studies folder, the template included")
    parser.add_argument("--judges", type=int, default=5, help="scans that are never labelled")
    parser.add_argument("--corrections", type=int, default=3)
    parser.add_argument("--template", nargs="+", default=[], metavar="CASE")
    parser.add_argument("--table", metavar="FILE", help="CSV of the printed figures; rows are added or replaced")


def run(options) -> None:
    if options.dataset_dir is None or not (CLINIC / "monailabel").exists():
        print("monai_label left out: it needs DIR, and MONAI Label (make clinic)")
        return
    root = Path(options.dataset_dir)
    cohort = open_cohort(root, template=options.template, check=False)
    template = cohort.templates[0]
    pool = drawn([case for case in cohort.pool if case.label], options.scans - 1)
    judges, table = drawn(pool, options.judges), Rows(options.table, COLUMNS, ("set", "template", "labelled", "case"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        studies = folder / "studies"
        studies.mkdir()
        for case in (template, *pool):
            shutil.copyfile(case.image, studies / case.image.name)
        make_app(folder / "apps" / "monaibundle", BUNDLE_ROOT)
        given = template
        print(
            f"{'labelled':>8} {'Dice of ' + str(len(judges)) + ' scans never labelled':34} {'worst':>7} {'s':>6}  next"
        )
        for labelled in range(1, options.corrections + 2):
            with Server(folder, studies, BUNDLE_ROOT) as server:
                submit(server, cohort, given)
                seconds = train(server)
            with Server(folder, studies, BUNDLE_ROOT) as server:  # the first model needs a restart
                dice = {case: suggested(server, cohort, case, folder) for case in judges}
                left = [name for name in ranked(RunFolder(server.bundle / RUN)) if cohort.case(name) not in judges]
            rows = [(root.resolve().name, template.name, labelled, case.name, dice[case], seconds) for case in judges]
            table.add(dict(zip(COLUMNS, row)) for row in rows)
            mean, worst = np.mean(list(dice.values())), min(dice.values())
            print(f"{labelled:8} {mean:34.3f} {worst:7.3f} {seconds:6.0f}  {left[0] if left else ''}", flush=True)
            if not left:
                return
            given = cohort.case(left[0])


def submit(server: Server, cohort: Cohort, case) -> None:
    """The truth of a case as a final label, with the names of its segments."""
    segments = [{"name": name, "idx": number} for number, name in cohort.classes.items() if number]
    server.save_label(case.name, case.label, params={"label_info": segments})


def train(server: Server) -> float:
    """Train as the page does; returns the seconds."""
    began = time.perf_counter()
    server.train()
    ended = server.wait(seconds=LONGEST)
    if ended["status"] != "DONE":
        raise RuntimeError(f"the training ended as {ended['status']}: {json.dumps(ended['details'][-3:])}")
    return time.perf_counter() - began


def suggested(server: Server, cohort: Cohort, case, folder: Path) -> float:
    """True mean Dice of the server's label of a case."""
    label = server.infer(case.name, folder / f"{case.name}.nii.gz")
    return mean_dice(cohort.label(case, label), cohort.label(case), cohort.num_classes)
