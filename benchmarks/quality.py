"""Accuracy of predicted_dice: rank correlation with true Dice, and detection of labels corrupted on purpose.

    python -m benchmarks quality RUN DIR

RUN: a folder of `semisam-o1 propagate DIR` or `run DIR`; its round 0 is evaluated. Every scan's label is corrupted in
four ways: shifted, cut, replaced by another scan's label, and propagated with a wrong alignment (there it also replaces
the probabilities of round 0, as if round 0 had failed). A label is bad if its true Dice is below 0.6.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from benchmarks.pools import dice_of
from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.grids import to_grid
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.features import FeatureStore
from semisam_o1.files import read_json
from semisam_o1.round_0.calibration import Calibration
from semisam_o1.round_0.passes import FirstPass
from semisam_o1.round_0.places import centred_points, rotation, sample
from semisam_o1.round_0.propagation import Reference, label_radius
from semisam_o1.round_0.quality import WayBack, evidence
from semisam_o1.round_0.templates import templates_of
from semisam_o1.runfolder import RunFolder

BAD = 0.6
FALSE_ALARMS = 0.1


def options(parser) -> None:
    parser.add_argument("run_dir", metavar="RUN", nargs="?")
    parser.add_argument("dataset_dir", metavar="DIR", nargs="?")


def run(options) -> None:
    if options.run_dir is None:
        print("quality: skipped, because it needs RUN and DIR")
        return
    folder = Path(options.run_dir)
    record = json.loads((folder / "run.json").read_text())
    logging.getLogger("semisam_o1").setLevel(logging.ERROR)
    cohort = open_cohort(options.dataset_dir, template=record["template"], check=False)
    cases = [case for case in cohort.split(record["settings"]["split"]) if case.label]
    store = FeatureStore(folder / "features", mind(), record["settings"]["feature_spacing"])
    name, _, template = templates_of(store, cohort)[0]
    first, fused, back = (RunFolder(folder).round(0).work(kind) for kind in ("first", "fused", "back"))
    calibration = Calibration.of_content(read_json(RunFolder(folder).round(0).calibration))
    draw = np.random.RandomState(0)
    rows = []  # kind, true Dice, predicted Dice, reverse consistency, agreement
    labels = {case.name: fused.load(case.name, ["probabilities"])[0] for case in cases}
    for case in cases:
        found = store.frame(FirstPass.load(first, case.name, "frame").frame).load(case.name)
        way = WayBack(*back.load(case.name, ["points", "residual"]))
        way = way._replace(residual=float(way.residual))
        (dissimilarity,) = fused.load(case.name, ["dissimilarity"])
        propagated = labels[case.name]
        place = FirstPass.alignment(first, case.name, name).to_template
        spoiled = spoil(propagated, labels, case.name, template, place, found.step_mm, draw)
        for kind, label in {"good": propagated, **spoiled}.items():
            hard = F.one_hot(label.argmax(0), cohort.num_classes).movedim(-1, 0).float()
            stands = label if kind == "wrong start" else propagated
            spoilt = Reference(found.tokens, hard)
            quality = calibration.predict(evidence(template, spoilt, stands, way, found.step_mm, float(dissimilarity)))
            dice = dice_of(to_grid(label, found.affine, found.scan).argmax(0), case, cohort)
            rows.append((kind, dice, quality.predicted_dice, quality.reverse_consistency, quality.agreement))
    report(rows)


def spoil(label, labels: dict, name: str, template, place, step_mm: float, draw) -> dict[str, torch.Tensor]:
    """Four corrupted labels (num_classes, H, W, D) on the scan's tokens."""
    shape, radius = label.shape[1:], label_radius(label)
    direction = draw.randn(3)
    offset = np.rint(direction / np.linalg.norm(direction) * radius * draw.uniform(0.6, 1.5)).astype(int)
    cut, axis = label.clone(), draw.randint(3)
    places = (label[0] < 0.5).nonzero()[:, axis].float()
    until = int(places.quantile(draw.uniform(0.5, 0.8))) + 1
    part = [slice(None)] * 4
    part[1 + axis] = slice(None, until)
    cut[tuple(part)] = 0
    cut[0][tuple(part[1:])] = 1
    names = [other for other in labels if other != name]
    other = labels[names[draw.randint(len(names))]]
    matrix, shift = place
    wrong = rotation(draw.randn(3) * 0.4) * float(np.exp(draw.randn() * 0.25)) @ matrix
    astray = torch.tensor(draw.randn(3) * radius * step_mm * 0.5, dtype=torch.float32)
    points = centred_points(shape, step_mm) @ wrong.T + shift + astray
    return {
        "shifted": torch.roll(label, tuple(int(n) for n in offset), (1, 2, 3)),
        "cut": cut,
        "another scan's": F.interpolate(other[None], shape, mode="trilinear", align_corners=False)[0],
        "wrong start": sample(template.label, points, step_mm),
    }


def report(rows: list[tuple]) -> None:
    kinds, dice, predicted = [row[0] for row in rows], *(np.array([row[i] for row in rows]) for i in (1, 2))
    good = np.array([kind == "good" for kind in kinds])
    rho = spearmanr(dice[good], predicted[good])[0]
    print(f"{good.sum()} labels: true Dice {dice[good].mean():.3f}, predicted {predicted[good].mean():.3f}, ", end="")
    print(f"mean error {np.abs(dice - predicted)[good].mean():.3f}; Spearman {rho:.2f}, with the corrupted ", end="")
    print(f"{spearmanr(dice, predicted)[0]:.2f}")
    threshold = np.quantile(predicted[dice >= BAD], FALSE_ALARMS)
    print(f"one false alarm in ten among all labels of at least {BAD}: predicted_dice below {threshold:.3f}")
    print(f"{'kind':18}{'labels':>8}{'bad':>6}{'found':>8}{'Dice':>8}{'predicted':>11}")
    for kind in dict.fromkeys(kinds):
        own = np.array([k == kind for k in kinds])
        bad = own & (dice < BAD)
        share = f"{(predicted[bad] < threshold).mean():8.2f}" if bad.any() else "       -"
        print(f"{kind:18}{own.sum():8}{bad.sum():6}{share}{dice[own].mean():8.3f}{predicted[own].mean():11.3f}")
    bad = dice < BAD
    print(f"{'all':18}{len(rows):8}{bad.sum():6}{(predicted[bad] < threshold).mean():8.2f}")
