"""Round 0 as Ignite engines over cases: first pass, label fusion and quality estimate.

They exchange data through files in the folder of round 0: ``labels/``, ``confidence/`` and ``copied/`` are for users,
the arrays in ``work/`` for the next engine (see `passes`).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.export import write_label, write_share
from semisam_o1.data.grids import to_grid
from semisam_o1.errors import of_the_machine
from semisam_o1.features import Features, FeatureStore
from semisam_o1.round_0.first_pass import Propagation
from semisam_o1.round_0.label_fusion import LabelFusion
from semisam_o1.round_0.passes import FirstPass, settle_vote
from semisam_o1.round_0.quality import Quality, WayBack, estimate_quality
from semisam_o1.round_0.templates import reference, templates_of
from semisam_o1.round_0.way_back import consistency, save_way_back, way_back
from semisam_o1.runfolder import RoundFolder, RunFolder
from semisam_o1.types import Case, Probabilities, UserError
from semisam_o1.uncertainty import predictive_entropy

log = logging.getLogger("semisam_o1")


def write_results(
    folder: RoundFolder,
    case: Case,
    probabilities: Probabilities,
    found: Features,
    numbers: Sequence[int],
    published: bool = False,
) -> float:
    """Write label and confidence of one case on the scan's own grid; returns the mean uncertainty there.

    ``numbers``: the class number of each channel. Probabilities are interpolated linearly between tokens and constant
    as far as the outermost tokens reach (see `to_grid`). With ``published``, each voxel has the probabilities of its
    token, and voxels outside of all tokens are background.
    """
    if published:
        probabilities = to_grid(probabilities, found.affine, found.scan, "nearest", "zeros")
        probabilities[0] += 1 - probabilities.sum(0)
    else:
        probabilities = to_grid(probabilities, found.affine, found.scan)
    write_label(folder.label(case.name), probabilities.argmax(0).numpy(), case.image, found.scan, numbers)
    write_share(folder.confidence(case.name), probabilities.amax(0).numpy(), case.image, found.scan)
    return float(predictive_entropy(probabilities.clamp(0, 1)[None]).mean())


def case_engine(process: Callable[[Case], Any], what: str, handlers: Sequence) -> Engine:
    """An engine over cases. A failed case goes to ``engine.state.failed`` with its reason; the engine continues.

    ``engine.state.values`` holds the results of ``process`` that are not None, by case.
    """

    def step(engine: Engine, case: Case) -> None:
        try:
            value = process(case)
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            if of_the_machine(error):  # not the scan's fault
                raise
            reason = case.scrubbed(error)
            log.warning("case %s: %s failed and the scan is set aside: %s", case.name, what, reason)
            engine.state.failed[case.name] = f"{what} failed: {reason}"
            return
        if value is not None:
            engine.state.values[case.name] = value

    engine = Engine(step)

    @engine.on(Events.STARTED)
    def clear(engine: Engine) -> None:
        engine.state.failed, engine.state.values = {}, {}

    for handler in handlers:
        handler.attach(engine)
    return engine


def first_pass_engine(
    store: FeatureStore,
    cohort: Cohort,
    propagate: Callable,
    output_dir: str | Path,
    handlers: Sequence = (),
    published: bool = False,
    guard: bool = False,
) -> Engine:
    """Propagate the templates' label to each case with ``propagate``, see `Propagation`.

    Writes labels, confidences (the highest probability) and copied labels of round 0 of the run ``output_dir``. Cases
    with a record in ``work/`` are skipped. ``published``: see `write_results`. ``guard``: also align back, and drop the
    vote near borders for the whole pool if labels are less consistent with it, see `settle_vote`.
    """
    templates = templates_of(store, cohort, published)
    if not published and not any(template.reference.label.argmax(0).any() for template in templates):
        raise UserError(
            f"template {templates[0].name}: no class fills a token (a cell of the feature grid) of "
            f"{templates[0].features.step_mm:.3g} mm, and nothing can be carried over: "
            "use a smaller feature_spacing or feature_step, or another encoder."
        )
    propagation, folder = Propagation(store, templates, propagate), RunFolder(output_dir).round(0)
    records, back = folder.work("first"), folder.work("back")

    def process(case: Case) -> float:
        made = (folder.label(case.name), folder.copied(case.name))
        if records.has(case.name, "uncertainty") and all(path.is_file() for path in made):
            return FirstPass.load(records, case.name, "uncertainty").uncertainty
        carried = propagation(case.name)
        found, result = carried.features, carried.result
        floor = propagation.floor(found)
        write_label(folder.copied(case.name), floor.argmax(0).numpy(), case.image, found.scan, cohort.class_numbers)
        uncertainty = write_results(folder, case, result.probabilities, found, cohort.class_numbers, published)
        gain = None
        if guard and result.maps and result.without_vote is not None:
            way = propagation.way_back(carried)
            save_way_back(back, case.name, way)
            voted, plain = (consistency(way, p, found.step_mm) for p in (result.probabilities, result.without_vote))
            gain = voted - plain
        propagation.record(carried, uncertainty, gain).save(records, case.name)
        return uncertainty

    engine = case_engine(process, "propagation", handlers)

    @engine.on(Events.COMPLETED)
    def finish(engine: Engine) -> None:
        values = dict(engine.state.values)
        if guard and settle_vote(records, values):
            log.info("no vote near borders: labels are more consistent without it")
            for name in values:
                first = FirstPass.load(records, name, "frame", "probabilities")
                found = store.frame(first.frame).load(name)
                case = cohort.case(name)
                values[name] = write_results(folder, case, first.probabilities, found, cohort.class_numbers)
        folder.uncertainty.write(folder.uncertainty.read() | {name: {"uncertainty": v} for name, v in values.items()})

    return engine


def label_fusion_engine(
    store: FeatureStore,
    cohort: Cohort,
    cases: Sequence[Case],
    output_dir: str | Path,
    atlases: int = 5,
    iterations: Sequence[int] = (20, 20, 10),
    handlers: Sequence = (),
) -> Engine:
    """Fuse each label of the first pass with those of the ``atlases`` most similar of ``cases``, see `LabelFusion`.

    If the first pass aligned nothing (`copy`, `prototype`), labels stay unchanged.
    """
    folder = RunFolder(output_dir).round(0)
    records, fused = folder.work("first"), folder.work("fused")
    tokens = {case.name: store.load(case.name).tokens for case in cohort.templates}

    @functools.cache
    def fusion() -> LabelFusion:
        found = LabelFusion(store, records, [case.name for case in cases], tokens, atlases, iterations)
        if not found.names:
            log.info("label fusion: the first pass aligned nothing to the template, labels stay unchanged")
        return found

    def process(case: Case) -> float | None:
        if case.name not in fusion().names:
            return None
        scan = fusion().scan(case.name)
        probabilities = scan.probabilities
        if (found := fusion()(scan, {case.name})) is not None:
            found.save(fused, case.name)
            probabilities = found.probabilities
        features = store.frame(FirstPass.load(records, case.name, "frame").frame).load(case.name)
        return write_results(folder, case, probabilities, features, cohort.class_numbers)

    engine = case_engine(process, "label fusion", handlers)

    @engine.on(Events.STARTED)
    def look_again(engine: Engine) -> None:
        fusion.cache_clear()

    @engine.on(Events.COMPLETED)
    def finish(engine: Engine) -> None:
        values = {name: {"uncertainty": value} for name, value in engine.state.values.items()}
        folder.uncertainty.write(folder.uncertainty.read() | values)

    return engine


class QualityEstimate:
    """Estimates the quality of a label without truth, called with a case and a label file; see the module `quality`.

    It uses the scan's best template. The reverse alignment, from template to scan, is computed once and stored with
    round 0 of the run ``output_dir``, so estimates for later rounds are fast.
    """

    def __init__(self, store: FeatureStore, cohort: Cohort, output_dir: str | Path):
        self.store, self.cohort = store, cohort
        self.templates = {template.name: template for template in templates_of(store, cohort)}
        folder = RunFolder(output_dir).round(0)
        self.records, self.fused, self.back = (folder.work(kind) for kind in ("first", "fused", "back"))

    def __call__(self, case: Case, label: Path) -> Quality:
        first = FirstPass.load(self.records, case.name, "frame", "residual", "template")
        found = self.store.frame(first.frame).load(case.name)
        if not self.back.path(case.name).exists():
            templates = [self.templates[name] for name in ([first.template] if first.template else self.templates)]
            save_way_back(self.back, case.name, way_back(templates, found, first.frame))
        name, points, residual = self.back.load(case.name, ["template", "points", "residual"])
        way, template = WayBack(points, float(residual)), self.templates[name]
        shares = reference(case, found, self.cohort, label).label
        if self.fused.path(case.name).exists():
            propagated, distance = self.fused.load(case.name, ["probabilities", "dissimilarity"])
        else:
            propagated = FirstPass.load(self.records, case.name, "probabilities").probabilities
            distance = way.residual if math.isnan(first.residual) else first.residual  # NaN: nothing was aligned
        return estimate_quality(template.reference, shares, propagated, way, found.step_mm, float(distance))


def quality_engine(
    store: FeatureStore, cohort: Cohort, output_dir: str | Path, round: int, handlers: Sequence = ()
) -> Engine:
    """Estimate the quality of the final labels of ``round`` of a run, and write its quality.csv."""
    estimate, folder = QualityEstimate(store, cohort, output_dir), RunFolder(output_dir).round(round)

    def process(case: Case) -> Quality:
        return estimate(case, folder.final(case.name))

    engine = case_engine(process, "quality estimate", handlers)

    @engine.on(Events.COMPLETED)
    def finish(engine: Engine) -> None:
        values = {name: quality._asdict() for name, quality in engine.state.values.items()}
        folder.quality.write(folder.quality.read() | values)

    return engine
