"""Image files at any path as cases, for prediction with a trained model."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

from semisam_o1.data.checks import check_case
from semisam_o1.data.findings import SET_ASIDE, Problem, table
from semisam_o1.data.folders import composed, scans_of
from semisam_o1.data.formats import SUFFIXES, UNSAID_SPACING, case_name, format_of
from semisam_o1.data.pseudonyms import renamed
from semisam_o1.data.reader import ScanReader
from semisam_o1.literals import is_name
from semisam_o1.types import Case, DatasetError

log = logging.getLogger("semisam_o1")


def image_files(folder: str | Path, name_ignored: bool = True) -> list[Path]:
    """The images of a folder, or of its subfolder ``images`` or ``data`` if it has one, sorted. The log names the rest.

    ``name_ignored``: see `folders.find_files`.

    Raises:
        DatasetError: there is none.
    """
    folder = Path(folder).expanduser()
    inner = next((folder / name for name in ("images", "data") if (folder / name).is_dir()), folder)
    problems: list[Problem] = []
    found = scans_of(inner, problems, name_ignored)
    if problems:
        log.warning("%s: problems found.\n%s", inner, table(problems))
    if not found:
        raise DatasetError(f"{inner}: no image; expected one file a scan, one of {', '.join(SUFFIXES)}.")
    return found


def cases_of(images: str | Path | Sequence[str | Path], pseudonyms: str | Path | None = None) -> list[Case]:
    """Image files at any path, and those of folders, as cases named after the files, or by the key ``pseudonyms``.

    Raises:
        DatasetError: a file is missing, has no known format, or has the same case name as another.
    """
    cases: dict[str, Case] = {}
    paths = [Path(path).expanduser() for path in ([images] if isinstance(images, (str, Path)) else images)]
    for path in itertools.chain.from_iterable(
        image_files(path, pseudonyms is None) if path.is_dir() else [path] for path in paths
    ):
        there = path.is_file() or path.is_symlink()  # the check of a link that leads nowhere says so
        if not there or format_of(path) is None:
            found = "an unknown format" if there else "no such file"
            raise DatasetError(f"{path}: {found}; expected an image, one of {', '.join(SUFFIXES)}.")
        name = composed(case_name(path))
        if not is_name(name):
            raise DatasetError(f"{path}: the file's name has control characters or is no UTF-8; rename it.")
        if name in cases:
            raise DatasetError(f"{path}: another image is also called '{name}'; one result would overwrite the other.")
        cases[name] = Case(name, path, None, "new")
    return renamed(pseudonyms, cases, list(cases.values()), ())[0]


def readable_cases(
    images: str | Path | Sequence[str | Path],
    reader: ScanReader | None = None,
    pseudonyms: str | Path | None = None,
) -> list[Case]:
    """`cases_of` without the images that cannot be used. The log names these, and warns of what was found in others.

    Raises:
        DatasetError: no image can be read.
    """
    reader = reader or ScanReader()
    cases, problems, found = cases_of(images, pseudonyms), [], []
    if reader.spacing is None and not all(format_of(case.image).has_geometry for case in cases):
        log.warning(UNSAID_SPACING)
    for case in cases:
        problems += (own := check_case(case, reader))
        if not any(problem.severity == SET_ASIDE for problem in own):
            found.append(case)
    if problems:
        log.warning("problems found in the images:\n%s", table(problems))
    if cases and not found:
        raise DatasetError(
            "The image cannot be used." if len(cases) == 1 else f"None of the {len(cases)} images can be used."
        )
    return found
