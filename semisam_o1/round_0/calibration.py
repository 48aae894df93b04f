"""From the evidence of a label to its predicted Dice: factors that copies of the template give (pure functions)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from semisam_o1.round_0.quality import LEAST_ERROR, Evidence, Quality

USUAL_FACTOR = 0.85  # true over expected error, the mean of five data sets; used alone where there are no copies
USUAL_SPREAD = 0.25  # of its logarithm, label by label; at least, as copies show only a part of it
COPIES_WEIGHT = 0.5  # of the logarithm of the copies' factor, against that of the usual one
ENOUGH = 4  # labelled scans, with which the usual factor has half of its weight
BACK_POWER, UNLIKE_POWER = 0.3, 0.3  # of the two measures relative to the pool
MODIFIED = (0.5, 2.0)  # the limits of their product
SOUND = 0.75  # of the pool's reverse consistency; a class below it is likely in the wrong place
LEAST_USUAL = 0.5  # reverse consistency of the pool; below it most labels of the pool are likely in the wrong place
FOUR_IN_FIVE = 1.28  # standard deviations
ODD_DEVIATIONS = 4  # of the pool; a class beyond them, and beyond the limits below, is odd
ODD_VOLUME, ODD_SHIFT, ODD_LOOK = np.log(1.5), 0.4, 0.5  # logarithm of a factor; radii of the class; of the median
LEAST_VOLUME, LEAST_SHIFT, LEAST_LOOK = 0.1, 0.1, 0.01  # least deviation over a pool
SCATTERED = ("volume", "shift", "look")
FAR = 1.5  # times the median distance of the pool: plain scans reach 1.33, pure noise and half a scan 1.54 to 2.4


class Scatter(NamedTuple):
    """Of a measure over a pool: the ``median`` and the robust standard deviation of each class, (classes,) each."""

    median: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, values: Sequence[np.ndarray], least: float) -> Scatter | None:
        """The scatter of ``values``, (classes,) each; a ``least`` deviation, as a few scans may be alike by chance."""
        if not values:
            return None
        finite = [np.where(np.isfinite(one), one, np.nan) for one in values]
        median = _medians(np.stack(finite))
        deviation = 1.48 * _medians(np.abs(np.stack(finite) - median))
        return cls(median, np.maximum(np.nan_to_num(deviation), least))

    def beyond(self, values: np.ndarray, least: float | np.ndarray) -> np.ndarray:
        """How far ``values`` (classes,) are from the median; 0 within `ODD_DEVIATIONS`, within ``least``, for NaN."""
        excess = values - self.median
        return np.where(np.abs(excess) > np.maximum(ODD_DEVIATIONS * self.deviation, least), excess, 0)


class Calibration(NamedTuple):
    """How the evidence of a label becomes a predicted Dice.

    factor: (classes,), true error over expected error. spread: standard deviation of its logarithm over labels.
    reverse_consistency: (classes,), the median of the pool. dissimilarity, back_residual: the medians of the pool; the
    second is NaN in files of earlier versions. volume, shift, look: of each class over the pool, see `Evidence`; None
    in files of earlier versions.
    """

    factor: np.ndarray
    spread: float
    reverse_consistency: np.ndarray
    dissimilarity: float
    back_residual: float = math.nan
    volume: Scatter | None = None
    shift: Scatter | None = None
    look: Scatter | None = None

    def content(self) -> dict[str, Any]:
        """As plain values, for a JSON file."""
        return {key: _plain(value) for key, value in self._asdict().items()}

    @classmethod
    def of_content(cls, content: dict[str, Any]) -> Calibration:
        arrays = {key: np.array(content[key], float) for key in ("factor", "reverse_consistency")}
        scatters = {
            key: Scatter(*(np.array(part, float) for part in content[key]))
            for key in SCATTERED
            if content.get(key) is not None
        }
        return cls(**{**content, **arrays, **scatters})

    def predict(self, found: Evidence) -> Quality:
        """The quality of a label."""
        error = np.clip(1 - found.agreement, 0, 1) * self.factor * self._relative(found)
        sound = np.minimum(1, found.reverse_consistency / (SOUND * np.maximum(self.reverse_consistency, LEAST_USUAL)))
        dice = np.clip(1 - error, 0, 1) * np.where(np.isnan(sound), 1, sound)
        mean = _mean(dice)
        reach = np.exp(FOUR_IN_FIVE * self.spread)
        return Quality(
            mean,
            max(0.0, 1 - (1 - mean) * reach),
            1 - (1 - mean) / reach,
            _mean(found.reverse_consistency),
            _mean(found.agreement),
            found.dissimilarity,
            found.back_residual,
            found.nonpositive_jacobian,
            found.roughness,
            tuple(float(value) for value in dice),
            self._doubt(found),
            self._odd(found),
        )

    def _odd(self, found: Evidence) -> dict[int, str]:
        """The classes with a volume, a place or a look, against the template, that no other scan of the pool has.

        Such a class is often another structure that looks alike, or a part of it.
        """
        odd: dict[int, str] = {}
        if self.volume is None or self.shift is None or found.volume is None or found.shift is None:
            return odd
        volume, shift = self.volume.beyond(found.volume, ODD_VOLUME), self.shift.beyond(found.shift, ODD_SHIFT)
        look = np.zeros(len(volume))
        if self.look is not None and found.look is not None:
            look = self.look.beyond(found.look, ODD_LOOK * self.look.median)
        for index in range(len(volume)):
            if volume[index]:
                odd[index] = f"{np.exp(volume[index]):.2g} times its usual volume"
            elif shift[index] > 0:
                odd[index] = f"{found.shift[index]:.2g} of its radius from its place"
            elif look[index] > 0:
                odd[index] = f"it looks {found.look[index] / self.look.median[index]:.2g} times as unlike as usual"
        return odd

    def _doubt(self, found: Evidence) -> str:
        """Why the evidence does not tell how good a label is, in words; "" if it does.

        A scan that is much less similar to its atlases or to the template than the pool is lies outside of all scans
        and copies that the calibration comes from. This depends on the scan, not on its label. A label in the wrong
        place is no such case: its reverse consistency is low, and so is its predicted Dice.
        """
        pairs = {
            "the scans that its label comes from": (found.dissimilarity, self.dissimilarity),
            "the template": (found.back_residual, self.back_residual),
        }
        far = [
            f"{what} ({own / usual:.1f} times the usual distance)"
            for what, (own, usual) in pairs.items()
            if own > FAR * usual > 0
        ]
        return f"the scan is unlike {' and '.join(far)}" if far else ""

    def _relative(self, found: Evidence) -> np.ndarray:
        """What the scan's evidence, relative to the pool's, says of the error of each class, (classes,)."""
        error, usual = (np.maximum(1 - x, LEAST_ERROR) for x in (found.reverse_consistency, self.reverse_consistency))
        unlike = found.dissimilarity / self.dissimilarity if self.dissimilarity > 0 else 1.0
        relative = (error / usual) ** BACK_POWER * unlike**UNLIKE_POWER
        return np.clip(np.where(np.isnan(relative), 1, relative), *MODIFIED)


def calibrate(
    pool: Sequence[Evidence],
    true_dice: Sequence[np.ndarray] = (),
    agreement: Sequence[np.ndarray] = (),
    of_people: int = 0,
    small: Sequence[int] = (),
) -> Calibration:
    """The calibration of a pool, given labels whose true Dice is known: that, and the agreement, (classes,) each.

    They are labels of copies of the template, and of labelled scans to which the label of the others was carried,
    ``of_people`` of them. The factor of a class is their median, drawn half of the way to `USUAL_FACTOR`: copies show
    how hard this anatomy is, but not how differently people outline it. Labelled scans do, so with them it is drawn
    less far. The factor of ``small`` classes (channels) is not drawn: their agreement, on tokens, is low by itself.
    """
    classes = len(pool[0].agreement)
    factor, spread = np.full(classes, np.log(USUAL_FACTOR)), USUAL_SPREAD
    if len(true_dice):
        true, expected = (np.clip(1 - np.stack(list(dice)), LEAST_ERROR, 1) for dice in (true_dice, agreement))
        logs = np.log(true / expected)
        found = _medians(logs)
        usual = np.full(classes, (1 - COPIES_WEIGHT) * ENOUGH / (ENOUGH + of_people))
        usual[np.array(small, int) - 1] = 0
        factor = np.where(np.isnan(found), factor, (1 - usual) * found + usual * factor)
        known = ~np.isnan(logs).all(axis=1)  # a labelled scan whose classes are all small tells nothing
        if known.sum() > 2:
            scatter = np.nanmean((logs - found)[known], axis=1)
            spread = max(USUAL_SPREAD, float(np.median(np.abs(scatter)) * 1.48))
    back = _medians(np.stack([one.reverse_consistency for one in pool]))
    distance, residual = (
        float(np.median([getattr(one, name) for one in pool])) for name in ("dissimilarity", "back_residual")
    )
    least = zip(SCATTERED, (LEAST_VOLUME, LEAST_SHIFT, LEAST_LOOK))
    measures = [([getattr(one, name) for one in pool if getattr(one, name) is not None], one) for name, one in least]
    return Calibration(np.exp(factor), spread, back, distance, residual, *(Scatter.of(*one) for one in measures))


def _plain(value: Any) -> Any:
    """A value for a JSON file."""
    if isinstance(value, Scatter):
        return [_plain(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def _medians(values: np.ndarray) -> np.ndarray:
    """The median over the first axis without NaN; NaN where there is nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a class that is nowhere
        return np.nanmedian(values, axis=0)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 1.0
