"""The trained bundle says of every scan what the run's own prediction said, to the voxel."""

import json
from pathlib import Path

import numpy as np
import pytest

import semisam_o1
from semisam_o1.cli import main
from semisam_o1.job.bundle import SHARED
from tests.job.conftest import assert_same_labels, labels, small

CONFIGS = Path(semisam_o1.BUNDLE_ROOT) / "configs"
PATCH = {"patch_size": [32, 32, 16], "max_iterations": 2}  # as small as the published network takes
PAPER = PATCH | {
    "patch_size": [32, 32, 32],
    "validation_interval": 2,
    "encoder": {"_target_": "semisam_o1.encoders.mind"},
}


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--preset", "quick"], {}),
        (["--preset", "standard"], PATCH),
        (["--preset", "paper"], PAPER),
        (["--encoder", "sam_med3d"], {"feature_spacing": 0.4}),
        (["--method", "ua_mt"], {}),
        (["--method", "dan"], {}),
        (["--method", "dtc"], {}),
        (["--method", "supervised"], {"intensities": "foreground", "flip_axes": [0], "overlap": 0.25}),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_the_trained_bundle_predicts_as_the_run_did(phantom_dir, tmp_path, sam_weights, options, settings):
    made, found = tmp_path / "run", tmp_path / "found"
    if "sam_med3d" in options:
        settings = settings | {"pretrained_ckpt": str(sam_weights)}
    quick = {"num_rounds": 1, "max_iterations": 2, "label_fusion": False, "quality_estimate": False}
    dropped = ("feature_voxels", "train_voxels") if "paper" in options else ()
    said = [text for text in small(**quick | settings) if not text.startswith(dropped or "\0")]
    assert main(["run", str(phantom_dir), "--output", str(made), "--device", "cpu", *options, *said]) == 0
    predictions = made / "round_1" / "predictions"
    images = [str(phantom_dir / "images" / name) for name in labels(predictions)]
    assert main(["predict", *images, "--run", str(made), "--output", str(found), "--device", "cpu"]) == 0
    assert_same_labels(found / "labels", predictions)
    for name, map_ in labels(made / "round_1" / "uncertainty").items():
        np.testing.assert_array_equal(map_, labels(found / "uncertainty")[name])


def test_both_configs_describe_prediction_alike():
    train, inference = (json.loads((CONFIGS / name).read_text()) for name in ("train.json", "inference.json"))
    described = set(SHARED) | {"windows", "network", "bfloat16", "intensities", "overlap", "view_turn", "flip_axes"}
    follow_from_data = {"largest_component"}
    for id in described - follow_from_data:
        assert train[id] == inference[id], id
