"""What the values of command line options are: they are parsed and checked by kind, as settings are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from semisam_o1.kinds import KINDS, Kind, shown, whole
from semisam_o1.types import DatasetError

READER_IDS = ("image_key", "spacing", "nifti_form", "most_voxels")
OF_SCANS = (*READER_IDS, "channel", "feature_voxels", "window", "find_no_data")  # settings of suggest-template


def folder(text: str) -> Path:
    """Parse the path of results."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("an empty text, or one with a null byte; expected a path")
    return Path(text)


def count(text: str) -> int:
    """Parse a number of things."""
    return _fitting(text, whole(1, 10**6))


def seed(text: str) -> int:
    """Parse the value of ``--seed``."""
    return _fitting(text, KINDS["seed"])


def side(text: str) -> float:
    """Parse one number of ``--spacing``."""
    return _fitting(text, Kind(low=KINDS["spacing"].low, high=KINDS["spacing"].high))


def rounds(text: str) -> int | str:
    """Parse the value of ``--rounds``."""
    return _fitting(text, KINDS["num_rounds"])


def threads(text: str) -> int | None:
    """Parse the value of ``--threads``."""
    return _fitting(text, KINDS["threads"])


def _fitting(text: str, kind: Kind) -> Any:
    """The value of an option, of the given kind."""
    value = read(text)
    if not kind.fits(value):
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected {kind}")
    return value


def read(text: str) -> Any:
    """JSON if ``text`` parses as JSON, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or one that is too large
        return text


def pairs(settings: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and value of each ``ID=VALUE`` of ``--set``.

    Raises:
        DatasetError: a text has another form.
    """
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise DatasetError(f"--set {setting}: expected ID=VALUE, e.g. max_iterations=2000.")
        yield name, value
