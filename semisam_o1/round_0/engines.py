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
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from monai.utils import CommonKeys as Keys

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.export import write_label, write_share
from semisam_o1.data.grids import Grid, to_grid
from semisam_o1.data.transforms import label_chain
from semisam_o1.encoders.turns import RIGHT_TURNS, frame_of, turn_of
from semisam_o1.errors import of_the_machine
from semisam_o1.features import Features, FeatureStore
from semisam_o1.files import WorkFiles
from semisam_o1.round_0.alignment import CHANNELS, AffineMap, coarse, is_turned, principal, turn_between
from semisam_o1.round_0.atlases import Atlas, carried_from, dissimilarity, fuse
from semisam_o1.round_0.passes import Alignment, FirstPass, Fused, settle_vote
from semisam_o1.round_0.pose import right_turn
from semisam_o1.round_0.propagation import Propagated, Reference, copy
from semisam_o1.round_0.quality import (
    Quality,
    WayBack,
    back_propagate,
    estimate_quality,
    hard,
    reverse_consistency,
)
from semisam_o1.runfolder import RoundFolder, RunFolder
from semisam_o1.types import Case, Probabilities, UserError
from semisam_o1.uncertainty import entropy, predictive_entropy

log = logging.getLogger("semisam_o1")
TURN_MARGIN = 0.03  # of reverse consistency, by which a turned pose must be better
CANDIDATES = 100  # nearest scans by global descriptor, from which the atlases of a scan are selected


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


def templates_of(store: FeatureStore, cohort: Cohort, published: bool = False) -> list[Template]:
    """Load the templates."""
    found = []
    for case in cohort.templates:
        features = store.load(case.name)
        make = published_reference if published else reference
        found.append(Template(case.name, features, make(case, features, cohort)))
    return found


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
    """Propagate the templates' label to each case with ``propagate``, a function of the module `propagation`.

    A scan that is oblique to a template also has features in its stored axes (see `FeatureStore.frame`), because
    descriptors are not invariant to rotation. Of the two frames, the one with the smaller descriptor distance to the
    best template is used, or, if nothing was aligned, the one with the lower entropy. A scan that lies turned by right
    angles relative to its best template, see `right_turn`, is propagated to again in the template's pose.

    Writes labels, confidences (the highest probability) and copied labels of round 0 of the run ``output_dir``. Cases
    with a record in ``work/`` are skipped. ``published``: see `write_results`. ``guard``: also align back, and drop the
    vote near borders for the whole pool if labels are less consistent with it, see `settle_vote`.
    """
    templates = templates_of(store, cohort, published)
    references = [template.reference for template in templates]
    if not published and not any(reference.label.argmax(0).any() for reference in references):
        raise UserError(
            f"template {templates[0].name}: no class fills a token (a cell of the feature grid) of "
            f"{templates[0].features.step_mm:.3g} mm, and nothing can be carried over: "
            "use a smaller feature_spacing or feature_step, or another encoder."
        )
    bases = [principal(reference.tokens, CHANNELS) for reference in references]
    folder, stored = RunFolder(output_dir).round(0), store.frame("stored")
    records, back = folder.work("first"), folder.work("back")

    def process(case: Case) -> float:
        made = (folder.label(case.name), folder.copied(case.name))
        if records.has(case.name, "uncertainty") and all(path.is_file() for path in made):
            return FirstPass.load(records, case.name, "uncertainty").uncertainty
        found, frame = store.load(case.name), "world"
        turns = [turn_between(found.scan.affine, template.features.scan.affine) for template in templates]
        floor = to_grid(copy(references, found.tokens).probabilities, found.affine, found.scan)
        result: Propagated = propagate(references, found.tokens, step_mm=found.step_mm, turns=turns)
        if any(is_turned(turn) for turn in turns) and stored.path(case.name).exists():
            other = stored.load(case.name)
            second = propagate(references, other.tokens, step_mm=other.step_mm)
            misfits = [r.residual if result.maps else float(entropy(r.probabilities).mean()) for r in (second, result)]
            if misfits[0] < misfits[1]:
                found, result, frame = other, second, "stored"
        way = None
        if frame == "world" and result.maps and store.encoder.can_turn:
            number = right_turn(references[result.best].tokens, found.tokens, found.step_mm, store.encoder.turned)
            if number:
                other, name = store.frame(frame_of(number)).load(case.name), frame_of(number)
                turn = torch.tensor(RIGHT_TURNS[number], dtype=torch.float32)
                second = propagate(references, other.tokens, step_mm=other.step_mm, turns=[turn] * len(references))
                tried = [(found, result, frame), (other, second, name)]
                ways = [way_back([templates[r.best]], f, where) for f, r, where in tried]
                values = [consistency(way, r.probabilities, f.step_mm) for way, (f, r, _) in zip(ways, tried)]
                if second.residual < result.residual and values[1] > values[0] + TURN_MARGIN:
                    log.info("case %s: lies turned by right angles relative to the template", case.name)
                    (found, result, frame), way = tried[1], ways[1]
                else:
                    way = ways[0]
        alignments = {
            template.name: Alignment(place, coarse(basis(found.tokens), template.reference.tokens)[0])
            for template, basis, place in zip(templates, bases, result.maps)
        }
        write_label(folder.copied(case.name), floor.argmax(0).numpy(), case.image, found.scan, cohort.class_numbers)
        uncertainty = write_results(folder, case, result.probabilities, found, cohort.class_numbers, published)
        best = templates[result.best].name if result.maps else ""
        gain, without = None, None
        if guard and result.maps and result.without_vote is not None:
            without, way = result.without_vote, way or way_back([templates[result.best]], found, frame)
            save_way_back(back, case, way)
            voted, plain = (consistency(way, p, found.step_mm) for p in (result.probabilities, without))
            gain = voted - plain
        FirstPass(
            result.probabilities, frame, best, result.residual, uncertainty, result.points, alignments, without, gain
        ).save(records, case.name)
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
    """Fuse each label of the first pass with those of the ``atlases`` most similar scans; see the module `atlases`.

    Scans are compared and aligned to each other through the scan's best template. If the first pass aligned nothing
    (`copy`, `prototype`), labels stay unchanged.
    """
    folder = RunFolder(output_dir).round(0)
    records, fused = folder.work("first"), folder.work("fused")
    tokens = {case.name: store.load(case.name).tokens for case in cohort.templates}
    bases = {name: principal(own, CHANNELS) for name, own in tokens.items()}
    factors = {name: coarse(own[:1], own)[1] for name, own in tokens.items()}

    @functools.cache
    def aligned() -> tuple[list[str], np.ndarray]:
        """The names of possible atlases, and their global descriptors."""
        names = [case.name for case in cases if records.has(case.name, "alignments")]
        if not names:
            log.info("label fusion: the first pass aligned nothing to the template, labels stay unchanged")
        return names, store.descriptors(names) if names else np.empty((0, 0))

    def tokens_of(name: str, template: str) -> tuple[Features, torch.Tensor]:
        found = store.frame(FirstPass.load(records, name, "frame").frame).load(name)
        return found, bases[template](found.tokens)

    @functools.lru_cache(4 * CANDIDATES)
    def place_of(name: str, template: str) -> tuple[torch.Tensor, AffineMap]:
        place, pooled_tokens = FirstPass.alignment(records, name, template)
        return pooled_tokens, place

    def process(case: Case) -> float | None:
        names, descriptors = aligned()
        if case.name not in names:
            return None
        first = FirstPass.load(records, case.name, "template", "probabilities")
        found, scan = tokens_of(case.name, first.template)
        step = found.step_mm
        pooled_tokens, place = place_of(case.name, first.template)
        order = np.argsort(-descriptors @ descriptors[names.index(case.name)], kind="stable")
        others = [names[i] for i in order if names[i] != case.name][:CANDIDATES]
        places = [place_of(name, first.template) for name in others]
        values = dissimilarity(pooled_tokens, place, places, step * factors[first.template])
        chosen = [others[i] for i in values.argsort(stable=True)[:atlases]]
        own, carried = first.probabilities, []
        for name in chosen:
            label = FirstPass.load(records, name, "probabilities").probabilities
            atlas = Atlas(tokens_of(name, first.template)[1], label, place_of(name, first.template)[1])
            carried.append(carried_from(atlas, scan, place, step, iterations))
        if carried:
            own, _ = fuse(own, *zip(*carried))
            Fused(own, chosen, float(values.sort().values[:atlases].mean())).save(fused, case.name)
        return write_results(folder, case, own, found, cohort.class_numbers)

    engine = case_engine(process, "label fusion", handlers)

    @engine.on(Events.STARTED)
    def look_again(engine: Engine) -> None:
        aligned.cache_clear()
        place_of.cache_clear()

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
            save_way_back(self.back, case, way_back(templates, found, first.frame))
        name, points, residual = self.back.load(case.name, ["template", "points", "residual"])
        way, template = WayBack(points, float(residual)), self.templates[name]
        shares = reference(case, found, self.cohort, label).label
        if self.fused.path(case.name).exists():
            propagated, distance = self.fused.load(case.name, ["probabilities", "dissimilarity"])
        else:
            propagated = FirstPass.load(self.records, case.name, "probabilities").probabilities
            distance = way.residual if math.isnan(first.residual) else first.residual  # NaN: nothing was aligned
        return estimate_quality(template.reference, shares, propagated, way, found.step_mm, float(distance))


class TemplatesWayBack(NamedTuple):
    """The reverse alignment from a ``template`` to a scan."""

    template: Template
    way: WayBack


def way_back(templates: Sequence[Template], found: Features, frame: str) -> TemplatesWayBack:
    """The reverse alignment to a scan, with features in ``frame``, from the template with the smallest distance."""
    ways = []
    for template in templates:
        turn = turn_between(template.features.scan.affine, found.scan.affine) if frame == "world" else None
        if (right := turn_of(frame)) is not None:
            turn = torch.tensor(right.T, dtype=torch.float32)  # from template to scan
        way = back_propagate(template.reference.tokens, found.tokens, found.step_mm, turn=turn)
        ways.append(TemplatesWayBack(template, way))
    return min(ways, key=lambda found: found.way.residual)


def save_way_back(folder: WorkFiles, case: Case, back: TemplatesWayBack) -> None:
    """Store a reverse alignment for the quality estimate."""
    folder.save(case.name, {"points": back.way.points}, {"residual": back.way.residual, "template": back.template.name})


def consistency(back: TemplatesWayBack, probabilities: Probabilities, step_mm: float) -> float:
    """The reverse consistency of the label with the largest of ``probabilities``."""
    return reverse_consistency(hard(probabilities), back.template.reference, back.way, step_mm)


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
