"""Image files at any path as cases, for prediction with a trained model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from semisam_o1.data.formats import SUFFIXES, UNSAID_SPACING, case_name, format_of, read_volume
from semisam_o1.data.pseudonyms import renamed
from semisam_o1.literals import is_name
from semisam_o1.types import Case, DatasetError

log = logging.getLogger("semisam_o1")


def image_files(folder: str | Path) -> list[Path]:
    """The images of a folder, or of its subfolder ``images`` or ``data`` if it has one, sorted."""
    folder = Path(folder).expanduser()
    inner = next((folder / name for name in ("images", "data") if (folder / name).is_dir()), folder)
    return sorted(path for path in inner.glob("*") if format_of(path))


def cases_of(images: str | Path | Sequence[str | Path], pseudonyms: str | Path | None = None) -> list[Case]:
    """Image files at any path as cases, named after the files; or by the key in the file ``pseudonyms``.

    Raises:
        DatasetError: a file is missing, has no known format, or has the same case name as another.
    """
    cases: dict[str, Case] = {}
    for path in [images] if isinstance(images, (str, Path)) else images:
        path = Path(path).expanduser()
        if not path.is_file() or format_of(path) is None:
            found = "no such file" if not path.is_file() else "an unknown format"
            raise DatasetError(f"{path}: {found}; expected an image, one of {', '.join(SUFFIXES)}.")
        name = case_name(path)
        if not is_name(name):
            raise DatasetError(f"{path}: the file's name has control characters or is no UTF-8; rename it.")
        if name in cases:
            raise DatasetError(f"{path}: another image is also called '{name}'; one result would overwrite the other.")
        cases[name] = Case(name, path, None, "new")
    return renamed(pseudonyms, cases, list(cases.values()), ())[0]


def readable_cases(
    images: str | Path | Sequence[str | Path],
    hdf5_key: str = "image",
    hdf5_spacing=None,
    pseudonyms: str | Path | None = None,
) -> list[Case]:
    """`cases_of` without unreadable images. The log names these, and warns if the voxel size is unknown.

    Raises:
        DatasetError: no image can be read.
    """
    cases, found = cases_of(images, pseudonyms), []
    if hdf5_spacing is None and not all(format_of(case.image).has_geometry for case in cases):
        log.warning(UNSAID_SPACING)
    for case in cases:
        try:
            volume = read_volume(case.image, hdf5_key)
            if volume.ndim != 4 or not volume.isfinite().all():
                raise ValueError(f"shape {tuple(volume.shape[1:])}; expected three axes and finite numbers")
        except Exception as error:  # noqa: BLE001
            log.warning("case %s cannot be read and is left out: %s", case.name, case.scrubbed(error))
        else:
            found.append(case)
    if cases and not found:
        raise DatasetError(f"None of the {len(cases)} images can be read.")
    return found
