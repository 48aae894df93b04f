"""The supported image formats. Each is a `Format`; add a new one to FORMATS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from semisam_o1.data.hdf5 import open_hdf5
from semisam_o1.data.itk_image import open_metaimage, open_nrrd
from semisam_o1.data.nifti import open_mgh, open_nifti
from semisam_o1.data.stored import ReadOptions, Stored

UNSAID_SPACING = "HDF5 files have no voxel size, and none was given: 1 mm along each axis is assumed."


@dataclass(frozen=True)
class Format:
    """An image format.

    Attributes:
        name: for messages.
        suffixes: of its files, lower case.
        folder: the folder of a data set that contains its images.
        open: (path, options) -> `Stored`, from the header only; raises `Fault` for a file that cannot be used.
        has_geometry: whether its files contain voxel size and orientation; if not, ``spacing`` (mm) gives the size.
    """

    name: str
    suffixes: tuple[str, ...]
    folder: str
    open: Callable[[Path, ReadOptions], Stored]
    has_geometry: bool = True

    def fits(self, path: str | Path) -> bool:
        """Whether the suffix of a file matches this format."""
        return str(path).lower().endswith(self.suffixes)


HDF5 = Format("HDF5", (".h5", ".hdf5"), "data", open_hdf5, has_geometry=False)
NIFTI = Format("NIfTI", (".nii", ".nii.gz"), "images", open_nifti)
PAIR = Format("NIfTI pair or Analyze", (".hdr",), "images", open_nifti)
MGH = Format("MGH", (".mgz", ".mgh"), "images", open_mgh)
NRRD = Format("NRRD", (".nrrd", ".nhdr"), "images", open_nrrd)
METAIMAGE = Format("MetaImage", (".mha", ".mhd"), "images", open_metaimage)
FORMATS = (HDF5, NIFTI, PAIR, MGH, NRRD, METAIMAGE)
SUFFIXES = tuple(suffix for format in FORMATS for suffix in format.suffixes)


def format_of(path: str | Path) -> Format | None:
    """The format of a file by its suffix; None if it is not supported."""
    return next((format for format in FORMATS if format.fits(path)), None)


def case_name(path: str | Path) -> str:
    """The case name of an image file: the file name without its suffix."""
    name = Path(path).name
    suffix = max((s for s in SUFFIXES if name.lower().endswith(s)), key=len, default="")
    return name[: len(name) - len(suffix)]
