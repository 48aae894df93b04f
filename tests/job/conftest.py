"""Jobs on phantoms, small enough to take seconds, and what they are compared by."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from semisam_o1.cli import main
from semisam_o1.encoders import SAMMed3DEncoder

SMALL = {  # volumes and schedules that take seconds
    "feature_voxels": 12000,
    "train_voxels": 6000,
    "max_iterations": 4,
    "iterations_per_epoch": 2,
    "num_rounds": 2,
    "knn_k": 2,
    "uncertainty_quantile": 0.5,
}


def small(**more) -> list[str]:
    """SMALL and ``more`` as the command line takes them."""
    return ["--set", *(f"{name}={json.dumps(value)}" for name, value in (SMALL | more).items())]


def labels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(nibabel.load(path).dataobj) for path in sorted(folder.glob("*.nii.gz"))}


def assert_same_labels(one: Path, other: Path, only: int | None = None) -> None:
    """``only``: the other folder has more, of which so many are looked at."""
    first, second = labels(one), labels(other)
    assert first and (first.keys() == second.keys() if only is None else len(first) == only)
    for name, label in first.items():
        np.testing.assert_array_equal(label, second[name], err_msg=name)


@pytest.fixture(scope="session")
def run(phantom_dir, tmp_path_factory) -> Path:
    """A finished run by the command line; not to be written to."""
    output = tmp_path_factory.mktemp("job") / "run"
    assert main(["run", str(phantom_dir), "--output", str(output), "--device", "cpu", *small()]) == 0
    return output


@pytest.fixture(scope="session")
def sam_weights(tmp_path_factory) -> Path:
    """Random weights in the form of the released checkpoint: for the plumbing alone."""
    path = tmp_path_factory.mktemp("weights") / "sam_med3d_turbo.pth"
    state = SAMMed3DEncoder().state_dict()
    torch.save({"model_state_dict": {f"image_encoder.{k}": v for k, v in state.items()}}, path)
    return path
