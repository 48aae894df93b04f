"""From the options of a command to the bundle's workflow: which configs, and what overrides them."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import semisam_o1
from semisam_o1.literals import as_config
from semisam_o1.options import pairs, read
from semisam_o1.types import DatasetError

if TYPE_CHECKING:
    from monai.bundle import ConfigWorkflow

CONFIGS = Path(semisam_o1.BUNDLE_ROOT) / "configs"
PUBLISHED = ("mt", "uamt", "dan", "dtc")  # methods of the published code
PUBLISHED_NAMES = {"mt": "mean_teacher", "uamt": "ua_mt"}  # published name of a method -> ours


def names(folder: str) -> list[str]:
    """The overlays in a folder of the bundle's configs."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.json"))


def overrides(options: argparse.Namespace) -> dict:
    """The config ids that the command line overrides, as config.

    Options are data. The values of ``--set`` are config, i.e. code: JSON if they parse as JSON, else text.

    Raises:
        DatasetError: a setting is not of the form ID=VALUE.
    """
    ids = ["dataset_dir", "output_dir", "pseudonyms", "template", "num_rounds", "seed", "split", "restart_from"]
    ids.append("reviewed")
    changed = {name: as_config(value) for name in ids if (value := getattr(options, name, None)) not in (None, [])}
    if options.device != "auto":
        changed["device"] = as_config(options.device)
    return changed | {name: read(value) for name, value in pairs(options.settings)}


def workflow(files: list[Path], run_id: str, changed: dict, workflow_type: str = "train") -> ConfigWorkflow:
    """MONAI's workflow of config ``files`` with the ids ``changed``.

    Raises:
        DatasetError: the config has no such id, or a value has the wrong kind.
    """
    from monai.bundle import ConfigWorkflow

    from semisam_o1.job.config import Config, override

    logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)  # it warns about overlays in folders
    log_file = str(CONFIGS / "logging.conf")
    made = ConfigWorkflow([str(f) for f in files], logging_file=log_file, run_id=run_id, workflow_type=workflow_type)
    if (name := changed.get("preset")) is not None:
        raise DatasetError(f"--set preset={name}: a preset is a file of settings; use --preset {name}.")
    override(made.parser, changed)
    Config(made.parser.get())
    return made


def execute(workflow: ConfigWorkflow) -> None:
    workflow.initialize()
    workflow.run()
    workflow.finalize()


def preset(options: argparse.Namespace) -> str:
    """The preset that the options name; else `standard` if CUDA will be used, `quick` if not."""
    import torch

    if options.preset:
        return options.preset
    cuda = torch.cuda.is_available() if options.device == "auto" else options.device.startswith("cuda")
    return "standard" if cuda else "quick"


def config_files(options: argparse.Namespace) -> list[Path]:
    """``train.json`` and the overlays that the options name; later files override earlier ones.

    Raises:
        DatasetError: there is no such method.
    """
    files = [CONFIGS / "train.json"]
    for kind in ("presets", "methods", "encoders", "refinements"):
        name = preset(options) if kind == "presets" else getattr(options, kind[:-1], None)
        if name is None:
            continue
        name = PUBLISHED_NAMES.get(name, name) if kind == "methods" else name
        if name not in names(kind):
            raise DatasetError(f"There is no {kind[:-1]} '{name}': choose one of {', '.join(names(kind))}.")
        files.append(CONFIGS / kind / f"{name}.json")
    return files
