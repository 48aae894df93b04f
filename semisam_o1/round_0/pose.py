"""Whether a scan lies turned by right angles relative to the template, which no header tells (pure functions)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from semisam_o1.encoders.turns import RIGHT_TURNS
from semisam_o1.round_0.alignment import CHANNELS, align, coarse, pooled, principal
from semisam_o1.types import Tokens

CLEARLY = 0.98  # a turn is taken if it leaves less than this share of the distance without one
QUICK = {"starts": 24, "refined": ((2, 12, 3),)}  # for each of the turns
CAREFUL = {"starts": 60, "refined": ((8, 30, 3),)}  # for the best of them
BEST = 3  # turns that are looked at carefully
Turned = Callable[[Tokens, np.ndarray], Tokens]  # tokens of a scan -> its tokens as if the scan had been turned


def right_turn(template: Tokens, scan: Tokens, step_mm: float, turned: Turned, seed: int = 0) -> int:
    """The index in `RIGHT_TURNS` of the turn from the scan's pose to the template's; 0 if no turn fits clearly better.

    Each turn is tried with a coarse affine alignment of the turned descriptors; the best ones are tried more carefully.

    Args:
        template, scan: (C, H, W, D) each, on grids of ``step_mm`` mm.
        turned: gives the descriptors that a turned scan would have, at the places of the unturned one.
    """
    small, factor = coarse(template, template)
    basis, other, step = principal(small, CHANNELS), pooled(scan, factor), step_mm * factor
    moving = basis(small)

    def distance(number: int, effort: dict) -> float:
        turn = RIGHT_TURNS[number]
        fixed = basis(turned(other, turn))
        return align(moving, fixed, step, torch.tensor(turn, dtype=torch.float32), seed=seed, **effort)[0][1]

    quick = np.array([distance(number, QUICK) for number in range(len(RIGHT_TURNS))])
    best = {int(number) for number in quick.argsort(kind="stable")[:BEST]} | {0}
    careful = {number: distance(number, CAREFUL) for number in sorted(best)}
    found = min(careful, key=lambda number: careful[number])
    return found if careful[found] < CLEARLY * careful[0] else 0
