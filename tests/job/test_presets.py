"""Presets and methods by name."""

import pytest
import torch

from semisam_o1.cli import main, parser
from semisam_o1.job.evaluate import evaluate_run
from semisam_o1.workflows import config_files
from tests.jobs import CONFIGS, SMALL, assert_same_labels, bundle, small


@pytest.mark.slow
def test_paper_preset(phantom_dir, tmp_path, sam_weights, capfd):
    """By the bundle with two config files, as the page has it; the network is a narrow one."""
    ids = {k: v for k, v in SMALL.items() if k not in ("train_voxels", "feature_voxels", "finer_features")}
    ids |= {"patch_size": [32, 32, 32], "num_rounds": 1, "validation_interval": 2, "network_widths": [4, 8, 16, 32, 64]}
    ids |= {"pretrained_ckpt": str(sam_weights), "device": "cpu"}
    ids |= {"dataset_dir": str(phantom_dir), "output_dir": str(tmp_path)}
    bundle("training", CONFIGS / "train.json", CONFIGS / "presets" / "paper.json", **ids)
    said = "".join(capfd.readouterr())
    assert "HD95 voxels" in said and "HD95 mm" not in said
    assert "HD95 voxels" in evaluate_run(tmp_path, phantom_dir, "test")
    assert (tmp_path / "round_1" / "round1_best.pth").is_file()
    chosen = torch.load(tmp_path / "round_1" / "round1_best.pth", weights_only=True)
    chosen, kept = chosen.get("model", chosen), torch.load(tmp_path / "round_1" / "model.pt", weights_only=True)
    assert all(torch.equal(chosen[name], kept[name]) for name in kept)


@pytest.mark.slow
def test_method_overlay_is_the_default(run, begun, phantom_dir):
    assert main(["run", str(phantom_dir), "--output", str(begun), "--method", "mean_teacher", *small()]) == 0
    assert_same_labels(run / "pseudo_labels", begun / "pseudo_labels")


@pytest.mark.parametrize(("published", "ours"), [("mt", "mean_teacher"), ("uamt", "ua_mt"), ("dan", "dan")])
def test_methods_have_their_published_names_too(published, ours):
    options = parser().parse_args(["run", "DIR", "--output", "RUN", "--method", published, "--preset", "quick"])
    assert config_files(options)[-1].name == f"{ours}.json"
