"""What a run hands out once its rounds are done: labels, the list for review, figures, versions."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import semisam_o1
from semisam_o1.datasets import Cohort
from semisam_o1.engine import UncertaintyList
from semisam_o1.files import whole, write_text
from semisam_o1.metrics import evaluate_folder
from semisam_o1.refining import switched_off_before
from semisam_o1.round_0 import QualityList
from semisam_o1.settling import labels_dir
from semisam_o1.types import Case

PACKAGES = ("torch", "monai", "pytorch-ignite", "numpy", "nibabel", "SimpleITK", "h5py", "faiss-cpu", "itk", "scipy")


def hand_out(round_dir: Path, target: Path, cases: Sequence[Case]) -> None:
    """Copy the labels that a round ends with, each whole or not at all."""
    source = labels_dir(round_dir)
    target.mkdir(exist_ok=True)
    for case in cases:
        if (source / f"{case.name}.nii.gz").exists():
            with whole(target / f"{case.name}.nii.gz") as aside:
                shutil.copyfile(source / f"{case.name}.nii.gz", aside)


def write_review(round_dir: Path, path: Path, cases: Sequence[Case]) -> None:
    """The cases to look at as a CSV, those first whose label of that round is trusted least."""
    uncertainty = UncertaintyList(round_dir / "uncertainty.csv").read()
    quality = QualityList(round_dir / "quality.csv").read()
    names = [case.name for case in cases if case.name in uncertainty]
    predicted = {name: quality[name].predicted_dice for name in names if name in quality}
    names.sort(key=lambda name: (predicted.get(name, 1.0), -uncertainty[name], name))
    said = {name: f"{predicted[name]:.4f}" if name in predicted else "" for name in names}
    rows = [f"{name},{uncertainty[name]:.6f},{said[name]}" for name in names]
    write_text(path, "\n".join(["case,uncertainty,predicted_dice", *rows]) + "\n")


def scores(output: Path, cohort: Cohort, splits: Sequence[str], rounds: int, definition: str) -> list[dict]:
    """Rows of metrics.csv for whatever labels of rounds 0 to ``rounds`` are there and truth exists for."""
    found, known = [], {}
    for split in splits:
        cases = cohort.split(split)
        for number in range(rounds + 1):
            folder = output / f"round_{number}"
            stages = {"copied": folder / "copied", "propagated": folder / "labels"}
            if number:
                stages = {"predicted": folder / "predictions"}
                if not switched_off_before(output, number + 1):
                    stages["refined"] = folder / "labels"  # else they are the predictions
            for stage, labels in stages.items():
                found += evaluate_folder(
                    labels, cases, cohort, split=split, round=number, stage=stage, definition=definition, known=known
                )
    return found


def versions() -> dict[str, str]:
    """Of this package and those it stands on."""
    return {"semisam-o1": semisam_o1.__version__} | {name: version(name) for name in PACKAGES}
