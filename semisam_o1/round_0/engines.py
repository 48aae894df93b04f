"""Round 0 as Ignite engines over cases: first pass, label fusion and quality estimate.

They exchange data through files in the folder of round 0: ``labels/``, ``confidence/`` and ``copied/`` are for users,
the arrays in ``work/`` for the next engine (see `passes`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from ignite.engine import Engine, Events

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.export import write_label, write_share
from semisam_o1.data.grids import slabs, to_grid
from semisam_o1.errors import of_the_machine
from semisam_o1.features import Features, FeatureStore
from semisam_o1.files import WorkFiles, atomic_write, read_json, remove, write_json
from semisam_o1.round_0.calibration import Calibration, calibrate
from semisam_o1.round_0.copy_maker import CopyMaker, Plan
from semisam_o1.round_0.detail import AddDetail, Details
from semisam_o1.round_0.first_pass import Propagation
from semisam_o1.round_0.label_fusion import LabelFusion
from semisam_o1.round_0.outlines import Outlined, Outlines, applied, border_shift_mm, learn
from semisam_o1.round_0.passes import FirstPass, left_out, outside_classes, settle_vote
from semisam_o1.round_0.propagation import aligns_through_one, emptied
from semisam_o1.round_0.quality import Evidence
from semisam_o1.round_0.quality_estimate import QualityEstimate, copies_evidence, labelled_evidence
from semisam_o1.round_0.templates import reference, templates_of
from semisam_o1.round_0.turned_scans import TurnedScans, lacks_turned
from semisam_o1.round_0.way_back import consistency, save_way_back
from semisam_o1.runfolder import OUTLINES, RoundFolder, RunFolder
from semisam_o1.types import Case, Probabilities, UserError
from semisam_o1.uncertainty import predictive_entropy

log = logging.getLogger("semisam_o1")
LEAST_LEFT_OUT = 2  # labelled scans to which the label of others was carried, that join the copies in a calibration


def write_results(
    folder: RoundFolder,
    case: Case,
    probabilities: Probabilities,
    found: Features,
    numbers: Sequence[int],
    published: bool = False,
    detail: AddDetail | None = None,
) -> float:
    """Write label and confidence of one case on the scan's own grid; returns the mean uncertainty there.

    ``numbers``: the class number of each channel. Probabilities are interpolated linearly between tokens and constant
    as far as the outermost tokens reach (see `to_grid`); ``detail`` adds what tokens lost (see `Details`). With
    ``published``, each voxel has the probabilities of its token, and voxels outside of all tokens are background.
    """
    shape = found.scan.shape
    label, highest, uncertainty = np.empty(shape, np.uint16), np.empty(shape, np.float32), torch.empty(shape)
    for rows, part in slabs(found.scan, len(probabilities)):
        if published:
            shares = to_grid(probabilities, found.affine, part, "nearest", "zeros")
            shares[0] += 1 - shares.sum(0)
        else:
            shares = to_grid(probabilities, found.affine, part)
            shares = shares if detail is None else detail(shares, part)
        label[rows], highest[rows] = shares.argmax(0).numpy(), shares.amax(0).numpy()
        uncertainty[rows] = predictive_entropy(shares.clamp(0, 1)[None])
    write_label(folder.label(case.name), label, case.image, found.scan, numbers)
    write_share(folder.confidence(case.name), highest, case.image, found.scan)
    return float(uncertainty.mean())


def write_again(
    folder: RoundFolder, case: Case, probabilities: Probabilities, store: FeatureStore, cohort: Cohort, details: Details
) -> float:
    """`write_results` of a case that the first pass has labelled, with other ``probabilities``."""
    first = FirstPass.load(folder.work("first"), case.name, "frame", "template", "points", "reached")
    found = store.frame(first.frame).load(case.name)
    numbers = cohort.class_numbers
    return write_results(folder, case, probabilities, found, numbers, detail=details(first, found))


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
    chain: Callable | None = None,
    inferer: Callable | None = None,
) -> Engine:
    """Propagate the templates' label to each case with ``propagate``, see `Propagation`.

    Writes labels, confidences (the highest probability) and copied labels of round 0 of the run ``output_dir``. Cases
    with a record in ``work/`` are skipped, unless they lie turned and their features are gone. ``published``: see
    `write_results`. ``guard``: also align back, and drop the vote near borders for the whole pool if labels are less
    consistent with it, see `settle_vote`. ``chain``, ``inferer``: to look for scans that lie turned, see `TurnedScans`;
    without them nothing looks.
    """
    detailed = not published and aligns_through_one(propagate)
    templates = templates_of(store, cohort, not detailed, published)
    if not (published or detailed or any(template.reference.label.argmax(0).any() for template in templates)):
        raise UserError(
            f"template {templates[0].name}: no class fills a token (a cell of the feature grid) of "
            f"{templates[0].features.step_mm:.3g} mm, and nothing can be carried over: "
            "use a smaller feature_spacing or feature_step, or the method nearest."
        )
    poses = TurnedScans(store, cohort, chain, inferer) if chain is not None and inferer is not None else None
    propagation, folder = Propagation(store, templates, propagate, poses), RunFolder(output_dir).round(0)
    records, back, details = folder.work("first"), folder.work("back"), Details(store, cohort)

    def process(case: Case) -> float:
        made = (folder.label(case.name), folder.copied(case.name))
        if records.has(case.name, "uncertainty") and all(path.is_file() for path in made):
            first = FirstPass.load(records, case.name, "uncertainty", "frame")
            if not lacks_turned(store, case, first.frame):
                return first.uncertainty
        carried, share = propagation.within(propagation(case.name))
        if share is not None and (outside := outside_classes(share, cohort.class_numbers)):
            names = ", ".join(str(cohort.classes.get(number, number)) for number in outside)
            log.info("case %s: outside of its field of view, left empty: %s", case.name, names)
        found, result = carried.features, carried.result
        floor = propagation.floor(found)
        write_label(folder.copied(case.name), floor.argmax(0).numpy(), case.image, found.scan, cohort.class_numbers)
        first, numbers, gain = propagation.record(carried, share), cohort.class_numbers, None
        detail = details(first, found)
        uncertainty = write_results(folder, case, result.probabilities, found, numbers, published, detail)
        if guard and result.maps and result.without_vote is not None:
            way = propagation.way_back(carried)
            save_way_back(back, case.name, way)
            voted, plain = (consistency(way, p, found.step_mm) for p in (result.probabilities, result.without_vote))
            gain = voted - plain
        else:
            first = first._replace(without_vote=None)
        first._replace(uncertainty=uncertainty, vote_gain=gain).save(records, case.name)
        return uncertainty

    engine = case_engine(process, "propagation", handlers)

    @engine.on(Events.COMPLETED)
    def finish(engine: Engine) -> None:
        values = dict(engine.state.values)
        if guard and settle_vote(records, values):
            log.info("no vote near borders: labels are more consistent without it")
            for name in values:
                shares = FirstPass.load(records, name, "probabilities").probabilities
                values[name] = write_again(folder, cohort.case(name), shares, store, cohort, details)
        folder.uncertainty.write(folder.uncertainty.read() | {name: {"uncertainty": v} for name, v in values.items()})

    return engine


def label_fusion_engine(
    store: FeatureStore,
    cohort: Cohort,
    cases: Sequence[Case],
    output_dir: str | Path,
    atlases: int = 5,
    labelled_atlases: int = 5,
    iterations: Sequence[int] = (20, 20, 10),
    handlers: Sequence = (),
) -> Engine:
    """Fuse each label of the first pass with those of the most similar scans, see `LabelFusion`.

    These are ``labelled_atlases`` of the labelled scans and ``atlases`` of ``cases``. If the first pass aligned nothing
    (`copy`, `prototype`), labels stay unchanged.
    """
    folder = RunFolder(output_dir).round(0)
    records, fused, details = folder.work("first"), folder.work("fused"), Details(store, cohort)

    @functools.cache
    def fusion() -> LabelFusion:
        found = LabelFusion(store, records, cohort, cases, atlases, labelled_atlases, iterations)
        if not (found.pool or found.labelled):
            log.info("label fusion: the first pass aligned nothing to the template, labels stay unchanged")
        return found

    def process(case: Case) -> float | None:
        if not records.has(case.name, "alignments"):
            fusion()
            return None
        scan = fusion().scan(case.name)
        probabilities = scan.probabilities
        if (found := fusion()(scan, {case.name})) is not None:
            if (share := FirstPass.load(records, case.name, "reached").reached) is not None:
                found = found._replace(probabilities=emptied(found.probabilities, share))
            found.save(fused, case.name)
            probabilities = found.probabilities
        uncertainty = write_again(folder, case, probabilities, store, cohort, details)
        if found is None:
            remove(fused.path(case.name))  # of an earlier fusion, with other atlases; it tells whether a label is fused
        return uncertainty

    engine = case_engine(process, "label fusion", handlers)

    @engine.on(Events.STARTED)
    def look_again(engine: Engine) -> None:
        fusion.cache_clear()

    @engine.on(Events.COMPLETED)
    def finish(engine: Engine) -> None:
        values = dict(engine.state.values)
        found, before = learned_outlines(store, cohort, records, fused), outlines_of(records)
        known = {case.name for case in cohort.cases}
        if any(outlines.gain is not None and set(outlines.factors) != {1.0} for outlines in (found, before)):
            for name in sorted(known & {*fused.names()}):  # also of earlier runs of the engine
                if name in values or found.factors != before.factors:
                    shares = applied(fused.load(name, ["probabilities"])[0], found.factors)
                    values[name] = write_again(folder, cohort.case(name), shares, store, cohort, details)
        rows = {name: {"uncertainty": value} for name, value in values.items()}
        folder.uncertainty.write(folder.uncertainty.read() | rows)
        write_json(records.folder / OUTLINES, found._asdict())  # last: labels of a killed start have other factors

    return engine


def outlines_of(records: WorkFiles) -> Outlines:
    """What was learned of how people outline."""
    path = records.folder / OUTLINES
    content = read_json(path) if path.is_file() else {"factors": [], "gain": None}
    return Outlines(tuple(content["factors"]), content["gain"])


def learned_outlines(store: FeatureStore, cohort: Cohort, records: WorkFiles, fused: WorkFiles) -> Outlines:
    """What labelled scans, to which the label of the others was carried, tell of how people outline; see `outlines`."""
    scans, steps = [], []
    for case, probabilities in left_out(cohort, records, fused):
        found = store.frame(FirstPass.load(records, case.name, "frame").frame).load(case.name)
        scans.append(Outlined(probabilities, reference(case, found, cohort).label))
        steps.append(found.step_mm)
    outlines = learn(scans)
    for number, factor in enumerate(outlines.factors, start=1):
        if factor != 1:
            moved = np.mean([border_shift_mm(one.probabilities, factor, number, s) for one, s in zip(scans, steps)])
            name, where = cohort.classes[cohort.class_numbers[number]], "further out" if moved > 0 else "further in"
            log.info("learned from %d labelled scans: %s, borders %.2f mm %s", len(scans), name, abs(moved), where)
    return outlines


def copies_engine(
    store: FeatureStore,
    cohort: Cohort,
    cases: Sequence[Case],
    chain: Callable,
    inferer: Callable,
    propagate: Callable,
    output_dir: str | Path,
    atlases: int = 5,
    labelled_atlases: int = 5,
    label_fusion: bool = True,
    handlers: Sequence = (),
) -> Engine:
    """Make and label copies of the templates; runs over `Plan`, see `CopyMaker`. A copy that was made is skipped.

    Each leaves an image for the networks of later rounds, and work files with the true class of each voxel and the
    probabilities of round 0. ``atlases``, ``labelled_atlases``: see `label_fusion_engine`, if ``label_fusion``.
    """
    folder = RunFolder(output_dir).round(0)
    records, made = folder.work("first"), folder.work("copies")

    @functools.cache
    def maker() -> CopyMaker:
        templates = templates_of(store, cohort)
        fusion = LabelFusion(store, records, cohort, cases, atlases, labelled_atlases) if label_fusion else None
        return CopyMaker(store, cohort, records, chain, inferer, Propagation(store, templates, propagate), fusion)

    def step(engine: Engine, plan: Plan) -> None:
        if made.has(plan.name, "truth") and folder.copy(plan.name).is_file():
            return
        try:
            found = maker()(plan)
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            if of_the_machine(error):
                raise
            log.warning("%s of the template cannot be made and is left out: %s", plan.name, error)
            return
        with atomic_write(folder.copy(plan.name)) as aside:
            nibabel.save(nibabel.Nifti1Image(found.copy.image[0].numpy(), found.affine), aside)
        truth = found.copy.label.argmax(0).to(torch.int16)
        small = {} if found.small_dice is None else {"small_dice": found.small_dice}
        made.save(plan.name, {"probabilities": found.probabilities}, {"truth": truth} | small)

    engine = Engine(step)

    for handler in handlers:
        handler.attach(engine)
    return engine


def quality_engine(
    store: FeatureStore, cohort: Cohort, output_dir: str | Path, round: int, handlers: Sequence = ()
) -> Engine:
    """Estimate the quality of the final labels of ``round`` of a run, and write its quality.csv.

    Each round settles once how evidence becomes a predicted Dice, see `calibrate`, by the labels of its copies and, in
    round 0, of labelled scans. A round whose network labelled no copy has the calibration of round 0.
    """
    run = RunFolder(output_dir)
    estimate, folder = QualityEstimate(store, cohort, output_dir), run.round(round)

    def process(case: Case) -> Evidence:
        return estimate.evidence(case, folder.final(case.name))

    engine = case_engine(process, "quality estimate", handlers)

    @engine.on(Events.COMPLETED)
    def finish(engine: Engine) -> None:
        found: dict[str, Evidence] = engine.state.values
        copies, small = copies_evidence(run, round), estimate.small
        people = labelled_evidence(store, cohort, run, small) if round == 0 else ([], [])
        people = people if len(people[0]) >= LEAST_LEFT_OUT else ([], [])
        if found and not folder.calibration.is_file() and (round == 0 or copies[0]):
            true, agreement = (one + other for one, other in zip(copies, people))
            settled = calibrate(list(found.values()), true, agreement, len(people[0]), small)
            write_json(folder.calibration, settled.content())
        if found:
            path = folder.calibration if folder.calibration.is_file() else run.round(0).calibration
            calibration = Calibration.of_content(read_json(path))
            judged = {name: calibration.predict(one) for name, one in found.items()}
            if doubted := sum(bool(one.doubt) for one in judged.values()):
                log.info("cannot tell how good %d of %d labels are; quality.csv says why", doubted, len(judged))
            rows = {name: one.row(cohort.class_numbers) for name, one in judged.items()}
            folder.quality.write(folder.quality.read() | rows)

    return engine
