"""Round 0 as Ignite engines over cases: the first pass, the second, and the quality estimate.

They speak through files in the folder of round 0: ``labels/``, ``confidence/`` and ``copied/`` are for people, the
arrays in ``work/`` for the next engine.
"""

from __future__ import annotations

import csv
import functools
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import CommonKeys as Keys

from semisam_o1.alignment import CHANNELS, AffineMap, coarse, is_turned, principal, turn_between
from semisam_o1.atlases import Atlas, carried_from, fuse, unlikeness
from semisam_o1.datasets import Cohort
from semisam_o1.engine import UncertaintyList
from semisam_o1.export import write_confidence, write_label
from semisam_o1.features import Features, FeatureStore
from semisam_o1.files import WorkFiles, disk_full, write_text
from semisam_o1.propagation import Propagated, Reference, copy
from semisam_o1.quality import Quality, WayBack, back_propagate, judge
from semisam_o1.refinement import entropy
from semisam_o1.transforms import Grid, label_chain, to_grid
from semisam_o1.types import Case, Probabilities, UserError

log = logging.getLogger("semisam_o1")
CANDIDATES = 100  # scans that are compared with a scan in search of its atlases, the nearest by global descriptor


class QualityList:
    """case -> `Quality`, kept as a CSV, the least trusted first."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def write(self, values: dict[str, Quality]) -> None:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["case", *Quality._fields])
        for name, quality in sorted(values.items(), key=lambda row: (row[1].predicted_dice, row[0])):
            rows.writerow([name, *(f"{value:.4f}" for value in quality)])
        write_text(self.path, text.getvalue())

    def read(self) -> dict[str, Quality]:
        """Empty where none has been written."""
        if not self.path.exists():
            return {}
        with open(self.path, encoding="utf-8", newline="") as file:
            return {row["case"]: Quality(*(float(row[f]) for f in Quality._fields)) for row in csv.DictReader(file)}


def reference(case: Case, features: Features, num_classes: int, hdf5_spacing=None, label=None) -> Reference:
    """A labelled scan as propagation takes it: its tokens, and the share of each class in the space of each token.

    ``label`` names another file than the case's own.
    """
    shares = label_chain(features.step_mm, num_classes, hdf5_spacing)(case.item(label))[Keys.LABEL]
    shares = to_grid(shares, shares.affine, Grid(features.affine, tuple(features.tokens.shape[1:])))
    return Reference(features.tokens, shares.clamp(min=0) / shares.sum(0).clamp(min=1e-6))


def templates_of(store: FeatureStore, cohort: Cohort) -> list[tuple[Features, Reference]]:
    """The templates' features and what propagation takes of them; a class that fills no token is said in the log."""
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
        found.append((features, made))
    return found


def write_results(
    folder: Path, case: Case, probabilities: Probabilities, found: Features, published: bool = False
) -> float:
    """Label and confidence of one case in the scan's own grid; gives the mean entropy there, nats.

    Between tokens probabilities are linear, and beyond the outermost theirs; as ``published`` each voxel has those of
    the token it lies in, and outside of all tokens is background.
    """
    if published:
        probabilities = to_grid(probabilities, found.affine, found.scan, "nearest", "zeros")
        probabilities[0] += 1 - probabilities.sum(0)
    else:
        probabilities = to_grid(probabilities, found.affine, found.scan)
    write_label(folder / "labels" / f"{case.name}.nii.gz", probabilities.argmax(0).numpy(), case.image, found.scan)
    best = probabilities.amax(0).numpy()
    write_confidence(folder / "confidence" / f"{case.name}.nii.gz", best, case.image, found.scan)
    return float(entropy(probabilities.clamp(0, 1)).mean())


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

    A scan that stands oblique to the template has features in its stored axes too (see `FeatureStore.frame`), as
    descriptors know no rotation: that is taken in which it fits the template
    better or, where nothing was aligned, whose label is the surer.
    Writes under ``output_dir``: ``labels/``, ``confidence/`` (the winner's probability), ``copied/``. A case that has
    its arrays in ``work/`` already is done. ``published``: see `write_results`.
    """
    templates = templates_of(store, cohort)
    references = [reference for _, reference in templates]
    if not published and not any(reference.label.argmax(0).any() for reference in references):
        raise UserError(
            f"template {cohort.templates[0].name}: no class fills a token of {templates[0][0].step_mm:.3g} mm, and "
            "nothing can be carried over: take a smaller feature_spacing or feature_step, or another encoder."
        )
    basis = principal(references[0].tokens, CHANNELS)
    folder, stored = Path(output_dir), store.frame("stored")
    drafts = WorkFiles(folder, "first")

    def process(case: Case) -> float:
        if drafts.has(case.name, "uncertainty"):
            return float(drafts.load(case.name, ["uncertainty"])[0])
        found, frame = store.load(case.name), "world"
        turn = turn_between(found.scan.affine, templates[0][0].scan.affine)
        floor = to_grid(copy(references, found.tokens).probabilities, found.affine, found.scan)
        result: Propagated = propagate(references, found.tokens, step_mm=found.step_mm, turn=turn)
        if is_turned(turn) and stored.path(case.name).exists():
            other = stored.load(case.name)
            second = propagate(references, other.tokens, step_mm=other.step_mm)
            aligned = result.to_template is not None
            misfits = [r.residual if aligned else float(entropy(r.probabilities).mean()) for r in (second, result)]
            if misfits[0] < misfits[1]:
                found, result, frame = other, second, "stored"
        small, large = {"residual": result.residual, "frame": frame}, {"probabilities": result.probabilities}
        if result.points is not None:
            large |= {"points": result.points}
        if result.to_template is not None:
            pooled_tokens, _ = coarse(basis(found.tokens), references[0].tokens)
            small |= {"matrix": result.to_template.matrix, "shift": result.to_template.shift, "coarse": pooled_tokens}
        write_label(folder / "copied" / f"{case.name}.nii.gz", floor.argmax(0).numpy(), case.image, found.scan)
        uncertainty = write_results(folder, case, result.probabilities, found, published)
        drafts.save(case.name, large, small | {"uncertainty": uncertainty})
        return uncertainty

    engine = case_engine(process, "propagation", handlers)

    @engine.on(Events.COMPLETED)
    def finish(engine: Engine) -> None:
        UncertaintyList(folder / "uncertainty.csv").write(engine.state.values)

    return engine


def second_pass_engine(
    store: FeatureStore,
    cohort: Cohort,
    cases: Sequence[Case],
    output_dir: str | Path,
    atlases: int = 5,
    iterations: Sequence[int] = (20, 20, 10),
    handlers: Sequence = (),
) -> Engine:
    """Each label of the first pass joined with those of the ``atlases`` scans most like it; see `atlases`.

    Left alone where the first pass aligned nothing (`copy`, `prototype`).
    """
    folder, drafts = Path(output_dir), WorkFiles(output_dir, "first")
    agreed = WorkFiles(output_dir, "agreed")
    template = store.load(cohort.templates[0].name)
    basis = principal(template.tokens, CHANNELS)
    _, factor = coarse(template.tokens[:1], template.tokens)

    @functools.cache
    def aligned() -> tuple[list[str], np.ndarray]:
        """The scans that can be atlases, and their global descriptors."""
        names = [case.name for case in cases if drafts.has(case.name, "matrix")]
        if not names:
            log.info("second pass: the first aligned nothing to the template, labels left alone")
        return names, store.descriptors(names) if names else np.empty((0, 0))

    def tokens_of(name: str) -> tuple[Features, torch.Tensor]:
        (frame,) = drafts.load(name, ["frame"])
        found = store.frame(frame).load(name)
        return found, basis(found.tokens)

    @functools.lru_cache(4 * CANDIDATES)
    def place_of(name: str) -> tuple[torch.Tensor, AffineMap]:
        pooled_tokens, matrix, shift = drafts.load(name, ["coarse", "matrix", "shift"])
        return pooled_tokens, AffineMap(matrix, shift)

    def process(case: Case) -> float | None:
        names, descriptors = aligned()
        if case.name not in names:
            return None
        found, tokens = tokens_of(case.name)
        step = found.step_mm
        pooled_tokens, place = place_of(case.name)
        order = np.argsort(-descriptors @ descriptors[names.index(case.name)], kind="stable")
        others = [names[i] for i in order if names[i] != case.name][:CANDIDATES]
        values = unlikeness(pooled_tokens, place, [place_of(name) for name in others], step * factor)
        chosen = [others[i] for i in values.argsort(stable=True)[:atlases]]
        (own,) = drafts.load(case.name, ["probabilities"])
        carried = []
        for name in chosen:
            atlas = Atlas(tokens_of(name)[1], *drafts.load(name, ["probabilities"]), place_of(name)[1])
            carried.append(carried_from(atlas, tokens, place, step, iterations))
        if carried:
            own, _ = fuse(own, *zip(*carried))
            unlike = float(values.sort().values[:atlases].mean())
            agreed.save(case.name, {"probabilities": own}, {"atlases": chosen, "unlikeness": unlike})
        return write_results(folder, case, own, found)

    engine = case_engine(process, "the second pass", handlers)

    @engine.on(Events.STARTED)
    def look_again(engine: Engine) -> None:
        aligned.cache_clear()
        place_of.cache_clear()

    @engine.on(Events.COMPLETED)
    def finish(engine: Engine) -> None:
        first = UncertaintyList(folder / "uncertainty.csv")
        first.write(first.read() | engine.state.values)

    return engine


class Judge:
    """What a label is worth without truth: called with a case and a label file of it; see `quality`.

    The way back from scan to template is found once and kept with round 0 (``propagated_dir``), so that labels of
    later rounds are judged in no time.
    """

    def __init__(self, store: FeatureStore, cohort: Cohort, propagated_dir: str | Path):
        self.store, self.cohort = store, cohort
        (self.features, self.template), *_ = templates_of(store, cohort)
        self.drafts, self.agreed, self.back = (WorkFiles(propagated_dir, kind) for kind in ("first", "agreed", "back"))

    def __call__(self, case: Case, label: Path) -> Quality:
        frame, residual = self.drafts.load(case.name, ["frame", "residual"])
        found = self.store.frame(frame).load(case.name)
        if not self.back.path(case.name).exists():
            turn = turn_between(self.features.scan.affine, found.scan.affine) if frame == "world" else None
            way = back_propagate(self.template.tokens, found.tokens, found.step_mm, turn=turn)
            self.back.save(case.name, {"points": way.points}, {"residual": way.residual})
        way = WayBack(*self.back.load(case.name, ["points", "residual"]))
        shares = reference(case, found, self.cohort.num_classes, self.cohort.hdf5_spacing, label).label
        if self.agreed.path(case.name).exists():
            propagated, unlikeness = self.agreed.load(case.name, ["probabilities", "unlikeness"])
        else:
            (propagated,) = self.drafts.load(case.name, ["probabilities"])
            unlikeness = way.residual if residual.isnan() else residual  # the first pass aligned nothing
        way = way._replace(residual=float(way.residual))
        return judge(self.template, shares, propagated, way, found.step_mm, float(unlikeness))


def quality_engine(
    store: FeatureStore,
    cohort: Cohort,
    labels_dir: str | Path,
    output_dir: str | Path,
    propagated_dir: str | Path,
    handlers: Sequence = (),
) -> Engine:
    """Judges the labels in ``labels_dir`` without truth and writes ``output_dir``/quality.csv; see `Judge`."""
    judged = Judge(store, cohort, propagated_dir)

    def process(case: Case) -> Quality:
        return judged(case, Path(labels_dir) / f"{case.name}.nii.gz")

    engine = case_engine(process, "the quality estimate", handlers)

    @engine.on(Events.COMPLETED)
    def finish(engine: Engine) -> None:
        QualityList(Path(output_dir) / "quality.csv").write(engine.state.values)

    return engine
