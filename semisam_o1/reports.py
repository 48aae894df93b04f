"""What a run came to, for people: pictures of labels on their scans and one page, ``RUN/report.html``.

The page is made from the files of the run folder and the scans alone, so it can be made again at any time. It
holds its pictures and styles and asks nothing of a network.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from semisam_o1.files import write_text
from semisam_o1.metrics import SPLITS, STAGES, read_csv, summary
from semisam_o1.pictures import TRUTH_COLOUR, case_picture, class_colour, picture_tag, png, to_ras
from semisam_o1.transforms import HDF5_SUFFIXES, read_volume
from semisam_o1.types import Case

STAGE_NAMES = {"copied": "copied template label (the floor)"}


def _chart(table: Sequence[Mapping]) -> bytes:
    """Mean Dice a round, a line for each split and stage, from `summary`'s rows."""
    figure = Figure(figsize=(5.6, 2.8), dpi=110, layout="constrained")
    axis = figure.subplots()
    rounds = sorted({line["round"] for line in table})
    pairs = [(split, stage) for split in SPLITS for stage in STAGES]
    colours = {"pool": "#0072B2", "val": "#CC79A7", "test": "#D55E00"}
    styles = {
        "copied": ("none", "x"),
        "propagated": ("-", "s"),
        "predicted": ("-", "o"),
        "refined": ("--", "^"),
    }
    for split, stage in pairs:
        points = [
            (line["round"], line["dice_mean"]) for line in table if (line["split"], line["stage"]) == (split, stage)
        ]
        if not points:
            continue
        style, marker = styles[stage]
        look = {
            "color": colours[split],
            "linestyle": style,
            "marker": marker,
            "markersize": 5,
            "linewidth": 1.4,
        }
        axis.plot(*zip(*points), **look, label=f"{split}, {stage}")
        if stage == "copied":
            axis.axhline(points[0][1], color=colours[split], linewidth=0.8, linestyle=":")
    axis.set(xlabel="round", ylabel="mean Dice", xticks=rounds, xlim=(rounds[0] - 0.3, rounds[-1] + 0.3))
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return png(figure)


def write_report(run_dir: Path, cohort, max_cases: int = 200) -> Path:
    """Write ``run_dir``/report.html, one self-contained page, whole or not at all, and return its path.

    It reads ``run.json``, ``metrics.csv``, ``review.csv`` and the final labels (``pseudo_labels``, else those
    of the newest round), each where present, so a run of round 0 alone has its page as well.

    Args:
        run_dir: the run's folder.
        cohort: gives ``templates``, the cases of each split, ``classes``, ``set_aside`` and how to read HDF5.
        max_cases: how many cases get a picture, those most in need of review first.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such run folder; expected what a run has written")
    path = run_dir / "run.json"
    run = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = read_csv(run_dir / "metrics.csv") if (run_dir / "metrics.csv").is_file() else []
    settings = run.get("settings", {})
    unit = "voxels" if settings.get("metric_definition") == "paper" else "mm"
    aside = {**run.get("set_aside", {}), **cohort.set_aside}
    stages = [[stage.get(k) for k in ("stage", "seconds", "peak_memory_mib")] for stage in run.get("stages", [])]
    names = ", ".join(case.name for case in cohort.templates)
    parts = [
        f"<h1>Labels from one template: {escape(names)}</h1>",
        *(f'<p class="warning">{escape(text)}</p>' for text in run.get("warnings", [])),
        f"<p>{INTRODUCTION}</p>",
        _legend(cohort.classes),
        "<h2>Template</h2>",
        *(_figure(case, case.label, cohort, "the given label", is_template=True) for case in cohort.templates),
        "<h2>Numbers</h2>",
        _numbers(rows, cohort.classes, unit),
        "<h2>Cases</h2>",
        *_case_figures(run_dir, cohort, settings.get("split", "pool"), rows, max_cases),
        "<h2>Set aside</h2>",
        _table(["case", "reason"], sorted(aside.items())) if aside else "<p>No case was set aside.</p>",
        "<h2>Run</h2>",
        _table(["stage", "seconds", "peak memory, MiB"], stages) if stages else "",
        "<details><summary>Settings</summary>",
        _table(["setting", "value"], {"seed": run.get("seed"), **settings}.items()),
        "</details><details><summary>Versions</summary>",
        _table(["package", "version"], run.get("versions", {}).items()),
        "</details>",
    ]
    head = f'<meta charset="utf-8"><title>{escape(names)}: semisam_o1 report</title><style>{STYLE}</style>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(parts)
    write_text(
        run_dir / "report.html",
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}{view}</head>\n<body>\n{body}\n</body></html>\n',
    )
    return run_dir / "report.html"


INTRODUCTION = (
    "Every label here comes from the template's alone. Contours are the final labels, in three planes through"
    " the label's centre, the cases most in need of review first."
)
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222 }
body { max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em; overflow-wrap: anywhere } h2 { margin-top: 1.8em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .6em 0; display: block; overflow-x: auto; font-size: .92em }
th, td { padding: .2em .6em; text-align: left; border-bottom: 1px solid #e5e5e5; overflow-wrap: break-word }
th { vertical-align: bottom }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(510px, 100%), 1fr)); gap: 1em }
figure { margin: 0 } figure img { max-width: 100%; display: block } figcaption b { overflow-wrap: anywhere }
.swatch { display: inline-block; width: 1.6em; height: .35em; margin: 0 .3em .2em 0; background: #000 }
.warning { border-left: .3em solid #c00; padding: .4em .8em; background: #fee }
.legend span { margin-right: 1.2em; white-space: nowrap } summary { cursor: pointer; margin: .6em 0 }
"""


def _legend(classes: Mapping[int, str]) -> str:
    """Class names beside their colours."""
    entries = [(class_colour(n), name) for n, name in sorted(classes.items()) if n > 0]
    entries.append((TRUTH_COLOUR, "truth, where known"))
    spans = (f'<span><i class="swatch" style="background:{c}"></i>{escape(str(name))}</span>' for c, name in entries)
    return f'<p class="legend">{"".join(spans)}</p>'


def _cell(value) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(v) for v in value) or "none"
    return "not set" if value is None else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence], text: int = 1) -> str:
    """A table of escaped cells; numbers after the first ``text`` columns stand on the right."""
    rows = [list(row) for row in rows]
    right = [i >= text and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(head))]

    def line(tag: str, cells: Sequence) -> str:
        marks = (' class="n"' if r else "" for r in right)
        return "<tr>" + "".join(f"<{tag}{m}>{escape(_cell(c))}</{tag}>" for m, c in zip(marks, cells)) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table>"


class _Number(float):
    """A float that shows three decimals, or two where it is a distance."""

    digits = 3

    def __str__(self) -> str:
        return f"{float(self):.{self.digits}f}"


class _Distance(_Number):
    digits = 2


def _numbers(rows: Sequence[Mapping], classes: Mapping[int, str], unit: str) -> str:
    """The table of numbers a round and the chart of Dice, from the rows of metrics.csv."""
    table = summary(rows)
    if not table:
        return "<p>No case with truth was scored.</p>"
    foreground = [n for n in sorted(classes) if n > 0]
    foreground = foreground if len(foreground) > 1 else []  # one class: its mean is the mean
    each = [{(s["split"], s["round"], s["stage"]): s["dice_mean"] for s in summary(rows, n)} for n in foreground]
    head = ["split", "round", "stage", "cases", "Dice, mean", "median", "worst"]
    head += [f"Dice, {classes[n]}" for n in foreground] + ["Jaccard", f"HD95, {unit}", f"ASD, {unit}"]
    lines = []
    for line in table:
        key = (line["split"], line["round"], line["stage"])
        cells = [line["split"], line["round"], STAGE_NAMES.get(line["stage"], line["stage"]), line["cases"]]
        cells += [_Number(line[f"dice_{name}"]) for name in ("mean", "median", "worst")]
        cells += [_Number(means.get(key, float("nan"))) for means in each] + [_Number(line["jaccard_mean"])]
        lines.append(cells + [_Distance(line["hd95_mm_mean"]), _Distance(line["asd_mm_mean"])])
    note = "<p>Jaccard, HD95 and ASD are means over the cases; each case counts as the mean of its classes.</p>"
    return _table(head, lines) + note + picture_tag(_chart(table), "mean Dice of each round")


def _final_label(run_dir: Path, name: str) -> Path | None:
    """The label a run ends with: ``pseudo_labels``, else the newest round's refined or predicted one."""
    rounds = sorted(run_dir.glob("round_*"), key=lambda p: int(p.name[6:]) if p.name[6:].isdigit() else -1)
    folders = [run_dir / "pseudo_labels"] + [r / kind for r in rounds[::-1] for kind in ("labels", "predictions")]
    return next((f / f"{name}.nii.gz" for f in folders if (f / f"{name}.nii.gz").is_file()), None)


def _case_figures(run_dir: Path, cohort, split: str, rows: Sequence[Mapping], max_cases: int) -> list[str]:
    """A figure for each case, in the order of review.csv, which is worst first; those it lacks come after."""
    review: dict[str, dict] = {}
    if (run_dir / "review.csv").is_file():
        with open(run_dir / "review.csv", newline="", encoding="utf-8") as file:
            review = {line["case"]: line for line in csv.DictReader(file)}
    rank = {name: i for i, name in enumerate(review)}
    cases = sorted(cohort.split(split), key=lambda case: rank.get(case.name, len(rank)))
    dice: dict[str, list[tuple]] = {}
    for row in rows:
        if row["split"] == split and row["class"] == "mean" and row["stage"] in STAGES[1:]:
            dice.setdefault(row["case"], []).append((row["round"], STAGES.index(row["stage"]), row["dice"]))
    figures = []
    for case in cases[:max_cases]:
        notes = []
        if scores := sorted(dice.get(case.name, [])):
            notes.append(f"Dice {scores[-1][2]:.3f}")
            if len(scores) > 1:
                notes[0] += f" (round {scores[0][0]}: {scores[0][2]:.3f})"
        for column, text in (("uncertainty", "uncertainty"), ("predicted_dice", "predicted Dice")):
            if value := review.get(case.name, {}).get(column):
                notes.append(f"{text} {float(value):.3g}")
        figures.append(_figure(case, _final_label(run_dir, case.name), cohort, ", ".join(notes)))
    first = f"<p>The first {max_cases} of {len(cases)} cases.</p>" if len(cases) > max_cases else ""
    return [first, '<div class="cases">', *figures, "</div>"]


def _figure(case: Case, label: Path | None, cohort, note: str, is_template: bool = False) -> str:
    """A case's picture and a line below it; where it cannot be drawn the page says why and goes on."""
    caption = f"<figcaption><b>{escape(case.name)}</b>: {escape(note or 'truth unknown')}</figcaption>"
    if label is None:
        return f"<figure><p>No label was written.</p>{caption}</figure>"
    spacing = cohort.hdf5_spacing
    try:
        image = read_volume(case.image, cohort.hdf5_key, spacing)
        paths = [label] + ([case.label] if case.label is not None and not is_template else [])
        arrays = [np.asarray(image[0])] + [np.rint(np.asarray(read_volume(p, "label", spacing)[0])) for p in paths]
        (scan, *masks), sizes = to_ras(arrays, np.asarray(image.affine))
        masks = [mask.astype(np.int32).clip(max=cohort.num_classes - 1) for mask in masks] + [None]
        known = not str(case.image).lower().endswith(HDF5_SUFFIXES)  # HDF5 does not say how its axes run
        png = case_picture(scan, masks[0], masks[1], sizes, cohort.classes, marks=known)
    except Exception as error:  # noqa: BLE001 - readers raise many kinds; one bad file must not cost the page
        return f"<figure><p>No picture: {escape(str(error))}</p>{caption}</figure>"
    return f"<figure>{picture_tag(png, f'{case.name}, three planes')}{caption}</figure>"
