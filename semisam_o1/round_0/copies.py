"""Copies of a template that look like scans of the pool, and whose true label is known (pure functions).

A copy takes its pose, its contrast and half of its displacement from one scan, and the other half from a second one.
What the template cannot explain in the first scan (its difference from the template aligned to it) is added to it, so
that a copy is as hard to label as a scan: without that difference, alignment finds the displacement almost exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from semisam_o1.round_0.places import AffineMap, centred_points, in_grid, sample
from semisam_o1.round_0.propagation import sample_label
from semisam_o1.types import Probabilities, Volume

QUANTILES = np.linspace(0, 1, 201)  # at which two distributions of intensities are matched


class Aligned(NamedTuple):
    """A scan aligned to a template.

    image: (1, H, W, D). has_data: the same shape, True where it holds data. points: (H, W, D, 3) centred mm, the
    position of each voxel in the template. to_template: the affine part of the alignment.
    """

    image: Volume
    has_data: torch.Tensor
    points: torch.Tensor
    to_template: AffineMap


class Copy(NamedTuple):
    """A copy: ``image`` and ``has_data`` (1, H, W, D) on the grid of the first scan, and its true ``label``.

    points: (H, W, D, 3) centred mm, the true position of each voxel in the template.
    """

    image: Volume
    has_data: torch.Tensor
    label: Probabilities
    points: torch.Tensor


def composed(one: Aligned, other: Aligned, step_mm: float) -> torch.Tensor:
    """The position in the template of each voxel of ``one``, (H, W, D, 3) centred mm, with the displacements of both.

    The affine part is that of ``one``. The displacement of ``other`` comes after that of ``one``.
    """
    field = other.points - other.to_template(centred_points(other.points.shape[:3], step_mm))
    moved = sample(field.movedim(-1, 0), other.to_template.inverse()(one.points), step_mm)
    return one.points + moved.movedim(0, -1)


def matched(source: np.ndarray, target: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values`` by the rising map that gives intensities of ``source`` the distribution of ``target``."""
    known = np.quantile(source, QUANTILES) + 1e-6 * np.arange(len(QUANTILES))  # rising, also where it is constant
    return np.interp(values, known, np.quantile(target, QUANTILES)).astype(np.float32)


def make_copy(template: Volume, label: Probabilities, one: Aligned, other: Aligned, step_mm: float) -> Copy:
    """A copy of a template on the grid of the scan ``one``.

    Args:
        template: (1, H', W', D'), intensities. label: (num_classes, H', W', D').
        one, other: two scans aligned to it, on grids of ``step_mm`` mm as the template.
    """
    points = composed(one, other, step_mm)
    seen = (one.has_data[0] & in_grid(template.shape[1:], one.points, step_mm)).numpy()
    aligned = sample(template, one.points, step_mm)[0].numpy()
    scan = one.image[0].numpy()
    if not seen.any():
        return Copy(one.image, one.has_data, sample_label(label, points, step_mm), points)
    unexplained = scan - matched(aligned[seen], scan[seen], aligned)
    moved = matched(aligned[seen], scan[seen], sample(template, points, step_mm)[0].numpy())
    image = np.where(seen, moved + unexplained, scan)  # outside of the template, its border says nothing
    volume = torch.from_numpy(image.astype(np.float32))[None]
    return Copy(volume, one.has_data, sample_label(label, points, step_mm), points)
