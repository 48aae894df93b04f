"""What tokens lose of small classes: these are carried over at the template's own resolution.

Tokens tell where a place of the scan lies in the template, also between tokens. There the share of a small class is
read from the template's own label, in place of its share on tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms.utils import generate_spatial_bounding_box

from semisam_o1.data.class_sizes import SMALL, dices, kept_on_tokens
from semisam_o1.data.cohort import Cohort
from semisam_o1.data.grids import Grid, beyond, cropped, slabs, to_grid
from semisam_o1.features import Features, FeatureStore
from semisam_o1.round_0.passes import FirstPass
from semisam_o1.round_0.places import sample
from semisam_o1.round_0.templates import Template, reference
from semisam_o1.types import Affine, Probabilities

FINER = 4  # parts of a token along each side, at most, in which labels of small classes are compared
AddDetail = Callable[[Probabilities, Grid], Probabilities]


class SmallClass(NamedTuple):
    """A small class of a template: its ``channel``, and its ``mask`` (1, h, w, d) on a grid with ``affine``."""

    channel: int
    mask: torch.Tensor
    affine: Affine


def find_small(label: torch.Tensor, grid: Grid, shares: Probabilities, affine: Affine) -> list[SmallClass]:
    """The foreground classes of which tokens keep less than `SMALL`; for the arguments see `kept_on_tokens`."""
    found = []
    for channel in (np.flatnonzero(kept_on_tokens(label, grid, shares, affine)[1:] < SMALL) + 1).tolist():
        mask = label == channel
        if mask.any():
            box = [slice(*pair) for pair in zip(*generate_spatial_bounding_box(mask[None]))]
            found.append(SmallClass(channel, mask[tuple(box)].float()[None], cropped(grid, box).affine))
    return found


def sampled(small: SmallClass, world: torch.Tensor) -> torch.Tensor:
    """The share of a small class at places ``world`` (H, W, D, 3), RAS mm of the template: (H, W, D)."""
    place = torch.as_tensor(np.linalg.inv(np.asarray(small.affine, float)), dtype=torch.float32)
    mask = F.pad(small.mask, (1,) * 6)  # so that a side of one voxel has neighbours
    half = (torch.tensor(mask.shape[1:], dtype=torch.float32) - 1) / 2
    where = ((world @ place[:3, :3].T + place[:3, 3] + 1 - half) / half).flip(-1)
    return F.grid_sample(mask[None], where[None], align_corners=True)[0, 0]


def add_detail(
    template: Template,
    small: Sequence[SmallClass],
    points: torch.Tensor,
    affine: Affine,
    shares: Probabilities,
    part: Grid,
) -> Probabilities:
    """``shares`` (num_classes, H, W, D) on a ``part`` of a scan's grid, with what tokens lost of small classes.

    Args:
        points: (H', W', D', 3) centred mm, the position in the template of each token of the scan; ``affine``: theirs.
    """
    features, label = template.features, template.reference.label
    where = to_grid(points.movedim(-1, 0), affine, part, outside="border").movedim(0, -1)
    inside = (where.abs() <= torch.tensor(label.shape[1:]) / 2 * features.step_mm).all(-1)
    if (outside := beyond(affine, points.shape[:3], part)) is not None:
        inside &= ~outside
    on_tokens = sample(label[[one.channel for one in small]], where, features.step_mm)
    matrix = torch.as_tensor(np.asarray(features.affine, float), dtype=torch.float32)
    world = (where / features.step_mm + (torch.tensor(label.shape[1:]) - 1) / 2) @ matrix[:3, :3].T + matrix[:3, 3]
    shares = shares.clone()
    for one, share in zip(small, on_tokens):
        lost = (sampled(one, world) - share) * inside
        shares[one.channel] += lost
        shares[0] -= lost
    shares = shares.clamp(0, 1)
    return shares / shares.sum(0).clamp(min=1e-6)


class Placed(NamedTuple):
    """A label on tokens: ``shares`` (num_classes, H, W, D), and ``points`` (H, W, D, 3), see `add_detail`."""

    shares: Probabilities
    points: torch.Tensor


def dices_of_small(
    template: Template, small: Sequence[SmallClass], one: Placed, other: Placed, affine: Affine
) -> np.ndarray:
    """The Dice of each small class between two labels on the same tokens, with detail: (num_classes - 1,).

    They are compared in voxels about as large as the template's. NaN for classes that are not small.
    """
    features, count = template.features, len(one.shares)
    parts = int(np.clip(round(features.step_mm / features.scan.spacing.min()), 1, FINER))
    finer = np.array(affine, float)
    finer[:3, :3] /= parts
    finer[:3, 3] -= finer[:3, :3].sum(1) * (parts - 1) / 2  # the middle of the first part
    grid = Grid(finer, tuple(parts * n for n in one.points.shape[:3]))

    def label(placed: Placed, part: Grid) -> torch.Tensor:
        shares = to_grid(placed.shares, affine, part)
        return add_detail(template, small, placed.points, affine, shares, part).argmax(0)

    found = dices(((label(one, part), label(other, part)) for _, part in slabs(grid, count)), count)[1:]
    known = np.isin(np.arange(1, count), [one.channel for one in small])
    return np.where(known, found, np.nan)


class Details:
    """The small classes of each template of a run, found when they are first asked for."""

    def __init__(self, store: FeatureStore, cohort: Cohort):
        self.store, self.cohort = store, cohort
        self.of = functools.cache(self._found)

    def __call__(self, first: FirstPass, found: Features) -> AddDetail | None:
        """`add_detail` for a scan: from probabilities on a part of its grid to these with detail.

        None if no class is small, or nothing was aligned. Classes outside of the scan's field of view stay as they are.

        Args:
            first: its template, points and reached, see `FirstPass`. found: the scan's features.
        """
        if not first.template or first.points is None:
            return None
        template, small = self.of(first.template)
        small = [one for one in small if first.reached is None or first.reached[one.channel - 1] > 0]
        return functools.partial(add_detail, template, small, first.points.float(), found.affine) if small else None

    def channels(self, name: str) -> list[int]:
        """The channels of the small classes of a template."""
        return [one.channel for one in self.of(name)[1]]

    def _found(self, name: str) -> tuple[Template, list[SmallClass]]:
        case, features = self.cohort.case(name), self.store.load(name)
        template = Template(name, features, reference(case, features, self.cohort))
        label, shares = self.cohort.label(case), template.reference.label
        return template, find_small(label, features.scan, shares, features.affine)
