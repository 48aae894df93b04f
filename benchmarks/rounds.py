"""Dice of each method, refinement and source of labels after training rounds.

    python -m benchmarks rounds [DIR] [--output FOLDER] [--rounds 1] [--set ID=VALUE ...]

Without DIR: synthetic data. All rows start from the same round 0. Each row is a run folder in FOLDER; existing ones are
reused.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from semisam_o1 import BUNDLE_ROOT
from semisam_o1.data.phantoms import write_demo_data
from semisam_o1.files import write_json
from semisam_o1.job import Job
from semisam_o1.report.metrics import read_csv, summary

CONFIGS = Path(BUNDLE_ROOT) / "configs"
PLAIN = "mean_teacher"
ITEMS = "train#dataset#data="
ROWS = {
    PLAIN: [],
    **{method: ["--method", method] for method in ("ua_mt", "dan", "dtc", "supervised")},
    "template alone": [ITEMS + "$jobs.training_items(@cohort, @output_dir, @round)[:len(@cohort.templates)]"],
    "all true labels": [
        ITEMS + "$[case.item() | {'labelled': case in @cohort.templates} for case in @cohort.templates + @cohort.pool]"
    ],
    "from scratch": ["warm_start=false"],  # from the second round on
    "no averaged weights": ["average_alpha=0.01"],
    "one view": ["view_turn=0"],
    "mirrored left-right": ["flip_axes=[0]"],
    "half as many voxels": ["train_voxels=100000"],
    "weak augmentation": ["affine_prob=0.4"],
    "float32": ["bfloat16=false"],
}
REFINEMENTS = {
    "volume, no guard": ("volume", False),
    "volume": ("volume", True),
    "voxel, no guard": ("voxel", False),
    "voxel": ("voxel", True),
}


def options(parser) -> None:
    parser.add_argument("dataset_dir", nargs="?", metavar="DIR")
    parser.add_argument("--output", type=Path, help="folder for the rows, to resume the table later")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--set", nargs="+", default=[], metavar="ID=VALUE", dest="settings")


def trained(data: Path, folder: Path, rounds: int, given: Iterable[str]) -> Path:
    """Run in ``folder``, unless it has a finished run; ``given``: options of the command and settings."""
    if not (folder / "report.html").exists():
        at = [word for word in given if "=" not in word]
        settings = ["--set", *settings] if (settings := [word for word in given if "=" in word]) else []
        command = [sys.executable, "-m", "semisam_o1.cli", "run", str(data), "--output", str(folder)]
        done = subprocess.run([*command, "--rounds", str(rounds), *at, *settings], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{folder.name} failed:\n{done.stderr[-2000:]}")
    return folder


def figures(rows: list[dict], number: int, stage: str) -> str:
    cells = []
    for split in ("pool", "val", "test"):
        found = [r for r in summary(rows) if (r["split"], r["round"], r["stage"]) == (split, number, stage)]
        cells.append(f"{found[0]['dice_mean']:8.3f} ({found[0]['dice_worst']:.3f})" if found else " " * 16)
    return "".join(cells)


def training_seconds(folder: Path) -> float:
    stages = json.loads((folder / "run.json").read_text())["stages"]
    return sum(stage["seconds"] for stage in stages if stage["stage"].endswith("training"))


def refined(folder: Path, kind: str, guard: bool) -> list[dict]:
    """The rows of metrics.csv for round 1, after another refinement of its predictions."""
    config = json.loads((folder / "run.json").read_text())["config"]
    overlay = json.loads((CONFIGS / "refinements" / f"{kind}.json").read_text())
    config["refinement"]["propose"] = overlay["refinement#propose"]
    job = Job(config | {"output_dir": str(folder), "guard": guard, "num_rounds": 1})
    job.alone("refinement", 1)
    return job.evaluate(["pool"])


def run(options) -> None:
    with tempfile.TemporaryDirectory() as name:
        output = options.output or Path(name)
        data, settings = options.dataset_dir, options.settings
        if data is None:
            data, settings = write_demo_data(output / "data"), settings or ["max_iterations=100"]
        base = trained(data, output / "round_0", 0, settings)
        print(f"\n{options.rounds} round(s); mean Dice (worst)")
        print(f"{'':20}{'pool':>16}{'val':>16}{'test':>16}{'s a round':>12}")
        print(f"{'round 0':20}{figures(read_csv(base / 'metrics.csv'), 0, 'propagated')}", flush=True)
        for row in options.rows if options.rows is not None else ROWS:
            folder = output / row.replace(" ", "_")
            if not folder.exists():
                shutil.copytree(base, output / "copied", dirs_exist_ok=True)
                (output / "copied" / "report.html").unlink()
                (output / "copied").rename(folder)
            trained(data, folder, options.rounds, [*ROWS[row], *settings])
            seconds = training_seconds(folder) / options.rounds
            found = figures(read_csv(folder / "metrics.csv"), options.rounds, "predicted")
            print(f"{row:20}{found}{seconds:12.0f}", flush=True)
        if (output / PLAIN / "round_1").is_dir():
            print(f"\nrefinement of round 1 of {PLAIN}")
            print(f"{'none':20}{figures(read_csv(output / PLAIN / 'metrics.csv'), 1, 'predicted')}", flush=True)
            for row, (kind, guard) in REFINEMENTS.items():
                file = output / PLAIN / f"refined_{row.replace(', ', '_').replace(' ', '_')}.json"
                if not file.exists():
                    write_json(file, refined(output / PLAIN, kind, guard))
                found = figures(json.loads(file.read_text()), 1, "refined")
                print(f"{row:20}{found if found.strip() else '  switched off by the guard'}", flush=True)
