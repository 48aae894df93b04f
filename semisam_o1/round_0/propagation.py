"""Propagation of labels to another scan by feature similarity: class probabilities on its tokens (pure functions).

All methods have the same arguments: references (tokens and label of each template), the scan's tokens, the token step
of both grids in mm, and the scan's rotation relative to each template (see `alignment.align`). Some methods ignore
some of them. All return a `Propagated`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from semisam_o1.neighbours import k_means
from semisam_o1.neighbours import nearest as nearest_vectors
from semisam_o1.round_0.alignment import align, register
from semisam_o1.round_0.displacement import finest, sharpen
from semisam_o1.round_0.places import CHANNELS, AffineMap, centred_points, in_grid, principal, sample
from semisam_o1.types import Probabilities, Tokens

PRESENT = 0.05  # a class is near a token if its share in the warped label exceeds this within reach
OUTSIDE = 0.05  # of a template's class; if a scan reaches less, the class lies outside of its field of view
DOUBTFUL = 0.25  # if it reaches less, and no token has the class: likewise, since the reach is widened by one token
CELLS = 128  # of the border vote's index: a quarter of the time of the exact search, same labels


class Reference(NamedTuple):
    """A template: ``tokens`` (C, H', W', D') and ``label`` (num_classes, H', W', D'), class shares per token."""

    tokens: Tokens
    label: Probabilities


class Propagated(NamedTuple):
    """``probabilities`` (num_classes, H', W', D') on the scan's tokens, summing to 1, and the alignment used.

    maps: from positions in the scan to positions in each template; empty if the method aligns nothing.
    best: index of the template with the smallest mean squared descriptor distance after alignment.
    residual: that distance.
    points: the position of each token in that template, (H', W', D', 3) centred mm, displacement included.
    without_vote: ``probabilities`` without the vote near borders; None if there was none.
    """

    probabilities: Probabilities
    maps: tuple[AffineMap, ...] = ()
    best: int = 0
    residual: float = float("nan")
    points: torch.Tensor | None = None
    without_vote: Probabilities | None = None

    @property
    def to_template(self) -> AffineMap | None:
        """The map to the best template."""
        return self.maps[self.best] if self.maps else None


def copy(references: Sequence[Reference], scan: Tokens, step_mm: float = 1.0, turns=None, seed: int = 0) -> Propagated:
    """The templates' mean label, stretched over the scan without alignment: the baseline for propagation."""
    shape = tuple(scan.shape[1:])
    stretched = [F.interpolate(r.label[None], shape, mode="trilinear", align_corners=False)[0] for r in references]
    return Propagated(torch.stack(stretched).mean(0))


def class_prototypes(reference: Reference, k: int = 1, seed: int = 0) -> list[torch.Tensor | None]:
    """Up to ``k`` unit prototypes (k', C) per class: means of the tokens mostly in it; None for a class without any."""
    vectors = reference.tokens.flatten(1).T
    owner = reference.label.argmax(0).flatten()
    prototypes: list[torch.Tensor | None] = []
    for number in range(len(reference.label)):
        members = vectors[owner == number]
        if not len(members):
            prototypes.append(None)
            continue
        centres = members.mean(0, keepdim=True) if k == 1 else torch.from_numpy(k_means(members.numpy(), k, seed))
        prototypes.append(F.normalize(centres, dim=1))
    return prototypes


def prototype(
    references: Sequence[Reference],
    scan: Tokens,
    step_mm: float = 1.0,
    turns=None,
    k: int = 1,
    temperature: float = 0.1,
    seed: int = 0,
) -> Propagated:
    """Softmax over cos(token, prototype of class c) / ``temperature``; as published with one prototype per class.

    With several templates: the mean of their prototypes, normalised again (k = 1), or all of their prototypes (k > 1);
    a token's score is the highest of the class. A class without tokens has the score 0, as published.
    """
    vectors = F.normalize(scan.flatten(1), dim=0)
    found = [class_prototypes(reference, k, seed) for reference in references]
    scores = torch.zeros(len(references[0].label), vectors.shape[1])
    for number in range(len(scores)):
        own = [p[number] for p in found if p[number] is not None]
        if own:
            centres = torch.cat(own) if k > 1 else F.normalize(torch.stack(own).mean(0), dim=1)
            scores[number] = (centres @ vectors).amax(0)
    return Propagated((scores / temperature).softmax(0).reshape(-1, *scan.shape[1:]))


def label_radius(label: Probabilities) -> float:
    """Radius, in tokens, of a ball with the volume of the foreground of ``label`` (num_classes, H', W', D')."""
    return float((3 * (1 - label[0]).sum().clamp(min=1) / (4 * np.pi)) ** (1 / 3))


def class_radius(label: Probabilities) -> float:
    """The geometric mean over the foreground classes of the radius, in tokens, of a ball of their volume."""
    volumes = label[1:].sum((1, 2, 3))
    volumes = volumes[volumes > 0].clamp(min=1)
    return float((3 * volumes / (4 * np.pi)).log().mean().div(3).exp()) if len(volumes) else label_radius(label)


def reach_of(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Dilate ``mask`` (C, H, W, D) by a cube that reaches ``tokens`` to each side."""
    values = mask.float()
    for axis in range(3):
        kernel, padding = [1, 1, 1], [0, 0, 0]
        kernel[axis], padding[axis] = 2 * tokens + 1, tokens
        values = F.max_pool3d(values, kernel, 1, padding)
    return values > 0


def sample_label(label: Probabilities, points: torch.Tensor, step_mm: float) -> Probabilities:
    """``label`` (num_classes, H', W', D') at centred ``points`` (..., 3) in mm; background outside its grid.

    With border padding, a label cut off by its field of view would extend without limit.
    """
    shares = sample(label, points, step_mm)[1:] * in_grid(label.shape[1:], points, step_mm)
    return torch.cat([1 - shares.sum(0, keepdim=True), shares])


def reached(label: Probabilities, points: torch.Tensor, step_mm: float) -> torch.Tensor:
    """The share of each foreground class of a template that a scan reaches, (num_classes - 1,).

    Args:
        label: (num_classes, H', W', D') on the template's tokens.
        points: (H, W, D, 3) centred mm, the position of each token of the scan in the template.
    """
    shape = torch.tensor(label.shape[1:])
    index = (points.reshape(-1, 3) / step_mm + (shape - 1) / 2).round().long()
    index = index[((index >= 0) & (index < shape)).all(-1)]
    seen = torch.zeros(1, *label.shape[1:])
    seen[0, index[:, 0], index[:, 1], index[:, 2]] = 1
    seen = reach_of(seen, 1)[0]
    volume = label[1:].sum((1, 2, 3))
    return torch.where(volume > 0, (label[1:] * seen).sum((1, 2, 3)) / volume.clamp(min=1e-6), 1.0)


def in_view(share: torch.Tensor, probabilities: Probabilities) -> torch.Tensor:
    """``share`` of each class that a scan reaches, (num_classes - 1,), and 0 for those outside of its field of view."""
    found = torch.bincount(probabilities.argmax(0).flatten(), minlength=len(probabilities))[1:] > 0
    return torch.where((share < OUTSIDE) | ((share < DOUBTFUL) & ~found), 0.0, share)


def emptied(probabilities: Probabilities, share: torch.Tensor) -> Probabilities:
    """``probabilities`` with the classes as background that are outside of the field of view, see `in_view`."""
    outside = share == 0
    if not outside.any():
        return probabilities
    found = probabilities.clone()
    found[0] += found[1:][outside].sum(0)
    found[1:][outside] = 0
    return found


def near(label: Probabilities) -> torch.Tensor:
    """The tokens (H', W', D') within 0.4 label radii of a foreground class of ``label`` (num_classes, H', W', D').

    If the foreground fills no token, the tokens that have at least half of its largest share stand for it.
    """
    share = label[1:].sum(0, keepdim=True)
    inside = share > 0.5 * min(1.0, float(share.max()))
    return reach_of(inside, max(1, round(0.4 * label_radius(label))))[0]


def emphasis(label: Probabilities) -> torch.Tensor:
    """Weight of the descriptor distance at each token of ``label``: 1.5 `near` it, else 0.2.

    The low weight elsewhere still constrains the displacement field.
    """
    return torch.where(near(label), 1.5, 0.2)


def nearest(
    references: Sequence[Reference],
    scan: Tokens,
    step_mm: float,
    turns: Sequence[torch.Tensor | None] | None = None,
    neighbours: int = 15,
    position_weight: float = 2.0,
    band: float = 0.25,
    max_references: int = 20000,
    channels: int = CHANNELS,
    alignment: bool = True,
    deformation: bool = True,
    emphasised: bool = True,
    sharp: bool = True,
    seed: int = 0,
) -> Propagated:
    """The warped template label, averaged near its borders with a vote of the most similar template tokens.

    For each template, an affine map (`align`) and a displacement field (`deform`) warp the label to the scan. In a band
    around its borders, each token takes a vote of its nearest template tokens in (descriptor, position), weighted by
    exp(-d / median d), on fractional labels. The vote, smoothed over 3 x 3 x 3 tokens, and the warped label have equal
    weight. Results of several templates are averaged with weights exp(-descriptor distance / smallest distance).

    Args:
        references, scan: on grids of ``step_mm`` mm; turns: one per reference, see `align`.
        neighbours: number of voting tokens; 0 for no vote.
        position_weight: weight of a distance of one class radius, relative to a descriptor distance.
        band: half-width of the band around the border, in class radii.
        max_references: largest number of voting template tokens near the label, drawn with ``seed``.
        channels: number of principal components of the template's descriptors.
        alignment, deformation: False leaves the step out; without alignment, the template's grid is stretched over the
            scan's.
        emphasised: weight the distance near the label more, see `emphasis`.
        sharp: align large grids at full resolution near the label, see `sharpen`.
    """
    results, plain, residuals, maps, places = [], [], [], [], []
    for reference, turn in zip(references, turns or [None] * len(references), strict=True):
        basis = principal(reference.tokens, channels)
        moving, fixed = basis(reference.tokens), basis(scan)
        points, residual, to_template = centred_points(scan.shape[1:], step_mm), 1.0, None
        if alignment and deformation:
            weight = emphasis(reference.label) if emphasised else None
            to_template, displacement, residual = register(moving, fixed, step_mm, turn, seed, weight=weight)
            points = to_template(points) + displacement
            if sharp and finest(moving) > 1:
                close = near(reference.label)
                points = sharpen(moving, fixed, step_mm, to_template, points, emphasis(reference.label), close)
        elif alignment:
            to_template, residual = align(moving, fixed, step_mm, turn, seed=seed)[0]
            points = to_template(points)
        else:
            points = points * (torch.tensor(reference.tokens.shape[1:]) / torch.tensor(scan.shape[1:]))
        carried = sample_label(reference.label, points, step_mm)
        plain.append(carried)
        if neighbours:
            template = Reference(moving, reference.label)
            vote = border_vote(
                template, fixed, points, carried, step_mm, neighbours, position_weight, band, max_references, seed
            )
            carried = (F.avg_pool3d(F.pad(vote[None], (1,) * 6, mode="replicate"), 3, 1)[0] + carried) / 2
        results.append(carried)
        residuals.append(max(residual, 1e-6))
        maps.append(to_template)
        places.append(points)
    weights = torch.exp(-torch.tensor(residuals) / min(residuals))

    def mean(labels: Sequence[Probabilities]) -> Probabilities:
        return torch.einsum("r,rchwd->chwd", weights / weights.sum(), torch.stack(list(labels)))

    best = int(np.argmin(residuals))
    aligned = tuple(maps) if alignment else ()
    without = mean(plain) if neighbours else None
    return Propagated(mean(results), aligned, best, residuals[best], places[best], without)


def aligns_through_one(method: Callable) -> bool:
    """Whether scans need to be aligned to one template only, because label fusion carries the labels of the others."""
    return getattr(method, "func", method) is nearest


def border_vote(
    reference: Reference,
    scan: Tokens,
    points: torch.Tensor,
    carried: Probabilities,
    step_mm: float,
    neighbours: int,
    position_weight: float,
    band: float,
    max_references: int,
    seed: int,
) -> Probabilities:
    """``carried`` with the band around its borders replaced by the vote of `nearest`; ``points`` in template mm."""
    radius = class_radius(reference.label)
    reach = max(1, round(band * radius))
    close = reach_of(carried > PRESENT, reach).sum(0) >= 2
    asked = close.flatten().nonzero()[:, 0]
    known = reach_of(reference.label > PRESENT, 2 * reach + 1).sum(0) >= 2
    known = known.flatten().nonzero()[:, 0]
    if not len(asked) or not len(known):
        return carried
    if len(known) > max_references:
        draw = torch.Generator().manual_seed(seed)
        known = known[torch.randperm(len(known), generator=draw)[:max_references].sort().values]

    weight = position_weight / (radius * step_mm)
    own = centred_points(reference.tokens.shape[1:], step_mm)
    vectors = torch.cat([reference.tokens.flatten(1).T[known], weight * own.reshape(-1, 3)[known]], 1)
    queries = torch.cat([scan.flatten(1).T[asked], weight * points.reshape(-1, 3)[asked]], 1)
    distance, found = nearest_vectors(vectors.numpy(), queries.numpy(), neighbours, CELLS, seed=seed)
    votes = torch.from_numpy(np.exp(-distance / max(float(np.median(distance)), 1e-12)))
    shares = reference.label.flatten(1).T[known][torch.from_numpy(found)]  # (asked, neighbours, num_classes)
    result = carried.flatten(1).clone()
    result[:, asked] = (torch.einsum("nk,nkc->nc", votes, shares) / votes.sum(1, keepdim=True)).T
    return result.reshape(carried.shape)
