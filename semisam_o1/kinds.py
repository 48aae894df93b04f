"""The kind and range of every setting, checked before any work."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from semisam_o1.types import DatasetError

MISSING = object()
LARGEST = 10**12  # of any number: larger ones are mistakes


@dataclass(frozen=True)
class Kind:
    """What a setting may be.

    Attributes:
        whole: a whole number; else any number.
        low, high: smallest and largest number; ``above``, ``below``: these themselves are excluded.
        null: None is allowed. words: texts that are allowed; ``text``: any text is; ``pattern``: texts like ``example``
            are. truth: true or false. part: a component of the config.
        length: a list of so many numbers; ``lists``: a list of any length, a number alone too if ``alone``.
        rows: a part of a list may itself be a list of so many numbers.
    """

    whole: bool = False
    low: float = -LARGEST
    high: float = LARGEST
    above: bool = False
    below: bool = False
    numbers: bool = True
    null: bool = False
    words: tuple[str, ...] = ()
    text: bool = False
    pattern: str = ""
    example: str = ""
    truth: bool = False
    part: bool = False
    length: int | None = None
    lists: bool = False
    alone: bool = True
    rows: int | None = None

    def fits(self, value: Any) -> bool:
        if value is None:
            return self.null
        if isinstance(value, bool):
            return self.truth
        if isinstance(value, str):
            fits = value in self.words or bool(self.pattern and re.fullmatch(self.pattern, value))
            return fits or (self.text and bool(value.strip()) and "\0" not in value)
        if isinstance(value, (list, tuple)):
            one = Kind(self.whole, self.low, self.high, self.above, self.below, self.numbers, text=self.text)
            right = len(value) == self.length if self.length is not None else self.lists
            row = one if self.rows is None else replace(one, length=self.rows)
            return right and all((row if isinstance(part, (list, tuple)) else one).fits(part) for part in value)
        if not isinstance(value, (int, float)):
            return self.part
        return self.numbers and self.alone and self._is_number(value)

    def _is_number(self, value: Any) -> bool:
        if self.whole and not isinstance(value, int):
            return False
        inside = bool(abs(value) <= LARGEST and self.low <= value <= self.high)  # False for NaN
        return inside and not (self.above and value == self.low) and not (self.below and value == self.high)

    def __str__(self) -> str:
        """What is expected, as messages and docs/settings.md say it."""
        said = []
        if self.truth:
            said.append("true or false")
        if self.numbers:
            said.append(self._numbers())
        if self.text:
            said.append("a list of texts" if self.lists else "a text")
        if self.part:
            said.append("a component")
        said += self.words
        if self.example:
            said.append(self.example)
        if self.null:
            said.append("null")
        return " or ".join(said)

    def _numbers(self) -> str:
        one = "whole number" if self.whole else "number"
        bounds = []
        if self.low > -LARGEST:
            bounds.append(f"above {self.low:,.10g}" if self.above else f"from {self.low:,.10g}")
        if self.high < LARGEST:
            bounds.append(f"to below {self.high:,.10g}" if self.below else f"to {self.high:,.10g}")
        range_ = f" {' '.join(bounds)}" if bounds else ""
        several = f"{self.length} {one}s{range_}" if self.length else f"a list of {one}s{range_}"
        several += "" if self.rows is None else f", or of {self.rows} of them for a part"
        single = f"a {one}{range_}"
        if self.length is None and not self.lists:
            return single
        return f"{single} or {several}" if self.alone else several


def whole(low: float = 0, high: float = LARGEST, **more: Any) -> Kind:
    return Kind(whole=True, low=low, high=high, **more)


def words(*texts: str, **more: Any) -> Kind:
    return Kind(numbers=False, words=texts, **more)


TRUTH = Kind(numbers=False, truth=True)
TEXT = Kind(numbers=False, text=True)
SHARE = Kind(low=0, high=1)
POSITIVE = Kind(low=0, above=True)
WORKING = Kind(low=0.001, high=100, null=True)  # mm, of a voxel; None: the stored grid
INTENSITIES = words("percentiles", "foreground", null=True)

KINDS: dict[str, Kind] = {
    "dataset_dir": TEXT,
    "output_dir": TEXT,
    "bundle_root": TEXT,
    "device": words("cpu", "cuda", pattern=r"cuda:\d{1,3}", example="cuda:0, cuda:1, ..."),
    "threads": whole(1, 4096, null=True),
    "seed": whole(0, 4_000_000_000),
    "preset": TEXT,
    "template": Kind(numbers=False, text=True, lists=True),
    "labeled_num": whole(1),
    "num_classes": whole(2, 250, null=True),
    "binary_label": TRUTH,
    "image_key": TEXT,
    "nifti_form": words("itk", "sform", "qform"),
    "most_voxels": whole(1_000),
    "renumber": TRUTH,
    "channel": whole(0, 9999, null=True),
    "label_shape": words("check", "trust"),
    "class_numbers": Kind(whole=True, low=0, high=65535, lists=True, alone=False),
    "window": Kind(low=-LARGEST, high=LARGEST, null=True, length=2, alone=False),
    "find_no_data": TRUTH,
    "spacing": Kind(low=0.001, high=1000, null=True, length=3),
    "need_pool": TRUTH,
    "pseudonyms": Kind(numbers=False, text=True, null=True),
    "reviewed": Kind(numbers=False, text=True, null=True),
    "out_channels": whole(2, 250),
    "feature_voxels": Kind(low=500, high=1e9),
    "finer_features": Kind(low=1, high=1000),
    "feature_spacing": WORKING,
    "feature_dtype": words("float16", "float32"),
    "feature_intensities": INTENSITIES,
    "feature_overlap": Kind(low=0, high=1, below=True),
    "feature_crop": words("center", null=True),
    "feature_step": whole(1, null=True),
    "pretrained_ckpt": TEXT,
    "encoder_precision": words("float32", "bfloat16", "float16"),
    "encoder_compiled": TRUTH,
    "split": words("pool", "val", "test"),
    "frame": words("world", "stored"),
    "label_fusion": TRUTH,
    "propagation#label_fusion#atlases": whole(1),
    "propagation#label_fusion#labelled_atlases": whole(1),
    "quality_estimate": TRUTH,
    "min_predicted_dice": SHARE,
    "template_copies": whole(0),
    "published_terms": TRUTH,
    "num_rounds": whole(0, 1000, words=("auto",)),
    "most_rounds": whole(1, 1000),
    "least_change": SHARE,
    "quality_tolerance": SHARE,
    "restart_from": Kind(numbers=False, text=True, null=True),
    "checkpoint_seconds": Kind(low=0),
    "round": whole(0, 1000),
    "train_voxels": Kind(low=500, high=1e9),
    "train_spacing": replace(WORKING, length=3),
    "patch_voxels": Kind(low=500, high=1e9),
    "patch_size": Kind(whole=True, low=1, high=4096, length=3, alone=False),
    "intensities": INTENSITIES,
    "network_strides": Kind(whole=True, low=1, high=8, lists=True, alone=False, rows=3),
    "network_widths": Kind(whole=True, low=1, high=4096, length=5, alone=False),
    "max_iterations": whole(1),
    "first_round_factor": POSITIVE,
    "iterations": whole(1),
    "iterations_per_epoch": whole(1),
    "labelled_batch": whole(0, 1000),
    "pool_batch": whole(0, 1000),
    "learning_rate": Kind(low=0, high=1000, above=True),
    "train#optimizer#weight_decay": Kind(low=0),
    "warm_start": TRUTH,
    "pseudo_rampup": SHARE,
    "consistency": Kind(low=0),
    "consistency_rampup": Kind(low=0),
    "average_alpha": Kind(low=0, high=1, below=True),
    "average_horizon": Kind(low=0, high=1, above=True, null=True),
    "amp": TRUTH,
    "bfloat16": TRUTH,
    "affine_prob": SHARE,
    "cache_num": whole(0),
    "late_learning_rate": TRUTH,
    "anew_each_pass": TRUTH,
    "teacher_start": Kind(numbers=False, part=True, null=True),
    "threshold_classes": whole(2, 250, null=True),
    "validation_interval": whole(1),
    "overlap": Kind(low=0, high=1, below=True),
    "view_turn": Kind(low=0, high=3.14),
    "windows#sw_batch_size": whole(1),
    "windows#mode": words("gaussian", "constant"),
    "flip_axes": Kind(whole=True, low=0, high=2, lists=True, alone=False),
    "largest_component": Kind(whole=True, low=0, high=65535, lists=True, alone=False),
    "knn_k": whole(1),
    "uncertainty_quantile": SHARE,
    "refine_last": TRUTH,
    "guard": TRUTH,
    "least_gain": Kind(low=-1, high=1),
    "unsure": SHARE,
    "refinement#propose#quantile": Kind(low=0, high=1, null=True),
    "refinement#propose#share": SHARE,
    "refinement#propose#scans": whole(0),
    "refinement#propose#k": whole(1),
    "refinement#propose#position_weight": Kind(low=0),
    "refinement#propose#reach": POSITIVE,
    "refinement#propose#most_voters": whole(1),
    "refinement#propose#cells": whole(0),
    "metric_definition": words("mm", "paper"),
}


def refuse_wrong(values: Mapping[str, Any]) -> None:
    """Check the values of settings by id; ids without a kind are passed over.

    Raises:
        DatasetError: a line for each wrong one, with id, value and what is expected.
    """
    known = ((id, kind) for id, kind in KINDS.items() if id in values)
    refuse([line(id, values[id], kind) for id, kind in known if not kind.fits(values[id])])


def refuse(lines: Sequence[str]) -> None:
    """Raise an error with ``lines``, if there are any.

    Raises:
        DatasetError: there are some.
    """
    if lines:
        raise DatasetError("\n".join(lines))


def line(id: str, value: Any, expected: object) -> str:
    """The line that a message has for a wrong setting."""
    return f"{id} is {shown(value)}: expected {expected}."


def values_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a nested config that `KINDS` knows, by id; arguments of a user's own component are free."""
    found = {}
    for id in KINDS:
        value: Any = config
        for part in id.split("#"):
            inside = isinstance(value, Mapping) and part in value and not is_own(value)
            value = value[part] if inside else MISSING
        if value is not MISSING:
            found[id] = value
    return found


def is_own(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a component that comes neither with this package nor with its libraries."""
    module, dot, _ = str(config.get("_target_", "")).partition(".")
    return bool(dot) and module not in ("semisam_o1", "monai", "torch")


def refuse_unknown(ids: Iterable[str], known: Iterable[str], used: Iterable[str]) -> None:
    """Check ids: each is a ``known`` one, or ``used`` by another.

    Raises:
        DatasetError: it names the first other id, and known ones like it.
    """
    for id in ids:
        if id not in known and id not in used:
            close = difflib.get_close_matches(id, [one for one in known if one.count("#") == id.count("#")])
            hint = f"did you mean {' or '.join(close)}?" if close else "docs/settings.md lists them."
            raise DatasetError(f"The config has no id '{id}': {hint}")


def is_code(value: Any) -> bool:
    """Whether MONAI evaluates a value: then its result is checked."""
    if isinstance(value, (list, tuple)):
        return any(map(is_code, value))
    if isinstance(value, Mapping):
        return "_target_" in value
    return isinstance(value, str) and value.startswith(("$", "@", "%"))


def shown(value: Any) -> str:
    """A value for a message: a text in quotes, other values as JSON, 60 letters at most."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        return "a number above 10^12" if value > 0 else "a number below -10^12"
    try:
        text = ascii(value) if isinstance(value, str) else json.dumps(value, default=str)
    except ValueError:  # a number in it has thousands of digits
        text = "..."
    return text if len(text) <= 60 else f"{text[:57]}..."
