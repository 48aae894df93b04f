"""The trained bundle says of every scan what the run's own prediction said, to the voxel; published checkpoints."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from semisam_o1.cli import main
from semisam_o1.job.bundle import SHARED, published_model
from semisam_o1.networks.unet3d import UNet3D, UNet3DSDF
from tests.jobs import CONFIGS, assert_same_labels, bundle_process, labels, small

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden files in {GOLDEN}")
PATCH = {"patch_size": [32, 32, 16], "max_iterations": 2}  # as small as the published network takes
PAPER = PATCH | {
    "patch_size": [32, 32, 32],
    "validation_interval": 2,
    "encoder": {"_target_": "semisam_o1.encoders.mind"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--preset", "quick"], {}),
        (["--preset", "standard"], PATCH),
        (["--preset", "paper"], PAPER),
        (["--encoder", "sam_med3d"], {"feature_spacing": 0.4}),  # at 1.5 mm no organ fills a token
        (["--method", "ua_mt"], {}),
        (["--method", "dan"], {}),
        (["--method", "dtc"], {}),
        (["--method", "supervised"], {"intensities": "foreground", "flip_axes": [0], "overlap": 0.25}),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_the_trained_bundle_predicts_as_the_run_did(begun, phantom_dir, tmp_path, sam_weights, options, settings):
    made, found = begun, tmp_path / "found"
    if {"sam_med3d", "paper"} & set(options):  # of other features: from the beginning
        made, settings = tmp_path / "run", settings | {"pretrained_ckpt": str(sam_weights)}
    of_preset = ("feature_voxels", "finer_features", "train_voxels") if "paper" in options else ()
    dropped = ("view_turn", *of_preset)
    quick = {"num_rounds": 1, "max_iterations": 2} | settings
    said = [text for text in small(**quick) if not text.startswith(dropped)]
    assert main(["run", str(phantom_dir), "--output", str(made), "--device", "cpu", *options, *said]) == 0
    predictions = made / "round_1" / "predictions"
    images = [str(phantom_dir / "images" / name) for name in labels(predictions)]
    assert main(["predict", *images, "--run", str(made), "--output", str(found), "--device", "cpu"]) == 0
    assert_same_labels(found / "labels", predictions)
    for name, map_ in labels(made / "round_1" / "uncertainty").items():
        np.testing.assert_array_equal(map_, labels(found / "uncertainty")[name])
    weights = torch.load(made / "bundle" / "models" / "model.pt", weights_only=True)
    assert ("final2.weight" in weights) == ("dtc" in options)  # both heads of a network that has two


def test_both_configs_describe_prediction_alike():
    train, inference = (json.loads((CONFIGS / name).read_text()) for name in ("train.json", "inference.json"))
    described = set(SHARED) | {"windows", "network", "bfloat16", "intensities", "overlap", "view_turn", "flip_axes"}
    follow_from_data = {"largest_component", "class_numbers"}
    assert inference["preprocessing"]["_target_"] == "semisam_o1.clinic.trained_alone"  # the shipped one alone
    inference["preprocessing"] = inference["preprocessing"]["chain"]
    for id in described - follow_from_data:
        assert train[id] == inference[id], id


@pytest.mark.slow
def test_trained_bundle_labels_a_new_scan_like_predict(run, phantom_dir, tmp_path):
    scan = next((phantom_dir / "images").glob("*"))
    new = tmp_path / "new" / scan.name
    new.parent.mkdir()
    shutil.copyfile(scan, new)
    trained = run / "bundle"
    done = bundle_process(
        "run", trained / "configs" / "inference.json",
        bundle_root=trained, dataset_dir=new.parent, output_dir=tmp_path / "by_bundle", device="cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert main(["predict", str(new), "--run", str(run), "--output", str(tmp_path / "by_command")]) == 0
    assert_same_labels(tmp_path / "by_bundle" / "labels", tmp_path / "by_command" / "labels")
    assert len(labels(tmp_path / "by_command" / "uncertainty")) == 1
    assert len((tmp_path / "by_command" / "uncertainty.csv").read_text().splitlines()) == 2


@pytest.mark.slow
@needs_golden
@pytest.mark.parametrize(("method", "network"), [("mt", UNet3D), ("dtc", UNet3DSDF)])
def test_predict_with_a_published_checkpoint(tmp_path, method, network):
    """Stored grid and intensities, windows of 128: what the network itself gives."""
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    model = network(1, 2).eval()
    weights.fill(model)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "round3_best.pth")
    image = weights.unet_input()
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["image"] = image[0, 0].numpy()
    command = ["predict", str(tmp_path / "scan.h5"), "--weights", str(tmp_path / "round3_best.pth")]
    assert published_model(tmp_path / "round3_best.pth", method)["patch_size"] == [128, 128, 128]
    assert main([*command, "--method", method, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    (found,) = labels(tmp_path / "out" / "labels").values()
    side = 128
    inside = [slice((side - n) // 2, (side + n) // 2) for n in image.shape[2:]]
    padded = torch.zeros(1, 1, side, side, side)
    padded[0, 0, *inside] = image[0, 0]
    with torch.no_grad():
        logits = model(padded)[1] if method == "dtc" else model(padded)
    np.testing.assert_array_equal(found, logits[0][:, *inside].argmax(0))
    other = "dtc" if method == "mt" else "mt"
    assert main([*command, "--method", other, "--output", str(tmp_path / "o"), "--device", "cpu"]) == 2


def test_predict_leaves_out_what_cannot_be_read(run, phantom_dir, tmp_path, capsys):
    good, bad = next((phantom_dir / "images").iterdir()), tmp_path / "bad.nii.gz"
    bad.write_bytes(b"not an image")
    command = ["predict", "--run", str(run), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*command, str(bad), str(good)]) == 1
    assert list(labels(tmp_path / "out" / "labels")) == [good.name]
    said = capsys.readouterr()
    assert "begins with text" in " ".join((said.err + said.out).split())
    assert "left out, 1 of 2: bad" in said.err
    folder = tmp_path / "scans"
    folder.mkdir()
    shutil.copy(good, folder)
    (folder / "gone.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    assert main([*command, str(folder)]) == 1 and "left out, 1 of 2: gone" in capsys.readouterr().err
    assert main([*command, str(bad)]) == 2 and "The image cannot be used" in capsys.readouterr().err


@pytest.mark.slow
def test_class_numbers_come_out_as_they_are(phantom_dir, tmp_path):
    """FreeSurfer's 17 and 53: three channels, and labels, metrics, bundle and predictions with these numbers."""
    data, run, out = shutil.copytree(phantom_dir, tmp_path / "data"), tmp_path / "run", tmp_path / "out"
    for path in (data / "labels").iterdir():
        image = nibabel.load(path)
        numbers = np.array([0, 17, 53], np.uint8)[np.asarray(image.dataobj).astype(int)]
        nibabel.save(nibabel.Nifti1Image(numbers, None, image.header), path)
    (data / "classes.json").write_text('{"17": "left", "53": "right"}')
    assert main(["run", str(data), "--output", str(run), "--device", "cpu", *small(num_rounds=1)]) == 0
    for name, label in labels(run / "pseudo_labels").items():
        assert set(np.unique(label)) <= {0, 17, 53}, name
    with (run / "metrics.csv").open() as file:
        assert {row["class"] for row in csv.DictReader(file)} == {"17", "53", "mean"}
    assert json.loads((run / "run.json").read_text())["classes"] == {"0": "background", "17": "left", "53": "right"}
    metadata = json.loads((run / "bundle" / "configs" / "metadata.json").read_text())
    output = metadata["network_data_format"]["outputs"]["pred"]  # MONAI Label takes its keys for the values in labels
    assert output["channel_def"] == {"0": "background", "17": "left", "53": "right"}
    assert output["num_channels"] == 3 and output["value_range"] == [0, 53]
    scans = [str(data / "images" / name) for name in labels(run / "round_1" / "predictions")]
    assert main(["predict", *scans, "--run", str(run), "--output", str(out), "--device", "cpu"]) == 0
    assert_same_labels(run / "round_1" / "predictions", out / "labels")
    assert main(["evaluate", str(run), str(data), "--device", "cpu"]) == 0
    assert main(["test", str(data), "--run", str(run), "--device", "cpu"]) == 0
    parser = ConfigParser(json.loads((run / "bundle" / "configs" / "inference.json").read_text()))
    parser["bundle_root"], parser["device"] = str(run / "bundle"), "cpu"
    item = parser.get_parsed_content("preprocessing")({"case": "a", "image": scans[0]})
    item["pred"] = torch.stack([item["image"][0] * 0, item["image"][0] * 0 + 9, item["image"][0] * 0])
    found = parser.get_parsed_content("postprocessing")(item)["pred"]
    assert set(found.unique().tolist()) == {17.0}
