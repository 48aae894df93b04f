"""Jobs on phantoms, small enough to take seconds: their settings, the ways to start them, what they are compared by."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
from monai.bundle.scripts import run as run_bundle

import semisam_o1
from semisam_o1.cli import main, parser
from semisam_o1.data import Cohort, ScanReader
from semisam_o1.workflows import config_files, overrides, workflow

CONFIGS = Path(semisam_o1.BUNDLE_ROOT) / "configs"
SMALL = {  # volumes and schedules that take seconds
    "feature_voxels": 3000,
    "finer_features": 1,
    "train_voxels": 6000,
    "max_iterations": 4,
    "iterations_per_epoch": 2,
    "num_rounds": 2,
    "knn_k": 2,
    "uncertainty_quantile": 0.5,
    "view_turn": 0,  # tests of predictions say otherwise
    "template_copies": 0,  # the labels of the last round are handed out
}


def small(**more) -> list[str]:
    """SMALL and ``more`` as the command line takes them."""
    return ["--set", *(f"{name}={json.dumps(value)}" for name, value in (SMALL | more).items())]


def config_of(dataset: Path, output: Path, *options: str, **ids) -> dict:
    """The config of the job that ``semisam-o1 run`` runs with `SMALL` and ``ids``."""
    command = ["run", str(dataset), "--output", str(output), "--device", "cpu", *options, *small(**ids)]
    options = parser().parse_args(command)
    return workflow(config_files(options), "training", overrides(options)).parser.get()


def bundle(run_id: str, *configs: Path, **ids) -> None:
    """What ``python -m monai.bundle run`` does, in this process."""
    run_bundle(run_id=run_id, config_file=[str(config) for config in configs], **ids)


def bundle_process(run_id: str, config: Path, **ids) -> subprocess.CompletedProcess:
    """``python -m monai.bundle run``, as a user types it."""
    said = [part for name, value in ids.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str(config), *said]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def start(arguments: list[str], out: Path, err: Path) -> None:
    """The command line in a process that was forked for it; what it prints goes to the files ``out`` and ``err``."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
    with out.open("w") as said, err.open("w") as warned:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(warned):
            sys.exit(main(arguments))


def after_round_0(run: Path, folder: Path) -> Path:
    """The finished run of two rounds as it was after round 0: a copy, to go on there."""
    later = ("round_1", "round_2")
    ends = (*later, "bundle", "pseudo_labels", "report.html", "metrics.csv", "review.csv")
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns(*ends))
    kept = json.loads((folder / "progress.json").read_text())
    kept["done"] = [step for step in kept["done"] if step.split("/")[0] not in later]
    (folder / "progress.json").write_text(json.dumps(kept))
    return folder


def labels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(nibabel.load(path).dataobj) for path in sorted(folder.glob("*.nii.gz"))}


def assert_same_labels(one: Path, other: Path, only: int | None = None) -> None:
    """``only``: the other folder has more, of which so many are looked at."""
    first, second = labels(one), labels(other)
    assert first and (first.keys() == second.keys() if only is None else len(first) == only)
    for name, label in first.items():
        np.testing.assert_array_equal(label, second[name], err_msg=name)


def cohort_of(templates, pool=(), classes=2, reader=None, **more):
    """A cohort of cases made by hand, with ``classes`` (names by number, or how many), and attributes for a test."""
    classes = {n: f"class {n}" for n in range(classes)} if isinstance(classes, int) else classes
    found = Cohort(Path(), tuple(templates), tuple(pool), (), (), classes, {}, reader or ScanReader())
    for name, value in more.items():
        object.__setattr__(found, name, value)
    return found
