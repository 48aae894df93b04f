"""Trained models: the bundle of a run, and checkpoints of the published code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import semisam_o1
from semisam_o1.config import Preset
from semisam_o1.datasets import Cohort
from semisam_o1.files import write_json
from semisam_o1.types import UserError
from semisam_o1.weights import read_weights

CARRIED = (
    "image_key",
    "spacing",
    "intensities",
    "patch_size",
    "overlap",
    "view_turn",
    "flip_axes",
    "amp",
    "one_piece",
)  # settings that inference shares with training


def write_bundle(run: Path, config: dict, settings: dict, cohort: Cohort, rounds: int) -> Path:
    """``run/bundle``: configs, docs and licence as shipped, the last round's weights, and the settings they want.

    Args:
        config: the raw config, of which the network's description is taken.
        settings: those as resolved.
    """
    bundle, shipped = run / "bundle", Path(semisam_o1.BUNDLE_ROOT)
    shutil.copytree(
        shipped, bundle, ignore=shutil.ignore_patterns("*.pt", "__pycache__", "__init__.py"), dirs_exist_ok=True
    )
    (bundle / "models").mkdir(exist_ok=True)
    shutil.copyfile(run / f"round_{rounds}" / "model.pt", bundle / "models" / "model.pt")

    inference = json.loads((shipped / "configs" / "inference.json").read_text())
    network = config["network_def"]
    if not isinstance(network, dict):  # chosen by the preset
        network = Preset(settings["preset"], shipped).config["network_def"]
    if isinstance(config["prediction_network"], dict):  # a method's wrapper
        network = config["prediction_network"] | {"network": network}
    text = json.dumps(network).replace("$@cohort.num_classes", "@num_classes")
    network = json.loads(text.replace("@preset", repr(settings["preset"])))
    inference |= {name: settings[name] for name in CARRIED if name in settings}
    inference |= {
        "network_def": network,
        "num_classes": cohort.num_classes,
        "working_spacing": settings["train_spacing"],
    }
    write_json(bundle / "configs" / "inference.json", inference)

    metadata = json.loads((shipped / "configs" / "metadata.json").read_text())
    channels = {str(number): name for number, name in cohort.classes.items()}
    output = metadata["network_data_format"]["outputs"]["pred"]
    output |= {"num_channels": cohort.num_classes, "channel_def": channels, "value_range": [0, cohort.num_classes - 1]}
    for end in ("inputs", "outputs"):
        for part in metadata["network_data_format"][end].values():
            part["spatial_shape"] = settings["patch_size"]
    write_json(bundle / "configs" / "metadata.json", metadata)
    return bundle


def published_model(weights: str | Path, method: str) -> dict:
    """The ids of ``inference.json`` for a checkpoint of the published code: its network, and how it saw scans.

    Scans keep their stored grid and intensities; windows of 128 a side, half overlapping, of uniform weight.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it holds no such network.
    """
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    head = read_weights(path).get("final.weight")
    if head is None:
        raise UserError(f"{path} has no 'final.weight': expected a 3D U-Net of the published code.")
    name = "UNet3DSDF" if method == "dtc" else "UNet3D"
    network = {"_target_": f"semisam_o1.networks.{name}", "in_channels": 1, "num_classes": len(head)}
    what = f"the network of '{method}', {name}({len(head)} classes)"
    loaded = {"_target_": "semisam_o1.weights.load_weights", "network": network, "file": str(path), "what": what}
    alone = {"_target_": "semisam_o1.networks.LogitsAlone", "network": loaded}
    return {
        "network_def": alone if method == "dtc" else loaded,
        "num_classes": len(head),
        "working_spacing": None,
        "intensities": None,
        "patch_size": [128, 128, 128],
        "bfloat16": False,
        "windows#mode": "constant",
        "evaluator#val_handlers#0#_disabled_": True,
    }
