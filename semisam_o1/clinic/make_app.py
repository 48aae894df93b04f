"""Writes the app for MONAI Label: a folder with our app and a bundle, for ``monailabel start_server --app``."""

from __future__ import annotations

import shutil
from pathlib import Path

from semisam_o1.files import write_text
from semisam_o1.types import UserError

MODEL = "semisam_o1"  # the bundle's name in the app
NOT_SERVED = ("__init__.py", "__pycache__", "run", "studies")  # of a bundle: Python's, and what a server learned
MAIN = '''"""An app for MONAI Label, written by ``semisam-o1 monailabel-app``."""

from monailabel.interfaces.app import MONAILabelApp

from semisam_o1.clinic.app import ReviewApp


class App(ReviewApp, MONAILabelApp):
    pass
'''


def make_app(output: str | Path, bundle: str | Path) -> Path:
    """Write the app to a new folder, with a copy of a bundle in model/semisam_o1; returns the folder.

    Args:
        bundle: the package's bundle, or RUN/bundle.

    Raises:
        UserError: the folder exists and is not empty, or there is no such bundle.
    """
    output, bundle = Path(output), Path(bundle)
    if not (bundle / "configs" / "inference.json").is_file():
        expected = "RUN/bundle of a run that trained a network"
        raise UserError(f"{bundle}: no bundle there (no configs/inference.json); expected {expected}.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists. Name another folder: the app holds what the server learns.")
    shutil.copytree(bundle, output / "model" / MODEL, ignore=shutil.ignore_patterns(*NOT_SERVED))
    write_text(output / "main.py", MAIN)  # last: without it, it is no app
    return output
