"""Round 0 as Ignite engines over cases: the first pass, the label fusion, and the quality estimate.

They speak through files in the folder of round 0: ``labels/``, ``confidence/`` and ``copied/`` are for people, the
arrays in ``work/`` for the next engine (see `passes`).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import CommonKeys as Keys

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.export import write_label, write_share
from semisam_o1.data.grids import Grid, to_grid
from semisam_o1.data.transforms import label_chain
from semisam_o1.features import Features, FeatureStore
from semisam_o1.files import disk_full
from semisam_o1.round_0.alignment import CHANNELS, AffineMap, coarse, is_turned, principal, turn_between
from semisam_o1.round_0.atlases import Atlas, carried_from, dissimilarity, fuse
from semisam_o1.round_0.passes import Alignment, FirstPass, Fused
from semisam_o1.round_0.propagation import Propagated, Reference, copy
from semisam_o1.round_0.quality import Quality, WayBack, back_propagate, estimate_quality
from semisam_o1.runfolder import RoundFolder, RunFolder
from semisam_o1.types import Case, Probabilities, UserError
from semisam_o1.uncertainty import entropy, predictive_entropy

log = logging.getLogger("semisam_o1")
CANDIDATES = 100  # scans that are compared with a scan in search of its atlases, the nearest by global descriptor


def reference(case: Case, features: Features, num_classes: int, hdf5_spacing=None, label=None) -> Reference:
    """A labelled scan as propagation takes it: its tokens, and the share of each class in the space of each token.

    ``label`` names another file than the case's own.
    """
    shares = label_chain(features.step_mm, num_classes, hdf5_spacing)(case.item(label))[Keys.LABEL]
    shares = to_grid(shares, shares.affine, Grid(features.affine, tuple(features.tokens.shape[1:])))
    return Reference(features.tokens, shares.clamp(min=0) / shares.sum(0).clamp(min=1e-6))


class Template(NamedTuple):
    """A template by ``name``: its ``features`` and what propagation takes of them."""

    name: str
    features: Features
    reference: Reference


def templates_of(store: FeatureStore, cohort: Cohort) -> list[Template]:
    """The templates; a class that fills no token is said in the log."""
    found = []
    for case in cohort.templates:
        features = store.load(case.name)
        made = reference(case, features, cohort.num_classes, cohort.hdf5_spacing)
        lost = [cohort.classes[number] for number, share in enumerate(made.label) if 0 < float(share.max()) < 0.5]
        if lost:
            text = (
                "template %s: %s fill no token of %.3g mm and will be lost: a smaller feature_spacing or feature_step"
            )
            log.warning(text, case.name, ", ".join(lost), features.step_mm)
        found.append(Template(case.name, features, made))
    return found


def write_results(
    folder: RoundFolder, case: Case, probabilities: Probabilities, found: Features, published: bool = False
) -> float:
    """Label and confidence of one case in the scan's own grid; gives the mean uncertainty there.

    Between tokens probabilities are linear, and beyond the outermost theirs; as ``published`` each voxel has those of
    the token it lies in, and outside of all tokens is background.
    """
    if published:
        probabilities = to_grid(probabilities, found.affine, found.scan, "nearest", "zeros")
        probabilities[0] += 1 - probabilities.sum(0)
    else:
        probabilities = to_grid(probabilities, found.affine, found.scan)
    write_label(folder.label(case.name), probabilities.argmax(0).numpy(), case.image, found.scan)
    write_share(folder.confidence(case.name), probabilities.amax(0).numpy(), case.image, found.scan)
    return float(predictive_entropy(probabilities.clamp(0, 1)[None]).mean())


def case_engine(process: Callable[[Case], float | None], what: str, handlers: Sequence) -> Engine:
    """An engine over cases. One that fails is named in ``engine.state.failed`` with its reason, the others go on.

    What ``process`` gives of a case, if anything, is kept in ``engine.state.values``.
    """

    def step(engine: Engine, case: Case) -> None:
        try:
            value = process(case)
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            if disk_full(error):  # no fault of the scan
                raise
            log.warning("case %s: %s failed and the scan is set aside: %s", case.name, what, error)
            engine.state.failed[case.name] = f"{what} failed: {error}"
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
) -> Engine:
    """Writes, for each case, the templates' label carried there by ``propagate``, one of `propagation`'s functions.

    A scan that stands oblique to a template has features in its stored axes too (see `FeatureStore.frame`), as
    descriptors know no rotation: that frame is taken in which it fits the template that suits it best or, where
    nothing was aligned, whose label is the surer. Writes the labels, confidences (the winner's probability) and copied
    labels of round 0 of the run ``output_dir``. A case that has its record in ``work/`` already is done.
    ``published``: see `write_results`.
    """
    templates = templates_of(store, cohort)
    references = [template.reference for template in templates]
    if not published and not any(reference.label.argmax(0).any() for reference in references):
        raise UserError(
            f"template {templates[0].name}: no class fills a token of {templates[0].features.step_mm:.3g} mm, and "
            "nothing can be carried over: take a smaller feature_spacing or feature_step, or another encoder."
        )
    bases = [principal(reference.tokens, CHANNELS) for reference in references]
    folder, stored = RunFolder(output_dir).round(0), store.frame("stored")
    records = folder.work("first")

    def process(case: Case) -> float:
        if records.has(case.name, "uncertainty"):
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
        alignments = {
            template.name: Alignment(place, coarse(basis(found.tokens), template.reference.tokens)[0])
            for template, basis, place in zip(templates, bases, result.maps)
        }
        write_label(folder.copied(case.name), floor.argmax(0).numpy(), case.image, found.scan)
        uncertainty = write_results(folder, case, result.probabilities, found, published)
        best = templates[result.best].name if result.maps else ""
        FirstPass(result.probabilities, frame, best, result.residual, uncertainty, result.points, alignments).save(
            records, case.name
        )
        return uncertainty

    engine = case_engine(process, "propagation", handlers)

    @engine.on(Events.COMPLETED)
    def finish(engine: Engine) -> None:
        folder.uncertainty.write({name: {"uncertainty": value} for name, value in engine.state.values.items()})

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
    """Each label of the first pass joined with those of the ``atlases`` scans most like it; see `atlases`.

    Scans are compared, and laid on one another, through the template that suits the scan best. A scan stays as it is
    where the first pass aligned nothing (`copy`, `prototype`).
    """
    folder = RunFolder(output_dir).round(0)
    records, fused = folder.work("first"), folder.work("fused")
    tokens = {case.name: store.load(case.name).tokens for case in cohort.templates}
    bases = {name: principal(own, CHANNELS) for name, own in tokens.items()}
    factors = {name: coarse(own[:1], own)[1] for name, own in tokens.items()}

    @functools.cache
    def aligned() -> tuple[list[str], np.ndarray]:
        """The scans that can be atlases, and their global descriptors."""
        names = [case.name for case in cases if records.has(case.name, "alignments")]
        if not names:
            log.info("label fusion: the first pass aligned nothing to the template, labels left alone")
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
        return write_results(folder, case, own, found)

    engine = case_engine(process, "the label fusion", handlers)

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
    """What a label is worth without truth: called with a case and a label file of it; see `quality`.

    A scan is judged by the template that suits it best. The way back from scan to template is found once and kept with
    round 0 of the run ``output_dir``, so that labels of later rounds are judged in no time.
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
            self._go_back(case, found, first)
        name, *way = self.back.load(case.name, ["template", "points", "residual"])
        way, template = WayBack(way[0], float(way[1])), self.templates[name]
        shares = reference(case, found, self.cohort.num_classes, self.cohort.hdf5_spacing, label).label
        if self.fused.path(case.name).exists():
            propagated, apart = self.fused.load(case.name, ["probabilities", "dissimilarity"])
        else:
            propagated = FirstPass.load(self.records, case.name, "probabilities").probabilities
            apart = way.residual if math.isnan(first.residual) else first.residual  # nothing was aligned
        return estimate_quality(template.reference, shares, propagated, way, found.step_mm, float(apart))

    def _go_back(self, case: Case, found: Features, first: FirstPass) -> None:
        """Keep the way back; from the template that it fits best where the first pass aligned nothing."""
        ways = {}
        for name in [first.template] if first.template else self.templates:
            template = self.templates[name]
            turn = None
            if first.frame == "world":
                turn = turn_between(template.features.scan.affine, found.scan.affine)
            ways[name] = back_propagate(template.reference.tokens, found.tokens, found.step_mm, turn=turn)
        best = min(ways, key=lambda name: ways[name].residual)
        small = {"residual": ways[best].residual, "template": best}
        self.back.save(case.name, {"points": ways[best].points}, small)


def quality_engine(
    store: FeatureStore, cohort: Cohort, output_dir: str | Path, round: int, handlers: Sequence = ()
) -> Engine:
    """Judges the labels that ``round`` of a run ends with, without truth, and writes its quality.csv; see `QualityEstimate`."""
    estimate, folder = QualityEstimate(store, cohort, output_dir), RunFolder(output_dir).round(round)

    def process(case: Case) -> Quality:
        return estimate(case, folder.final(case.name))

    engine = case_engine(process, "the quality estimate", handlers)

    @engine.on(Events.COMPLETED)
    def finish(engine: Engine) -> None:
        folder.quality.write({name: quality._asdict() for name, quality in engine.state.values.items()})

    return engine
