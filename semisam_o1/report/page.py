"""The report of a run: one page, ``RUN/report.html``, with pictures of labels on their scans.

The page is made only from the run folder and the scans, so it can be made again at any time. It contains its pictures
and styles and loads nothing from the internet. Its text is in ``templates``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.formats import format_of
from semisam_o1.files import is_path, write_text
from semisam_o1.report.curve import curve, remark
from semisam_o1.report.metrics import MEASURES, SPLITS, STAGES, Measure, read_csv, summary
from semisam_o1.report.pictures import (
    PROPOSAL_COLOUR,
    TRUTH_COLOUR,
    case_picture,
    class_colour,
    picture_tag,
    png,
    to_ras,
)
from semisam_o1.reviewed import CORRECTED, Reviewed
from semisam_o1.runfolder import CANNOT_TELL, ODD, RunFolder
from semisam_o1.tables import COUNT, TEXT, header, read_rows
from semisam_o1.types import Case

STAGE_NAMES = {"copied": "copied template label (the floor)"}
NOTES = {"uncertainty": "uncertainty", "predicted_dice": "predicted Dice"}  # column of review.csv -> shown name
KNOWN = {
    "uncertainty": ".6f", "predicted_dice": ".4f", "class": COUNT, "class_dice": ".4f", CANNOT_TELL: TEXT,
    ODD: TEXT,
}  # of its columns  # fmt: skip

PAGES = Environment(
    loader=PackageLoader("semisam_o1.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
# The only unescaped HTML: the tag escapes its description itself.
PAGES.filters["picture"] = lambda content, text: Markup(picture_tag(content, text))  # noqa: S704


def render(template: str, **values: Any) -> str:
    """Render a file of ``templates``; all ``values`` are escaped.

    A template shows a picture, the bytes of a PNG, with ``{{ bytes | picture("its description") }}``.
    """
    return PAGES.get_template(template).render(values)


class _Table(NamedTuple):
    """Rows of text; the columns with indices in ``right`` are right-aligned."""

    head: Sequence[str]
    rows: list[list[str]]
    right: Collection[int] = ()


class _Drawn(NamedTuple):
    """A case on the page: its picture, or the reason why there is none, and its caption."""

    name: str
    note: str
    png: bytes | None = None
    problem: str = ""


def write_report(run_dir: str | Path, cohort: Cohort, max_cases: int = 200) -> Path:
    """Write the self-contained page of a run atomically and return its path.

    It reads the run's record, metrics, review list and final labels, if they exist, so it also works for a run of
    round 0 alone.

    Args:
        run_dir: the run's folder.
        cohort: provides ``templates``, the cases of each split, ``classes``, ``set_aside`` and the HDF5 settings.
        max_cases: number of cases with a picture, those most in need of review first.

    Raises:
        FileNotFoundError: the folder does not exist.
        DatasetError: the folder has an earlier layout.
    """
    run = RunFolder(run_dir)
    if not run.path.is_dir():
        raise FileNotFoundError(f"{run.path}: no such run folder; expected the folder of a run")
    record = run.read_record()
    settings = record.get("settings", {})
    measures = MEASURES[settings.get("metric_definition", "mm")]
    rows = read_csv(run.metrics) if run.metrics.is_file() else []
    split = settings.get("split", "pool")
    aside = {**record.get("set_aside", {}), **cohort.set_aside}
    stages = [[stage.get(k) for k in ("stage", "seconds", "peak_memory_mib")] for stage in record.get("stages", [])]
    page = render(
        "report.html.j2",
        names=", ".join(case.name for case in cohort.templates),
        warnings=record.get("warnings", []),
        legend=[*_colours(cohort), (TRUTH_COLOUR, "truth, where known")],
        templates=[_drawn(case, case.label, cohort, "the given label", is_template=True) for case in cohort.templates],
        numbers=_numbers(rows, cohort, measures),
        cases=_drawn_cases(run, cohort, split, rows, measures[0], max_cases, record.get("labels_round")),
        total=len([case for case in cohort.split(split) if case.name not in cohort.touched]),
        given=_given(run, cohort),
        curve=_curve(record, measures[0]),
        curve_remark=remark(curve(record.get("handed_out", []))),
        labels_round=record.get("labels_round"),
        set_aside=_table(["case", "reason"], sorted(aside.items())),
        stages=_table(["stage", "seconds", "peak memory, MiB"], stages, right=(1, 2)),
        settings=_table(["setting", "value"], [pair for pair in settings.items() if not is_path(pair[1])]),
        versions=_table(["package", "version"], record.get("versions", {}).items()),
    )
    with run.ledger.writing(run.report) as new:
        write_text(new, page)
    return run.report


def _foreground(cohort: Cohort) -> list[tuple[int, str]]:
    """Number and name of each foreground class."""
    return [(number, name) for number, name in sorted(cohort.classes.items()) if number > 0]


def _colours(cohort: Cohort) -> list[tuple[str, str]]:
    """The colour of each foreground class in the pictures, which have channels, and its name."""
    return [(class_colour(channel), name) for channel, (_, name) in enumerate(_foreground(cohort), start=1)]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], right: Collection[int] = ()) -> _Table:
    return _Table(head, [[_cell(value) for value in row] for row in rows], right)


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(v) for v in value) or "none"
    return "not set" if value is None else str(value)


def _numbers(rows: Sequence[Mapping[str, Any]], cohort: Cohort, measures: Sequence[Measure]) -> dict[str, Any]:
    """The table of metrics per round and the chart of the first metric, from the rows of metrics.csv; or {}."""
    lines = summary(rows)
    if not lines:
        return {}
    first, *others = measures
    key = itemgetter("split", "round", "stage")
    foreground = _foreground(cohort)
    classes = foreground if len(foreground) > 1 else []  # with one class, its mean is the overall mean
    each = [{key(line): line[f"{first.name}_mean"] for line in summary(rows, number)} for number, _ in classes]
    head = ["split", "round", "stage", "cases", f"{first.title}, mean", "median", "worst"]
    head += [f"{first.title}, {name}" for _, name in classes]
    head += [f"{m.title}, {m.unit}" if m.unit else m.title for m in others]
    table = []
    for line in lines:
        cells = [line["split"], line["round"], STAGE_NAMES.get(line["stage"], line["stage"]), line["cases"]]
        cells += [first.text(line[f"{first.name}_{s}"]) for s in ("mean", "median", "worst")]
        cells += [first.text(means.get(key(line), float("nan"))) for means in each]
        table.append(cells + [m.text(line[f"{m.name}_mean"]) for m in others])
    *most, last = (m.title for m in others)
    return {
        "table": _table(head, table, right={*range(len(head))} - {0, 2}),
        "means": f"{', '.join(most)} and {last}",
        "charted": first.title,
        "chart": _chart([line for line in lines if line["split"] != "touched"] or lines, first),
    }


def _chart(table: Sequence[Mapping[str, Any]], first: Measure) -> bytes:
    """A PNG chart of the mean of a metric per round, one line for each split and stage, from the rows of `summary`."""
    figure = Figure(figsize=(5.6, 2.8), dpi=110, layout="constrained")
    axis = figure.subplots()
    rounds = sorted({line["round"] for line in table})
    pairs = [(split, stage) for split in SPLITS for stage in STAGES]
    colours = {"pool": "#0072B2", "touched": "#56B4E9", "val": "#CC79A7", "test": "#D55E00"}
    styles = {
        "copied": ("none", "x"),
        "propagated": ("-", "s"),
        "predicted": ("-", "o"),
        "refined": ("--", "^"),
    }
    for split, stage in pairs:
        points = [
            (line["round"], line[f"{first.name}_mean"])
            for line in table
            if (line["split"], line["stage"]) == (split, stage)
        ]
        if not points:
            continue
        style, marker = styles[stage]
        look: dict[str, Any] = {
            "color": colours[split],
            "linestyle": style,
            "marker": marker,
            "markersize": 5,
            "linewidth": 1.4,
        }
        axis.plot(*zip(*points), **look, label=f"{split}, {stage}")
        if stage == "copied":
            axis.axhline(points[0][1], color=colours[split], linewidth=0.8, linestyle=":")
    axis.set(xlabel="round", ylabel=f"mean {first.title}", xticks=rounds, xlim=(rounds[0] - 0.3, rounds[-1] + 0.3))
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return png(figure)


def _given(run: RunFolder, cohort: Cohort) -> dict[str, Any]:
    """What people gave: a table of it, and pictures of corrected labels with the outline of the proposal; or {}."""
    entries = Reviewed(run.reviewed).entries().values()
    if not entries:
        return {}
    names = ("case", "what", "round", "voxels_changed", "dice", "when")
    cells = [[getattr(entry, name) for name in names] for entry in entries]
    shown = [
        ["" if value is None else f"{value:.3f}" if isinstance(value, float) else value for value in row]
        for row in cells
    ]
    head = ["case", "given", "proposal of round", "voxels changed", "Dice of the proposal", "when"]
    drawn = []
    for entry in entries:
        if entry.what == CORRECTED and entry.case in cohort.touched:
            case = replace(cohort.case(entry.case), label=run.round(entry.round or 0).final(entry.case))
            note = f"corrected; the white outline is the label before (Dice {entry.dice or 0:.3f} with yours)"
            drawn.append(_drawn(case, cohort.touched[entry.case], cohort, note, before=True))
    return {"table": _table(head, shown, right=(2, 3, 4)), "pictures": drawn}


def _curve(record: Mapping[str, Any], first: Measure) -> _Table | None:
    """`curve` as a table; None before the first correction."""
    lines = [
        [
            step.labelled,
            step.rounds,
            step.source,
            *("" if v is None else f"{v:.3f}" for v in (step.predicted, step.true)),
        ]
        for step in curve(record.get("handed_out", []))
    ]
    head = ["labelled scans", "rounds trained", "labels of round", "mean predicted Dice", f"{first.title}, where known"]
    return _table(head, lines, right=range(5)) if lines else None


def _drawn_cases(
    run: RunFolder,
    cohort: Cohort,
    split: str,
    rows: Iterable[Mapping[str, Any]],
    first: Measure,
    max_cases: int,
    labels_round: int | None,
) -> list[_Drawn]:
    """The first cases of ``split`` in the order of the review list, worst first; unlisted cases come last.

    ``labels_round``: the round whose labels are shown; None: the last.
    """
    review: dict[str, dict[str, Any]] = {}
    if run.review.is_file():
        there = header(run.review)
        found = read_rows(run.review, {"case": TEXT} | {name: kind for name, kind in KNOWN.items() if name in there})
        review = {row["case"]: row for row in found}
    rank = {name: i for i, name in enumerate(review)}
    scores: dict[str, list[tuple]] = {}
    for row in rows:
        if row["split"] == split and row["class"] == "mean" and row["stage"] in STAGES[1:]:
            place = (row["round"], STAGES.index(row["stage"]), row[first.name])
            scores.setdefault(row["case"], []).append(place)
    drawn = []
    cases = [case for case in cohort.split(split) if case.name not in cohort.touched]
    for case in sorted(cases, key=lambda case: rank.get(case.name, len(rank)))[:max_cases]:
        notes = []
        if steps := sorted(scores.get(case.name, [])):
            shown = [step for step in steps if labels_round is None or step[0] <= labels_round] or steps
            notes.append(f"{first.title} {first.text(shown[-1][2])}")
            other = steps[0] if len(shown) > 1 else steps[-1]  # round 0, or a trained round that is not handed out
            if other != shown[-1]:
                notes[0] += f" (round {other[0]}: {first.text(other[2])})"
        known = review.get(case.name, {})
        notes += [f"{text} {known[name]:.3g}" for name, text in NOTES.items() if known.get(name) is not None]
        if doubt := known.get(CANNOT_TELL):
            notes.append(f"cannot tell how good it is: {doubt}")
        if odd := known.get(ODD):
            notes.append(f"odd: class {odd}")
        if cohort.num_classes > 2 and known.get("class") is not None and known.get("class_dice") is not None:
            name = cohort.classes.get(known["class"], f"class {known['class']}")
            notes.append(f"lowest for {name} ({known['class_dice']:.3g})")
        drawn.append(_drawn(case, run.final(case.name), cohort, ", ".join(notes)))
    return drawn


def _drawn(
    case: Case, label: Path | None, cohort: Cohort, note: str, is_template: bool = False, before: bool = False
) -> _Drawn:
    """A case's picture and caption; if it cannot be drawn, the reason.

    ``before``: the case's own label is not the truth, but the label before a correction.
    """
    note = note or "truth unknown"
    if label is None:
        return _Drawn(case.name, note, problem="No label was written.")
    try:
        image = cohort.reader.volume(case.image)
        paths = [label] + ([case.label] if case.label is not None and not is_template else [])
        arrays = [np.asarray(image[0])] + [cohort.label(case, path).numpy() for path in paths]
        (scan, *masks), sizes = to_ras(arrays, np.asarray(image.affine))
        masks = [mask.astype(np.int32) for mask in masks] + [None]
        known = format_of(case.image).has_geometry  # HDF5 files contain no orientation
        names, colour = dict(enumerate(cohort.classes.values())), PROPOSAL_COLOUR if before else TRUTH_COLOUR
        picture = case_picture(scan, masks[0], masks[1], sizes, names, marks=known, truth_colour=colour)
    except Exception as error:  # noqa: BLE001 - readers raise many kinds of errors; the page must not fail
        return _Drawn(case.name, note, problem=f"No picture: {case.scrubbed(error)}")
    return _Drawn(case.name, note, picture)
