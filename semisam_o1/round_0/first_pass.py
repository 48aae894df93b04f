"""The first pass of one scan: the templates' label carried over, in the frame in which the scan fits a template."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from semisam_o1.data.grids import to_grid
from semisam_o1.encoders.turns import RIGHT_TURNS, frame_of
from semisam_o1.features import Features, FeatureStore
from semisam_o1.round_0.alignment import CHANNELS, coarse, is_turned, principal, turn_between
from semisam_o1.round_0.passes import Alignment, FirstPass
from semisam_o1.round_0.pose import right_turn
from semisam_o1.round_0.propagation import Propagated, copy, emptied, in_view, reached
from semisam_o1.round_0.templates import Template
from semisam_o1.round_0.way_back import TemplatesWayBack, consistency, way_back
from semisam_o1.types import Probabilities
from semisam_o1.uncertainty import entropy

log = logging.getLogger("semisam_o1")
TURN_MARGIN = 0.03  # of reverse consistency, by which a turned pose must be better


class Carried(NamedTuple):
    """The templates' label on a scan whose ``features`` are those in ``frame``; ``back``: its way back, if known."""

    features: Features
    result: Propagated
    frame: str
    back: TemplatesWayBack | None = None


class Propagation:
    """Carries the templates' label to a scan of a feature store with ``propagate``, see the module `propagation`."""

    def __init__(self, store: FeatureStore, templates: Sequence[Template], propagate: Callable):
        self.store, self.templates, self.propagate = store, templates, propagate
        self.references = [template.reference for template in templates]
        self.bases = [principal(reference.tokens, CHANNELS) for reference in self.references]

    def __call__(self, name: str) -> Carried:
        """The label of the scan ``name``.

        A scan that is oblique to a template also has features in its stored axes (see `FeatureStore.frame`), because
        descriptors are not invariant to rotation. Of the two frames, the one with the smaller descriptor distance to
        the best template is used, or, if nothing was aligned, the one with the lower entropy. A scan that lies turned
        by right angles relative to its best template, see `right_turn`, is propagated to again in its pose.
        """
        found = self.store.load(name)
        turns = [turn_between(found.scan.affine, template.features.scan.affine) for template in self.templates]
        result: Propagated = self.propagate(self.references, found.tokens, step_mm=found.step_mm, turns=turns)
        stored = self.store.frame("stored")
        if any(is_turned(turn) for turn in turns) and stored.path(name).exists():
            other = stored.load(name)
            second = self.propagate(self.references, other.tokens, step_mm=other.step_mm)
            misfits = [r.residual if result.maps else float(entropy(r.probabilities).mean()) for r in (second, result)]
            if misfits[0] < misfits[1]:
                return Carried(other, second, "stored")
        upright = Carried(found, result, "world")
        return self._turned(name, upright) if result.maps and self.store.encoder.can_turn else upright

    def _turned(self, name: str, upright: Carried) -> Carried:
        """The label in the pose turned by right angles that fits the best template clearly better, if there is one."""
        found, result, _, _ = upright
        template = self.templates[result.best]
        number = right_turn(template.reference.tokens, found.tokens, found.step_mm, self.store.encoder.turned)
        if not number:
            return upright
        other = self.store.frame(frame_of(number)).load(name)
        turn = torch.tensor(RIGHT_TURNS[number], dtype=torch.float32)
        turns = [turn] * len(self.references)
        second = self.propagate(self.references, other.tokens, step_mm=other.step_mm, turns=turns)
        tried = [upright, Carried(other, second, frame_of(number))]
        tried = [one._replace(back=self.way_back(one)) for one in tried]
        upright, turned = tried
        worth = [consistency(one.back, one.result.probabilities, one.features.step_mm) for one in tried]
        if second.residual < result.residual and worth[1] > worth[0] + TURN_MARGIN:
            log.info("case %s: lies turned by right angles relative to the template", name)
            return turned
        return upright

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

    def record(
        self, carried: Carried, uncertainty: float, vote_gain: float | None = None, share: torch.Tensor | None = None
    ) -> FirstPass:
        """What later steps need of a label; ``vote_gain`` and ``share`` (as ``reached``): see `FirstPass`."""
        result = carried.result
        alignments = {
            template.name: Alignment(place, coarse(basis(carried.features.tokens), template.reference.tokens)[0])
            for template, basis, place in zip(self.templates, self.bases, result.maps)
        }
        best = self.templates[result.best].name if result.maps else ""
        without = None if vote_gain is None else result.without_vote
        return FirstPass(
            result.probabilities, carried.frame, best, result.residual, uncertainty, result.points, alignments,
            without, vote_gain, share,
        )  # fmt: skip
