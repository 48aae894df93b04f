"""The templates as round 0 uses them: features, and the share of each class in each token."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.utils import CommonKeys as Keys

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.grids import Grid, to_grid
from semisam_o1.data.transforms import label_chain
from semisam_o1.features import Features, FeatureStore
from semisam_o1.round_0.propagation import Reference
from semisam_o1.types import Case


def reference(case: Case, features: Features, cohort: Cohort, label: Path | None = None) -> Reference:
    """A labelled scan for propagation: its tokens, and the share of each class in each token.

    ``label``: another label file than the case's own.
    """
    shares = label_chain(features.step_mm, cohort)(case.item(label))[Keys.LABEL]
    shares = to_grid(shares, shares.affine, Grid(features.affine, tuple(features.tokens.shape[1:])))
    return Reference(features.tokens, shares.clamp(min=0) / shares.sum(0).clamp(min=1e-6))


def published_reference(case: Case, features: Features, cohort: Cohort) -> Reference:
    """As published: a token has the class of its first corner voxel, or background if that is outside the scan."""
    label = cohort.label(case)
    to_voxel = np.linalg.inv(features.scan.affine) @ features.affine  # token index -> voxel index of the token's centre
    patch = np.linalg.norm(to_voxel[:3, :3], axis=0)
    shape = tuple(features.tokens.shape[1:])
    tokens = np.moveaxis(np.indices(shape), 0, -1)
    corners = np.rint(tokens @ to_voxel[:3, :3].T + to_voxel[:3, 3] - (patch - 1) / 2).astype(int)
    inside = ((corners >= 0) & (corners < label.shape)).all(-1)
    corners = np.where(inside[..., None], corners, 0)
    found = label[tuple(torch.as_tensor(corners).unbind(-1))] * torch.as_tensor(inside)
    return Reference(features.tokens, F.one_hot(found, cohort.num_classes).movedim(-1, 0).float())


class Template(NamedTuple):
    """A template: its ``name``, its ``features``, and its ``reference`` for propagation."""

    name: str
    features: Features
    reference: Reference


def anchor(store: FeatureStore, cohort: Cohort) -> Case:
    """The template to which every scan is aligned: of those with the most classes, the one most like the others.

    The first of two. Other labelled scans are reached through it, see `label_fusion`, so their number costs no
    alignment.
    """
    if len(cohort.templates) == 1:
        return cohort.templates[0]
    descriptors = store.descriptors(case.name for case in cohort.templates)
    likeness = (descriptors @ descriptors.T).sum(0).round(6)
    classes = np.array([len(cohort.label(case).unique()) for case in cohort.templates])
    return cohort.templates[int(np.argmax(np.where(classes == classes.max(), likeness, -np.inf)))]


def templates_of(store: FeatureStore, cohort: Cohort, every: bool = False, published: bool = False) -> list[Template]:
    """The templates that are carried over in the first pass: the `anchor`, or with ``every`` all of them."""
    found = []
    for case in cohort.templates if every else (anchor(store, cohort),):
        features = store.load(case.name)
        make = published_reference if published else reference
        found.append(Template(case.name, features, make(case, features, cohort)))
    return found
