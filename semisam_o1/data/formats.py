"""The supported image formats. Each is a `Format`; add a new one to FORMATS."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
from monai.config import KeysCollection
from monai.data import ITKReader, MetaTensor, NibabelReader
from monai.data.image_reader import ImageReader
from monai.transforms import LoadImage, LoadImaged

from semisam_o1.data.grids import Grid
from semisam_o1.types import Affine, Case

UNSAID_SPACING = "HDF5 files have no voxel size, and none was given: 1 mm along each axis is assumed."


@dataclass(frozen=True)
class Format:
    """An image format.

    Attributes:
        name: for messages.
        suffixes: of its files, lower case.
        folder: the folder of a data set that contains its images.
        grid: (path, dataset, spacing) -> the file's `Grid`, from the header only; the shape keeps all axes of the file.
        reader: (dataset, spacing) -> MONAI's reader of its voxels.
        has_geometry: whether its files contain voxel size and orientation; if not, ``spacing`` (mm) gives the size.
    """

    name: str
    suffixes: tuple[str, ...]
    folder: str
    grid: Callable[[Path, str, Any], Grid]
    reader: Callable[[str, Any], ImageReader]
    has_geometry: bool = True

    def fits(self, path: str | Path) -> bool:
        """Whether the suffix of a file matches this format."""
        return str(path).lower().endswith(self.suffixes)


class HDF5Reader(ImageReader):
    """Reads one dataset of an HDF5 file as (H, W, D) float32, with ``spacing`` (mm) in place of the missing affine.

    Args:
        key: the dataset's name, e.g. ``image`` or ``label``.
        spacing: voxel size in mm along the stored axes, one number or three; 1 mm if None.

    Raises:
        KeyError: the file has no such dataset; the message lists its datasets.
    """

    def __init__(self, key: str = "image", spacing: float | Sequence[float] | None = None):
        self.key, self.spacing = key, spacing

    def verify_suffix(self, filename) -> bool:
        names = [filename] if isinstance(filename, (str, Path)) else filename
        return all(HDF5.fits(name) for name in names)

    def read(self, data, **kwargs):
        path = data if isinstance(data, (str, Path)) else data[0]
        with h5py.File(path, "r") as file:
            if self.key not in file:
                raise KeyError(f"{path}: no dataset '{self.key}' in the file, which has {sorted(file)}.")
            return file[self.key][()]

    def get_data(self, img) -> tuple[np.ndarray, dict]:
        affine = hdf5_affine(self.spacing)
        meta = {"affine": affine, "original_affine": affine.copy(), "spatial_shape": np.asarray(img.shape)}
        return np.ascontiguousarray(img), meta | {"original_channel_dim": float("nan"), "space": "RAS"}


def hdf5_affine(spacing: float | Sequence[float] | None) -> Affine:
    """The affine of an HDF5 scan: its spacing on the diagonal, 1 mm if None."""
    return np.diag([*np.broadcast_to(1.0 if spacing is None else spacing, 3), 1.0]).astype(float)


def _hdf5_grid(path: Path, dataset: str, spacing) -> Grid:
    with h5py.File(path, "r") as file:
        if dataset not in file:
            raise KeyError(f"no dataset '{dataset}' in the file, which has {sorted(file)}")
        return Grid(hdf5_affine(spacing), tuple(int(n) for n in file[dataset].shape))


def _nifti_grid(path: Path, dataset: str, spacing) -> Grid:
    image: Any = nibabel.load(path)
    return Grid(np.asarray(image.affine, float), tuple(int(n) for n in image.shape))


def _itk_grid(path: Path, dataset: str, spacing) -> Grid:
    reader = ITKReader()
    _, meta = reader.get_data(reader.read(str(path)))
    return Grid(np.asarray(meta["affine"], float), tuple(int(n) for n in meta["spatial_shape"]))


HDF5 = Format("HDF5", (".h5", ".hdf5"), "data", _hdf5_grid, HDF5Reader, has_geometry=False)
NIFTI = Format("NIfTI", (".nii", ".nii.gz"), "images", _nifti_grid, lambda *_: NibabelReader())
ITK = Format("NRRD or MHA", (".nrrd", ".nhdr", ".mha", ".mhd"), "images", _itk_grid, lambda *_: ITKReader())
FORMATS = (HDF5, NIFTI, ITK)
SUFFIXES = tuple(suffix for format in FORMATS for suffix in format.suffixes)


def format_of(path: str | Path) -> Format | None:
    """The format of a file by its suffix; None if it is not supported."""
    return next((format for format in FORMATS if format.fits(path)), None)


def case_name(path: str | Path) -> str:
    """The case name of an image file: the file name without its suffix."""
    name = Path(path).name
    suffix = max((s for s in SUFFIXES if name.lower().endswith(s)), key=len, default="")
    return name[: len(name) - len(suffix)]


def _register(loader: LoadImage | LoadImaged, dataset: str, spacing, formats: tuple[Format, ...]) -> None:
    """Register each format's reader. MONAI tries the last one first, and ITK's accepts every file: it comes first."""
    for format in sorted(formats, key=lambda format: format is not ITK):
        loader.register(format.reader(dataset, spacing))


class LoadScand(LoadImaged):
    """MONAI's `LoadImaged`, channel first, with the readers of `FORMATS`: (1, H, W, D) float32 with affine (RAS mm).

    Args:
        keys: of the item; each value is a file to load.
        dataset: the dataset to read from an HDF5 file.
        spacing: voxel size (mm) of HDF5 scans.
    """

    def __init__(self, keys: KeysCollection, dataset: str = "image", spacing=None, **kwargs):
        super().__init__(keys, ensure_channel_first=True, image_only=True, **kwargs)
        _register(self, dataset, spacing, FORMATS)


def read_grid(path: str | Path, dataset: str = "image", spacing=None) -> Grid:
    """Affine and shape of a scan from its header; the shape keeps all axes of the file."""
    return (format_of(path) or ITK).grid(Path(path), dataset, spacing)


def read_volume(path: str | Path, dataset: str = "image", spacing=None) -> MetaTensor:
    """One image or label as stored: (1, H, W, D) float32 with its affine."""
    return _loader(dataset, None if spacing is None else tuple(np.broadcast_to(spacing, 3)), FORMATS)(str(path))


@functools.cache
def _loader(dataset: str, spacing: tuple[float, ...] | None, formats: tuple[Format, ...]) -> LoadImage:
    """To make one takes longer than to read a small file: MONAI looks for every library that reads images."""
    loader = LoadImage(image_only=True, ensure_channel_first=True)
    _register(loader, dataset, spacing, formats)
    return loader


def case_grid(case: Case, hdf5_key: str = "image", hdf5_spacing=None) -> Grid:
    """The stored grid of a case's image, on which all its results are written."""
    return read_grid(case.image, hdf5_key, hdf5_spacing)
