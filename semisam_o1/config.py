"""How the JSON configs reach presets, and how a stage reaches the config it stands in."""

from __future__ import annotations

import inspect
from pathlib import Path

from monai.bundle import ConfigParser

from semisam_o1.types import DatasetError


class Preset:
    """The overlay ``configs/presets/<name>.json``, asked for single ids: how ``train.json`` chooses by device.

    ``preset("max_iterations")`` gives a value, ``preset("network_def", cohort=cohort)`` builds a component in which
    ``@cohort`` stands. Named on the command line, the same file is laid over ``train.json`` as a whole.
    """

    def __init__(self, name: str, bundle_root: str | Path):
        folder = Path(bundle_root) / "configs" / "presets"
        if not (folder / f"{name}.json").is_file():
            known = ", ".join(sorted(path.stem for path in folder.glob("*.json")))
            raise DatasetError(f"There is no preset '{name}': choose one of {known}.")
        self.config = ConfigParser.load_config_file(str(folder / f"{name}.json"))

    def __call__(self, id: str, **given):
        return ConfigParser({**self.config, **given}).get_parsed_content(id)


def config_in_use() -> dict:
    """The raw config of the parser that is evaluating the ``$`` expression in which this is called.

    MONAI hands an expression what it refers to, but not the config itself, which three things need: a round builds
    its trainer afresh from it, ``run.json`` records it, and the trained bundle carries it on.
    """
    for caller in inspect.stack():
        parser = caller.frame.f_locals.get("self")
        if isinstance(parser, ConfigParser):
            return parser.get()
    raise RuntimeError("config_in_use() has a meaning only inside an expression of a MONAI bundle config.")
