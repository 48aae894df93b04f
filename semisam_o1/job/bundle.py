"""Trained models: the bundle that a run writes, and checkpoints of the published code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import semisam_o1
from semisam_o1.files import read_json, write_json
from semisam_o1.job.config import JobConfig
from semisam_o1.literals import as_config, harmless
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import DatasetError
from semisam_o1.weights import published_classes

# Ids that train.json and inference.json share: preprocessing, network, inferer, postprocessing and the reading of HDF5.
SHARED = (
    "preprocessing",
    "network_def",
    "prediction_network",
    "inferer",
    "largest_component",
    "uncertainty",
    "amp",
    "reader",
    "class_numbers",
)
KEPT = ("device", "network", "imports")  # ids of inference.json that stay as shipped although SHARED refers to them


def prediction_config(config: JobConfig) -> dict:
    """The ids SHARED and all ids that they refer to. Values that depend on the data set are resolved, others raw.

    A network with several outputs is wrapped so that it returns its logits only, because MONAI Label reads only
    ``network_def``.
    """
    found, waiting = {}, list(SHARED)
    while waiting:
        name = waiting.pop()
        if name in found or name in KEPT:
            continue
        if name in config.settings and "cohort" in config.needed([name]):
            found[name] = as_config(config.settings[name])
        else:
            found[name] = config.raw[name]
            waiting += config.refers_to(name)
    if isinstance(found["prediction_network"], dict):
        found["network_def"] = found["prediction_network"] | {"network": found["network_def"]}
        found["prediction_network"] = "@network"
    return found


def write_bundle(run: RunFolder, config: JobConfig, round: int) -> None:
    """Write ``run/bundle``: shipped configs, docs and licence, the weights of ``round`` and the prediction config.

    The output is of MONAI's format "segmentation", whose ``channel_def`` names the values in a label, and MONAI Label
    reads it so: these are the class numbers, which may have gaps. The network's channels have the same order.
    """
    bundle, shipped = run.bundle, Path(semisam_o1.BUNDLE_ROOT)
    made = (bundle / "configs" / "inference.json", bundle / "configs" / "metadata.json")
    files = {bundle / path.relative_to(shipped): path for path in sorted(shipped.rglob("*")) if is_shipped(path)}
    files[bundle / "models" / "model.pt"] = run.round(round).model
    for target, source in files.items():
        if target not in made:
            with run.ledger.writing(target) as aside:
                shutil.copyfile(source, aside)

    inference = json.loads((shipped / "configs" / "inference.json").read_text(encoding="utf-8"))
    with run.ledger.writing(made[0]) as aside:
        write_json(aside, inference | prediction_config(config))

    cohort = config.cohort
    metadata = json.loads((shipped / "configs" / "metadata.json").read_text(encoding="utf-8"))
    numbers = cohort.class_numbers
    names = {str(number): harmless(cohort.classes[number]) for number in numbers}
    output = metadata["network_data_format"]["outputs"]["pred"]
    output |= {"num_channels": cohort.num_classes, "channel_def": names, "value_range": [0, numbers[-1]]}
    for end in ("inputs", "outputs"):
        for part in metadata["network_data_format"][end].values():
            part["spatial_shape"] = config.setting("patch_size")
    with run.ledger.writing(made[1]) as aside:
        write_json(aside, metadata)


def is_shipped(path: Path) -> bool:
    """Whether a file of the package's bundle belongs into a trained bundle."""
    return (
        path.is_file()
        and path.suffix not in (".pt", ".ts")
        and path.name != "__init__.py"
        and "__pycache__" not in path.parts
    )


def trained_config(run: RunFolder) -> dict:
    """The content of ``inference.json`` of a run's trained bundle. It is code: parse it only to predict.

    Raises:
        DatasetError: the run has no trained bundle, or its config is damaged.
    """
    path = run.bundle / "configs" / "inference.json"
    if not path.is_file():
        found = "no trained bundle there" if run.path.is_dir() else "no such folder"
        raise DatasetError(f"{run.path}: {found}; expected the folder of a finished run.")
    config = read_json(path)
    if missing := [id for id in ("network_def", "evaluator", "run") if id not in config]:
        raise DatasetError(f"{path} is damaged: no {', '.join(missing)}. Give the command of the run again.")
    return config


def published_model(weights: str | Path, method: str) -> dict:
    """The ids of ``inference.json`` for a checkpoint of the published code: its network and its preprocessing.

    Scans keep their stored grid and intensities. Windows have 128 voxels a side, overlap by half and have equal weight.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it contains no such network.
    """
    classes = published_classes(weights)
    name = "UNet3DSDF" if method == "dtc" else "UNet3D"
    network = {"_target_": f"semisam_o1.networks.{name}", "in_channels": 1, "num_classes": classes}
    what = as_config(f"the network of '{method}', {name}({classes} classes)")
    loaded = {"_target_": "semisam_o1.weights.load_weights", "network": network, "what": what}
    loaded["file"] = as_config(Path(weights))
    alone = {"_target_": "semisam_o1.networks.LogitsAlone", "network": loaded}
    return {
        "network_def": alone if method == "dtc" else loaded,
        "out_channels": classes,
        "class_numbers": list(range(classes)),
        "train_spacing": None,
        "intensities": None,
        "patch_size": [128, 128, 128],
        "bfloat16": False,
        "preprocessing#bundle_root": None,  # the weights are not the bundle's
        "windows#mode": "constant",
        "view_turn": 0,
        "handlers#0#_disabled_": True,
    }
