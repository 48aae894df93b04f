"""Suggestion of the scan to outline first, or next: the one most similar to the other scans. Uses no labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from monai.utils import CommonKeys as Keys

from semisam_o1.data.cohort import box_of
from semisam_o1.data.datasets import images_alone
from semisam_o1.data.grids import choose_spacing, cropped
from semisam_o1.data.intensities import HAS_DATA
from semisam_o1.data.reader import ScanReader
from semisam_o1.data.transforms import image_chain
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.features import TokenInferer, image_and_mask
from semisam_o1.files import write_text
from semisam_o1.ledger import Ledger
from semisam_o1.report.page import render
from semisam_o1.report.pictures import case_picture, to_ras
from semisam_o1.round_0.alignment import align
from semisam_o1.round_0.atlases import dissimilarity
from semisam_o1.round_0.places import CHANNELS, AffineMap, coarse, pooled, principal
from semisam_o1.runfolder import folder_path
from semisam_o1.types import Case, DatasetError, Tokens

log = logging.getLogger("semisam_o1")
COMMAND = "suggest-template"


class Suggestion(NamedTuple):
    """A scan to outline: its ``rank`` from 1; ``distance``, the mean descriptor distance of all scans to the nearest
    outlined one if this scan is outlined (smaller is better); ``furthest``, the least similar scan."""

    rank: int
    case: str
    distance: float
    furthest: str


def coverage(distances: np.ndarray, given: Sequence[int] = ()) -> np.ndarray:
    """Mean over all scans of the distance to the nearest labelled scan, if scan i and ``given`` are labelled: (N,).

    ``distances`` (N, N): entry (j, i) is the distance of scan j to a label on scan i; the diagonal is ignored.
    """
    table = np.array(distances, float)
    np.fill_diagonal(table, 0)
    reached = table[:, list(given)].min(1) if len(given) else np.full(len(table), np.inf)
    return np.minimum(reached[:, None], table).mean(0)


def distance_table(pooled_tokens: Sequence[Tokens], step_mm: float, seed: int = 0) -> np.ndarray:
    """Descriptor distance between every two scans, all aligned to one of them: (N, N), symmetric.

    They are aligned to the scan whose mean descriptor has the smallest mean distance to the others.
    ``pooled_tokens``: (C, h, w, d) each, on grids of ``step_mm`` mm.
    """
    means = torch.stack([tokens.float().mean((1, 2, 3)) for tokens in pooled_tokens])
    hub = int(torch.cdist(means, means).mean(1).argmin())
    basis = principal(pooled_tokens[hub].float(), CHANNELS)
    reduced = [basis(tokens.float()) for tokens in pooled_tokens]
    places: list[AffineMap] = []
    for number, tokens in enumerate(reduced, start=1):
        places.append(align(reduced[hub], tokens, step_mm, seed=seed)[0][0])
        log.info("comparing %d of %d", number, len(reduced))
    scans = list(zip(reduced, places))
    table = torch.stack([dissimilarity(*scan, scans, step_mm) for scan in scans]).numpy()
    return (table + table.T) / 2


def suggest_template(
    dataset_dir: str | Path,
    output_dir: str | Path,
    top: int = 5,
    given: Sequence[str] = (),
    feature_voxels: int = 400000,
    reader: ScanReader | None = None,
    seed: int = 0,
    channel: int | None = None,
    window: Sequence[float] | None = None,
    find_no_data: bool = True,
) -> list[Suggestion]:
    """The ``top`` scans to outline, best first; writes ``suggestion.html``. Excludes cases in val.txt and test.txt.

    Args:
        given: cases already outlined; then suggests the next one.
        feature_voxels, channel, window, find_no_data: as for a run.
        reader: how scans are read.

    Raises:
        DatasetError: there are no scans, or one of ``given`` does not exist.
    """
    page = folder_path(output_dir) / "suggestion.html"
    Ledger(page.parent, COMMAND).refuse_foreign([page])
    cases = images_alone(dataset_dir, channel)
    names = [case.name for case in cases]
    if unknown := [name for name in given if name not in names]:
        raise DatasetError(
            f"--given {' '.join(unknown)}: no such scan in {dataset_dir}; it has {', '.join(names[:5])} ..."
        )
    reader = reader or ScanReader()
    cases, scans, step = pooled_scans(cases, feature_voxels, reader, window, find_no_data)
    names = [case.name for case in cases]
    table = distance_table(scans, step, seed)
    scores = coverage(table, [names.index(name) for name in given if name in names])
    order = [i for i in np.argsort(scores, kind="stable") if names[i] not in given]
    found = [
        Suggestion(rank, names[i], float(scores[i]), names[int(table[:, i].argmax())])
        for rank, i in enumerate(order[:top], start=1)
    ]
    write_page(page, found, cases, scores, given, reader)
    return found


def pooled_scans(
    cases: Sequence[Case],
    feature_voxels: int,
    reader: ScanReader,
    window: Sequence[float] | None = None,
    find_no_data: bool = True,
) -> tuple[list[Case], list[Tokens], float]:
    """The readable cases, their descriptors pooled to a few thousand tokens, and the pooled token step in mm."""
    grids, readable = [], []
    for case in cases:
        try:
            grid = reader.grid(case.image)
            grids.append(cropped(grid, box_of(reader, case.image)) if find_no_data else grid)
            readable.append(case)
        except Exception as error:  # noqa: BLE001 - readers raise many kinds of errors; set the scan aside
            log.warning("case %s: cannot be read and is set aside: %s", case.name, error)
    if len(readable) < 2:
        raise DatasetError(f"{len(readable)} readable scans: at least two are needed to compare scans.")
    step = choose_spacing(grids, feature_voxels)
    chain = image_chain(step, reader, window=window, find_no_data=find_no_data, keep_mask=True)
    encoder, inferer = mind(), TokenInferer()
    scans, kept, factor = [], [], None
    for number, case in enumerate(readable, start=1):
        try:
            with torch.no_grad():
                item = chain({"case": case.name, "image": str(case.image)})
                image, _, _, mask = image_and_mask(
                    {key: item[key][None] for key in (Keys.IMAGE, HAS_DATA) if key in item}
                )
                tokens = inferer(image, encoder, **mask)
        except Exception as error:  # noqa: BLE001 - as above
            log.warning("case %s: cannot be read and is set aside: %s", case.name, error)
            continue
        tokens = tokens.as_tensor()[0]
        if not tokens.isfinite().all():
            log.warning("case %s: has no usable intensities (all of them NaN?) and is set aside", case.name)
            continue
        factor = factor or coarse(tokens[:1], tokens)[1]
        scans.append(pooled(tokens, factor).half())
        kept.append(case)
        log.info("features %d of %d: %s", number, len(readable), case.name)
    if len(kept) < 2:
        raise DatasetError(f"{len(kept)} usable scans: at least two are needed to compare scans.")
    return kept, scans, step * factor


def reason(suggestion: Suggestion, scores: np.ndarray) -> str:
    """One sentence with the reason for a suggestion."""
    typical = float(np.median(scores))
    share = 100 * (1 - suggestion.distance / typical)
    return (
        f"mean distance to the other scans {suggestion.distance:.4f}, {abs(share):.0f}% "
        f"{'below' if share >= 0 else 'above'} that of the median scan "
        f"({typical:.4f}); least similar: {suggestion.furthest}"
    )


def write_page(
    path: Path,
    found: Sequence[Suggestion],
    cases: Sequence[Case],
    scores: np.ndarray,
    given: Sequence[str],
    reader: ScanReader,
) -> None:
    """Write one self-contained page with a picture and the reason for each suggestion."""
    by_name, suggestions = {case.name: case for case in cases}, []
    for suggestion in found:
        image = reader.volume(by_name[suggestion.case].image)
        (scan,), sizes = to_ras([np.asarray(image[0])], np.asarray(image.affine))
        png = case_picture(scan, np.zeros(scan.shape, int), None, sizes, {})
        suggestions.append({**suggestion._asdict(), "png": png, "reason": reason(suggestion, scores)})
    page = render("suggestion.html.j2", suggestions=suggestions, given=given, total=len(cases))
    with Ledger(path.parent, COMMAND).writing(path) as aside:
        write_text(aside, page)
