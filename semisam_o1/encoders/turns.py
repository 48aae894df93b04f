"""The 24 turns by right angles, and the names of the frames of features that they give."""

from __future__ import annotations

import itertools

import numpy as np

PREFIX = "turned by "


def _right_turns() -> tuple[np.ndarray, ...]:
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            matrix = np.zeros((3, 3))
            matrix[range(3), order] = signs
            if np.linalg.det(matrix) > 0:  # a mirrored scan is not turned: left and right are classes
                found.append(matrix)
    return tuple(sorted(found, key=lambda matrix: -np.trace(matrix)))


RIGHT_TURNS = _right_turns()  # rotations (3, 3); the first is the identity


def frame_of(turn: int) -> str:
    """The name of the frame of features turned by ``RIGHT_TURNS[turn]``."""
    return f"{PREFIX}{turn}"


def turn_of(frame: str) -> np.ndarray | None:
    """The turn of a frame of features, (3, 3); None for a frame of another kind."""
    return RIGHT_TURNS[int(frame.removeprefix(PREFIX))] if frame.startswith(PREFIX) else None
