"""Which classes of a template are too small for the features, and the spacing of features that suits its classes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import psutil
import torch
from monai.transforms.utils import generate_spatial_bounding_box
from monai.utils import CommonKeys as Keys

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.findings import NOTE, WARNING, Problem
from semisam_o1.data.grids import Grid, choose_spacing, cropped, slabs, to_grid
from semisam_o1.data.transforms import label_chain
from semisam_o1.types import Affine, Case, Probabilities

LEAST_SHARE = 0.5  # of a token; a class that has less in every token gets no votes there
SMALL = 0.95  # Dice of a class, taken to tokens and back, with itself, below which it is small
ENOUGH = 2_000_000  # voxels of a template in which its classes are compared with tokens; of more, a part is drawn
SEEN = 1_000  # voxels of a class in that part; a class with fewer is compared in its own box
LEAST_VOXELS = 27  # of a class in a template; one with fewer is not worth finer features
GROWTH = 1.5  # times as many voxels at each step to finer features
BYTES = 4_000  # of memory that round 0 takes for each voxel of the features, with many classes
SHARE_OF_MEMORY = 0.5  # of the machine's, for finer features


class ClassOnTokens(NamedTuple):
    """A class of a template: its ``channel``, its ``voxels`` in the label, and how it looks on tokens.

    Attributes:
        tokens: its volume in tokens. largest: its largest share of a token. kept: see `kept_on_tokens`.
    """

    channel: int
    voxels: int
    tokens: float
    largest: float
    kept: float


def kept_on_tokens(label: torch.Tensor, grid: Grid, shares: Probabilities, affine: Affine) -> np.ndarray:
    """The Dice of each class's share on tokens, resampled to the label's grid, with the class itself: (num_classes,).

    Of large labels every n-th voxel along each axis is compared, in the box of the foreground and two tokens around it;
    a class of which this sees too little, in its own box.

    Args:
        label: (H, W, D) channels on ``grid``. shares: (num_classes, H', W', D') on tokens with ``affine``.
    """
    kept, seen = _compared(label > 0, label, grid, shares, affine)
    voxels = label.flatten().bincount(minlength=len(shares)).numpy()
    for channel in np.flatnonzero(seen < np.minimum(voxels, SEEN)):
        if channel:
            kept[channel] = _compared(label == channel, label, grid, shares, affine)[0][channel]
    return kept


def _compared(
    mask: torch.Tensor, label: torch.Tensor, grid: Grid, shares: Probabilities, affine: Affine
) -> tuple[np.ndarray, np.ndarray]:
    """`kept_on_tokens` in the box of ``mask`` (H, W, D), and the voxels of each class that were compared there."""
    margin = np.ceil(2 * np.linalg.norm(np.asarray(affine)[:3, 0]) / grid.spacing).astype(int)
    ends = generate_spatial_bounding_box(mask[None], margin=margin.tolist(), allow_smaller=True)
    box = [slice(*pair) for pair in zip(*ends)]
    every = int(np.ceil((np.prod([part.stop - part.start for part in box]) / ENOUGH) ** (1 / 3)))
    label, grid = label[tuple(box)][::every, ::every, ::every], cropped(grid, box)
    coarse = np.array(grid.affine, float)
    coarse[:3, :3] *= every
    parts = slabs(Grid(coarse, tuple(label.shape)), len(shares))
    found = dices(((to_grid(shares, affine, part).argmax(0), label[rows]) for rows, part in parts), len(shares))
    return found, label.flatten().bincount(minlength=len(shares)).numpy()


def dices(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], count: int) -> np.ndarray:
    """The Dice of each of ``count`` classes over pairs of labels; 1 for a class that neither has: (count,)."""
    both, sizes = np.zeros(count), np.zeros(count)
    for pair in pairs:
        one, other = (label.flatten().long() for label in pair)
        both += one[one == other].bincount(minlength=count).numpy()
        sizes += (one.bincount(minlength=count) + other.bincount(minlength=count)).numpy()
    return np.where(sizes > 0, 2 * both / np.maximum(sizes, 1), 1.0)


@functools.lru_cache(maxsize=32)
def classes_on_tokens(cohort: Cohort, case: Case, token_mm: float) -> list[ClassOnTokens]:
    """The foreground classes of a template on tokens of ``token_mm`` mm."""
    shares, label = label_chain(token_mm, cohort)(case.item())[Keys.LABEL], cohort.label(case)
    voxels = label.flatten().bincount(minlength=cohort.num_classes).tolist()
    kept = kept_on_tokens(label, cohort.grid(case), shares.as_tensor(), shares.affine.numpy())
    rows = zip(range(cohort.num_classes), voxels, shares, kept)
    return [
        ClassOnTokens(channel, count, float(share.sum()), float(share.max()), float(dice))
        for channel, count, share, dice in rows
        if channel and count
    ]


@functools.lru_cache(maxsize=8)  # a config asks for it more than once
def choose_feature_spacing(cohort: Cohort, voxels: float, finer: float = 1) -> float:
    """An isotropic spacing of the features in mm: that of `choose_spacing`, finer if the templates' classes need it.

    As long as a class of a template, taken to the tokens and back, has a Dice below `SMALL` with itself, the features
    get `GROWTH` times as many voxels.

    Args:
        voxels: of the median template.
        finer: times ``voxels``, at most; 1: as `choose_spacing`. Nor may they take more than `SHARE_OF_MEMORY` of the
            machine's memory, at `BYTES` a voxel: a step that does not fit is not taken.
    """
    grids, step = cohort.template_grids, 1.0
    chosen = choose_spacing(grids, int(voxels))
    most = psutil.virtual_memory().total * SHARE_OF_MEMORY / BYTES / voxels
    while step < finer and _too_small(cohort, chosen):
        step = min(step * GROWTH, finer)
        next_finer = choose_spacing(grids, int(voxels * step))
        if step > most or next_finer == chosen:  # the scans have no finer voxels
            break
        chosen = next_finer
    return chosen


def _too_small(cohort: Cohort, token_mm: float) -> bool:
    """Whether tokens of ``token_mm`` mm keep too little of a class."""
    classes = [found for case in cohort.templates for found in classes_on_tokens(cohort, case, token_mm)]
    return any(found.kept < SMALL for found in classes if found.voxels >= LEAST_VOXELS)


def small_classes(cohort: Cohort, token_mm: float) -> list[Problem]:
    """A line for each class of a template of which tokens of ``token_mm`` mm keep too little, with its size in tokens.

    A warning for a class that fills no token: its surroundings alone place it. Else a note.
    """
    problems = []
    for case in cohort.templates:
        for found in classes_on_tokens(cohort, case, token_mm):
            name = cohort.classes[cohort.class_numbers[found.channel]]
            tokens = f"{found.tokens:,.0f}" if found.tokens >= 10 else f"{found.tokens:.2g}"
            size = f"label: {name} ({found.voxels:,} voxels, {tokens} tokens)"
            if found.largest < LEAST_SHARE:
                text = f"{size} fills no token of {token_mm:.3g} mm"
                remedy = "look at it in the labels, or set larger feature_voxels: its surroundings alone place it"
                problems.append(Problem(case.name, WARNING, text, "classes larger than a token", remedy))
            elif found.kept < SMALL:
                text = f"{size} loses detail on tokens of {token_mm:.3g} mm (Dice {found.kept:.2f})"
                remedy = "nothing: its outline is the template's own; larger feature_voxels place it better"
                problems.append(Problem(case.name, NOTE, text, f"Dice {SMALL}", remedy))
    return problems
