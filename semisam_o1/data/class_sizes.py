"""Which classes of a template are too small for the features."""

from __future__ import annotations

from monai.utils import CommonKeys as Keys

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.findings import WARNING, Problem
from semisam_o1.data.transforms import label_chain

LEAST_SHARE = 0.5  # of a token; a class that has less in every token gets no votes there


def small_classes(cohort: Cohort, token_mm: float) -> list[Problem]:
    """A warning for each class that fills no token of ``token_mm`` mm in a template: its surroundings place it."""
    problems = []
    for case in cohort.templates:
        shares = label_chain(token_mm, cohort)(case.item())[Keys.LABEL]
        voxels = cohort.label(case).flatten().bincount(minlength=cohort.num_classes)
        for channel, (number, share) in enumerate(zip(cohort.class_numbers, shares)):
            if channel and 0 < float(share.max()) < LEAST_SHARE:
                size = f"{int(voxels[channel]):,} voxels, {float(share.sum()):.2g} tokens"
                found = f"label: {cohort.classes[number]} ({size}) fills no token of {token_mm:.3g} mm"
                remedy = "look at it in the labels, or set larger feature_voxels: its surroundings alone place it"
                problems.append(Problem(case.name, WARNING, found, "classes larger than a token", remedy))
    return problems
