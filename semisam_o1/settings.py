"""What the settings of a config come to, and whether a run can be made with them."""

from __future__ import annotations

import copy
from collections.abc import Callable

from monai.bundle import ConfigParser

from semisam_o1.types import DatasetError

ACTIONS = ("imports", "initialize", "run", "training", "propagate", "cohort")  # ids that are not settings
COUNTS = ("max_iterations", "iterations", "iterations_per_epoch", "most_rounds")  # settings that are counts
BUILT = ("train#optimizer", "train#augmentation", "train#method", "inferer")  # components that need no labels


def resolved(config: dict) -> dict:
    """Every setting's value: top-level ids of a raw config that come to a number, a text or a list of them."""
    parser, found = ConfigParser(copy.deepcopy(config)), {}
    for name, value in config.items():
        if name in ACTIONS or isinstance(value, dict):
            continue
        value = parser.get_parsed_content(name)
        plain = value if isinstance(value, (list, tuple)) else [value]
        if all(isinstance(part, (int, float, str, bool, type(None))) for part in plain):
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def try_out(get: Callable) -> None:
    """Build once what needs no labels: a setting that cannot be is to end the run before its long work.

    Args:
        get: (id, round) -> what the id comes to in that round.

    Raises:
        DatasetError: a setting is not what it has to be; names it and what it is.
    """
    for name in COUNTS:
        if not isinstance(value := get(name, 1), int) or value < 1:
            raise DatasetError(f"{name} is {value}: expected a whole number from 1 on.")
    for number in (1, 2):  # the first may be longer than those that follow
        steps, logged = (get(name, number) for name in ("iterations", "iterations_per_epoch"))
        if steps % logged:
            text = f"iterations_per_epoch is {logged}: expected a divisor of a round's {steps} iterations."
            raise DatasetError(text)
    sides = get("patch_size", 1)
    if not isinstance(sides, (list, tuple)) or len(sides) != 3 or not all(isinstance(n, int) for n in sides):
        raise DatasetError(f"patch_size is {sides}: expected three whole numbers, voxels along R, A and S.")
    for id in BUILT:
        try:
            get(id, 1)
        except Exception as error:  # noqa: BLE001 - whatever a component raises at a bad argument
            cause = error
            while cause.__cause__ or cause.__context__:
                cause = cause.__cause__ or cause.__context__
            raise DatasetError(f"'{id}' cannot be built with these settings: {cause}") from error
