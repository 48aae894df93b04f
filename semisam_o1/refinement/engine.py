"""The refinement between rounds as an Ignite engine, with two kinds of votes behind one interface, and the guard.

A kind is called with a case. It proposes a label (H, W, D) on the scan's grid, or None to keep the prediction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from ignite.engine import Engine, Events

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.export import write_label
from semisam_o1.features import FeatureStore
from semisam_o1.files import copy_file, write_json
from semisam_o1.report.overlap import mean_dice
from semisam_o1.round_0.quality_estimate import QualityEstimate
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import Case

log = logging.getLogger("semisam_o1")


class Guard:
    """The quality of a label file of a case, without truth: its predicted Dice or, if ``quality_estimate`` is off, its
    Dice with the label of round 0.

    Two labels of one scan are compared, so the predicted Dice counts here where nobody can tell how good they are, too.
    """

    def __init__(self, store: FeatureStore, cohort: Cohort, output_dir: str | Path, quality_estimate: bool = True):
        self.cohort, self.carried = cohort, RunFolder(output_dir).round(0).label
        self.quality = QualityEstimate(store, cohort, output_dir) if quality_estimate else None

    def __call__(self, case: Case, label: Path) -> float:
        if self.quality is not None:
            return self.quality(case, label).predicted_dice
        one, other = (self.cohort.label(case, path) for path in (label, self.carried(case.name)))
        return mean_dice(one, other, self.cohort.num_classes)


def refinement_engine(
    propose: Callable[[Case], torch.Tensor | None],
    cohort: Cohort,
    output_dir: str | Path,
    round: int,
    guard: Callable[[Case, Path], float] | None = None,
    least_gain: float = 0.001,
    handlers: Sequence = (),
) -> Engine:
    """An engine that runs over the pool and writes a round's labels: the predictions, or labels from ``propose``.

    A scan whose label a person gave keeps its prediction, which nothing uses. ``engine.state.replaced`` names the cases
    whose label changed. ``guard`` returns the quality of a label. A proposal with a lower quality than the prediction
    is rejected. If the mean gain of the proposals is below ``least_gain``, which is less than the guard can measure,
    all are rejected and the refinement is switched off.
    """
    folder = RunFolder(output_dir).round(round)

    def process(engine: Engine, case: Case) -> None:
        source, target = folder.prediction(case.name), folder.label(case.name)
        if not source.exists():
            return
        engine.state.seen.append(case)
        copy_file(source, target)
        label = None if case.name in cohort.touched else propose(case)
        if label is None:
            return
        write_label(target, label.numpy(), case.image, cohort.grid(case), cohort.class_numbers)
        if guard is not None:
            engine.state.gains[case] = guard(case, target) - guard(case, source)
            if engine.state.gains[case] < 0:
                copy_file(source, target)
                return
        engine.state.replaced.append(case.name)

    engine = Engine(process)

    @engine.on(Events.STARTED)
    def clear(engine: Engine) -> None:
        engine.state.replaced, engine.state.gains, engine.state.seen = [], {}, []

    @engine.on(Events.COMPLETED)
    def finish(engine: Engine) -> None:
        gains = engine.state.gains
        mean = sum(gains.values()) / max(len(gains), 1)
        off = bool(gains) and mean < least_gain
        if gains:
            log.info("refinement: proposals for %d labels, mean gain in quality %+.4f", len(gains), mean)
        if off:
            log.info("refinement is switched off: its proposals do not improve on the predictions")
            for case in gains:
                copy_file(folder.prediction(case.name), folder.label(case.name))
            engine.state.replaced = []
        found = {case.name: gain for case, gain in gains.items()}
        content = {"switched_off": off, "gains": found, "replaced": engine.state.replaced}
        write_json(folder.refinement, content | {"cases": [case.name for case in engine.state.seen]})

    for handler in handlers:
        handler.attach(engine)
    return engine
