"""Estimated run time and disk space of a run, and the text that ``validate`` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping

import numpy as np

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.findings import Problem, table
from semisam_o1.data.grids import choose_spacing

# Rough costs on two CPU cores. Costs per case are for REFERENCE_VOXELS working voxels and scale linearly.
REFERENCE_VOXELS = 400_000


SECONDS_PER_CASE_FEATURES = 1.0


SECONDS_PER_CASE_PROPAGATION = 10


SECONDS_WHATEVER_THE_SIZE = 6  # per case, for first pass, label fusion and quality estimate together


SECONDS_PER_MEGAVOXEL = 0.7  # one mean teacher iteration, per million voxels of the batch; with five classes


OF_CLASSES = 0.6, 0.09  # times that, whatever their number, and for each class; 38 classes took four times as long


SECONDS_PER_CASE_PREDICTION = 1.5


TOKEN_BYTES_PER_VOXEL = 84


LABEL_BYTES_PER_VOXEL = 0.05  # compressed label map, per stored voxel


ENTROPY_BYTES_PER_VOXEL = 1.0  # compressed map that is zero far from every border


MODEL_BYTES = 40e6


def estimate(cohort: Cohort, settings: Mapping) -> dict:
    """Estimate the cost of a run from the scans' sizes: seconds per stage on two CPU cores, bytes on disk.

    Args:
        settings: ``max_iterations`` (per round) and ``num_rounds``, 0 by default; ``first_round_factor``, the length
            of the first round relative to later ones; ``batch_voxels``, voxels per training iteration;
            ``feature_spacing``, mm (the stored grid if None), by default of `REFERENCE_VOXELS`; ``template_copies``,
            each of which costs as much as a scan.

    Returns:
        ``features``, ``propagation``, ``training``, ``prediction`` and their sum ``seconds``;
        ``feature_bytes``, ``label_bytes``, ``model_bytes`` and their sum ``bytes``.
    """
    rounds = int(settings.get("num_rounds", 0))
    iterations = (
        int(settings.get("max_iterations", 0)) * (rounds - 1 + settings.get("first_round_factor", 1)) * bool(rounds)
    )
    grids = {case.name: cohort.grid(case) for case in cohort.cases}
    if "feature_spacing" in settings:
        spacing = settings["feature_spacing"]
    else:
        spacing = choose_spacing(cohort.template_grids, REFERENCE_VOXELS)
    working = {name: np.prod(grid.shape * grid.spacing / (spacing or grid.spacing)) for name, grid in grids.items()}
    pool = [case.name for case in cohort.pool]
    pool_size = sum(working[name] for name in pool) / REFERENCE_VOXELS
    of_classes = OF_CLASSES[0] + OF_CLASSES[1] * cohort.num_classes
    copied = 1 + min(int(settings.get("template_copies", 0)), len(pool)) / max(1, len(pool))
    held_out = sum(working[case.name] for case in cohort.val + cohort.test) / REFERENCE_VOXELS
    seconds = {
        "features": SECONDS_PER_CASE_FEATURES * sum(working.values()) / REFERENCE_VOXELS,
        "propagation": (SECONDS_PER_CASE_PROPAGATION * pool_size + SECONDS_WHATEVER_THE_SIZE * len(pool)) * copied,
        "training": SECONDS_PER_MEGAVOXEL * settings.get("batch_voxels", 1e6) / 1e6 * iterations * of_classes,
        "prediction": SECONDS_PER_CASE_PREDICTION * (pool_size * rounds + held_out * bool(rounds)),
    }
    stored = sum(float(np.prod(grids[name].shape)) for name in pool)
    a_round = 2 * LABEL_BYTES_PER_VOXEL + ENTROPY_BYTES_PER_VOXEL  # prediction, refined label, entropy
    sizes = {
        "feature_bytes": TOKEN_BYTES_PER_VOXEL * sum(working.values()),
        "label_bytes": stored * (2 * LABEL_BYTES_PER_VOXEL + rounds * a_round),  # plus round 0 and the final labels
        "model_bytes": MODEL_BYTES * (rounds + 1) * bool(rounds),
    }
    whole = {"seconds": sum(seconds.values()), "bytes": sum(sizes.values())}
    return {key: round(float(value), 1) for key, value in (seconds | sizes | whole).items()}


def estimate_text(estimate: Mapping, of: str = "") -> str:
    """An `estimate` as one sentence. ``of``: the run's settings, in words."""
    stages = ", ".join(f"{stage} {_duration(estimate[stage])}" for stage in list(estimate)[:4] if estimate[stage])
    whole = f"about {_duration(estimate['seconds'])} on two CPU cores"
    return f"A run{of and f' ({of})'} will take {whole} ({stages}) and {_size(estimate['bytes'])} on disk."


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    return f"{max(1, round(count / 1e6))} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def validate_text(cohort: Cohort, problems: Iterable[Problem], settings: Mapping | None = None, of: str = "") -> str:
    """The text that ``validate`` prints: ``problems``, lists, classes, voxels, then time and disk space.

    ``settings``: see `estimate`. ``of``: the run's settings, in words.
    """
    grids = [cohort.grid(case) for case in cohort.cases]
    spacings = np.array([grid.spacing for grid in grids])
    shapes = np.array([grid.shape for grid in grids])
    unsaid = " (not in the files: 1 mm assumed)" if cohort.unsaid_spacing else ""
    counts = [f"{len(cohort.split(split))} {split}" for split in ("pool", "val", "test")]
    counts.append(f"{len(cohort.set_aside)} set aside")
    labelled = sum(case.label is not None for case in cohort.cases) - len(cohort.templates)
    lines = [
        table(problems),
        "",
        f"template    {', '.join(case.name for case in cohort.templates)}",
        f"cases       {', '.join(counts)}; {labelled} of them with a label for metrics",
        f"classes     {', '.join(f'{number} {name}' for number, name in cohort.classes.items())}",
        f"voxels      {_ranges(shapes)} per scan, spacing {_ranges(spacings)} mm{unsaid}",
        "",
        estimate_text(estimate(cohort, settings or {}), of),
    ]
    return "\n".join(text if "\n" in text else textwrap.fill(text, 100, subsequent_indent=" " * 12) for text in lines)


def _ranges(rows: np.ndarray) -> str:
    ends = [(f"{low:.4g}", f"{high:.4g}") for low, high in zip(rows.min(0), rows.max(0))]
    return " x ".join(low if low == high else f"{low}–{high}" for low, high in ends)
