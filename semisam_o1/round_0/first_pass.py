"""The first pass of one scan: the templates' label carried over, in the frame in which the scan fits a template."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from semisam_o1.data.grids import to_grid
from semisam_o1.data.turns import frame_of, turn_of
from semisam_o1.features import Features, FeatureStore
from semisam_o1.round_0.displacement import finest
from semisam_o1.round_0.passes import Alignment, FirstPass
from semisam_o1.round_0.places import CHANNELS, coarse, is_turned, pooled, principal, turn_between
from semisam_o1.round_0.pose import MIRRORED
from semisam_o1.round_0.propagation import Propagated, Reference, copy, emptied, in_view, reached
from semisam_o1.round_0.templates import Template
from semisam_o1.round_0.turned_scans import TurnedScans
from semisam_o1.round_0.way_back import TemplatesWayBack, consistency, way_back
from semisam_o1.types import Probabilities
from semisam_o1.uncertainty import entropy

log = logging.getLogger("semisam_o1")
TURN_MARGIN = 0.03  # of reverse consistency, by which a turned pose must be better
RETURNS = 0.6  # reverse consistency of a label that comes back well; below, turns that fit no better are tried too
UNLIKE = 1.15  # times the least descriptor distance; a turned pose beyond is not taken
ALIKE = 0.15  # of reverse consistency; poses that are closer to the best than this are compared by distance


class Carried(NamedTuple):
    """The templates' label on a scan whose ``features`` are those in ``frame``; ``result`` is None until it is carried.

    ``back``: its way back, if known, and ``worth``: its reverse consistency.
    """

    features: Features
    result: Propagated | None
    frame: str
    back: TemplatesWayBack | None = None
    worth: float = float("nan")


def best_pose(upright: Carried, turned: Sequence[Carried]) -> Carried:
    """The best of the poses in which the label comes back clearly better than ``upright``; without any, ``upright``.

    A label can come back from a wrong pose as well. So the scan must fit the template about as well as in the other
    poses from which the label comes back, or in all others if it comes back well from none. Of the poses left, the one
    is taken in which the template fits the scan best: its tokens are the same in each pose, while those of a turned
    scan have other corners.
    """
    better = [pose for pose in turned if pose.worth > upright.worth + TURN_MARGIN]
    highest = max((pose.worth for pose in better), default=upright.worth)
    alike = [pose for pose in (upright, *better) if pose.worth > highest - ALIKE]
    compared = alike if highest > RETURNS else (upright, *better)
    most = UNLIKE * min(pose.result.residual for pose in compared)
    fitting = [pose for pose in alike if pose is not upright and pose.result.residual <= most]
    return min(fitting, key=lambda pose: pose.back.way.residual, default=upright)


def coarser(features: Features, factor: int) -> Features:
    """Features pooled over cubes of ``factor`` tokens per side, with the same middle."""
    if factor == 1:
        return features
    tokens, affine = pooled(features.tokens, factor), np.array(features.affine, float)
    middles = [(np.array(one.shape[1:]) - 1) / 2 for one in (features.tokens, tokens)]
    affine[:3, 3] += affine[:3, :3] @ (middles[0] - factor * middles[1])
    affine[:3, :3] *= factor
    return dataclasses.replace(features, tokens=tokens, affine=affine)


def coarser_template(template: Template, factor: int) -> Template:
    """A template with pooled features and labels, see `coarser`."""
    reference = Reference(*(pooled(part, factor) for part in template.reference))
    return Template(template.name, coarser(template.features, factor), reference)


class Propagation:
    """Carries the templates' label to a scan of a feature store with ``propagate``, see the module `propagation`.

    ``poses``: looks for scans that lie turned; None: nothing looks.
    """

    def __init__(
        self,
        store: FeatureStore,
        templates: Sequence[Template],
        propagate: Callable,
        poses: TurnedScans | None = None,
    ):
        self.store, self.templates, self.propagate, self.poses = store, templates, propagate, poses
        self.references = [template.reference for template in templates]
        self.bases = [principal(reference.tokens, CHANNELS) for reference in self.references]
        self._factor = max(finest(reference.tokens) for reference in self.references)  # that poses are compared at
        self._coarser = functools.cache(lambda: [coarser_template(one, self._factor) for one in self.templates])

    def __call__(self, name: str) -> Carried:
        """The label of the scan ``name``.

        A scan that is oblique to a template also has features in its stored axes (see `FeatureStore.frame`), because
        descriptors are not invariant to rotation. Of the two frames, the one with the smaller descriptor distance to
        the best template is used, or, if nothing was aligned, the one with the lower entropy. A scan that may lie
        turned relative to its best template, see `pose.search`, is propagated to again in each such pose. One is taken
        if the label's places find their like there and back clearly better, see `best_pose`.
        """
        found = self.store.load(name)
        turns = self._turns(found)
        result: Propagated = self.propagate(self.references, found.tokens, step_mm=found.step_mm, turns=turns)
        stored = self.store.frame("stored")
        if any(is_turned(turn) for turn in turns) and stored.path(name).exists():
            other = stored.load(name)
            second = self.propagate(self.references, other.tokens, step_mm=other.step_mm)
            misfits = [r.residual if result.maps else float(entropy(r.probabilities).mean()) for r in (second, result)]
            if misfits[0] < misfits[1]:
                return Carried(other, second, "stored")
        upright = Carried(found, result, "world")
        return self._turned(name, upright) if result.maps and self.poses is not None else upright

    def _turned(self, name: str, upright: Carried) -> Carried:
        """The label in a turned pose that fits the best template clearly better, if there is one."""
        found = self.poses.search(self.templates[upright.result.best].name, name)
        if found.mirrored < MIRRORED:
            log.warning(
                "case %s: a mirrored copy of the scan fits the template clearly better: its misfit is %.0f%% of the "
                "scan's own; check that its header names left and right correctly. Nothing is changed.",
                name, 100 * found.mirrored,
            )  # fmt: skip
        log.debug("poses of %s: %s", name, found)
        judged: list[Carried] = []  # upright first
        for turns, least in ((found.turns, float("inf")), (found.others, RETURNS)):
            if not turns:
                continue
            judged = judged or [self._judged(upright)]
            if best_pose(judged[0], judged[1:]).worth >= least:
                break
            for frame in map(frame_of, turns):
                judged.append(self._judged(Carried(self.poses.features(name, frame), None, frame)))
        best = best_pose(judged[0], judged[1:]) if judged else upright
        self.poses.keep(name, best.frame)
        if best.frame != upright.frame:
            angle = np.linalg.norm(Rotation.from_matrix(turn_of(best.frame)).as_rotvec(degrees=True))
            log.info("case %s: lies turned by %.0f degrees relative to the template", name, angle)
        if self._factor == 1:
            return best
        if best.frame == upright.frame:
            return upright
        features = self.poses.features(name, best.frame)
        result = self.propagate(self.references, features.tokens, step_mm=features.step_mm)
        return Carried(features, result, best.frame)

    def _judged(self, pose: Carried) -> Carried:
        """A pose with its label, its way back and its reverse consistency; on large grids all of pooled tokens.

        The displacement of large grids is found on pooled tokens anyway, see `finest`.
        """
        templates, features, result = self._coarser(), coarser(pose.features, self._factor), pose.result
        if result is None or self._factor > 1:
            turns = self._turns(features) if pose.frame == "world" else None
            references = [template.reference for template in templates]
            result = self.propagate(references, features.tokens, step_mm=features.step_mm, turns=turns)
        back = way_back([templates[result.best]], features, pose.frame)
        worth = consistency(back, result.probabilities, features.step_mm)
        return Carried(features, result, pose.frame, back, worth)

    def _turns(self, found: Features) -> list[torch.Tensor]:
        """The turn from a scan to each template, as their headers say."""
        return [turn_between(found.scan.affine, template.features.scan.affine) for template in self.templates]

    def way_back(self, carried: Carried) -> TemplatesWayBack:
        """The reverse alignment from the best template."""
        return carried.back or way_back([self.templates[carried.result.best]], carried.features, carried.frame)

    def floor(self, features: Features) -> Probabilities:
        """The templates' label on the scan's own grid, copied without alignment."""
        return to_grid(copy(self.references, features.tokens).probabilities, features.affine, features.scan)

    def within(self, carried: Carried) -> tuple[Carried, torch.Tensor | None]:
        """The label without classes that lie outside of the field of view; the share of each that the scan reaches."""
        result, template = carried.result, self.templates[carried.result.best]
        if not result.maps or result.points is None:
            return carried, None
        share = reached(template.reference.label, result.points, carried.features.step_mm)
        share = in_view(share, result.probabilities)
        without = None if result.without_vote is None else emptied(result.without_vote, share)
        result = result._replace(probabilities=emptied(result.probabilities, share), without_vote=without)
        return carried._replace(result=result), share

    def record(self, carried: Carried, share: torch.Tensor | None = None) -> FirstPass:
        """What later steps need of a label, but for its uncertainty and ``vote_gain``; ``share``: see `within`."""
        result = carried.result
        alignments = {
            template.name: Alignment(place, coarse(basis(carried.features.tokens), template.reference.tokens)[0])
            for template, basis, place in zip(self.templates, self.bases, result.maps)
        }
        best = self.templates[result.best].name if result.maps else ""
        return FirstPass(
            result.probabilities, carried.frame, best, result.residual, None, result.points, alignments,
            result.without_vote, None, share,
        )  # fmt: skip
