"""The one way in which images and labels are read: voxels, affine and shape from one call."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import CacheDataset, Dataset, ITKReader, MetaTensor
from monai.data.image_reader import ImageReader
from monai.transforms import MapTransform
from monai.utils import MetaKeys, SpaceKeys

from semisam_o1.data.dicom import refuse_uneven_series
from semisam_o1.data.findings import Fault
from semisam_o1.data.formats import format_of
from semisam_o1.data.grids import Grid
from semisam_o1.data.stored import MOST_VOXELS, ReadOptions, Stored, damaged
from semisam_o1.types import DatasetError

LABEL = "label"  # the HDF5 dataset of labels


@dataclass(frozen=True)
class ScanReader(ImageReader):
    """Reads every supported format, each with one fixed library; also MONAI's `ImageReader` for `LoadImaged`.

    Attributes:
        image_key: the HDF5 dataset of the image.
        spacing: voxel size of HDF5 scans in mm along the stored axes, one number or three; None: 1 mm.
        nifti_form: "itk", "sform" or "qform", see `stored.ReadOptions`.
        most_voxels: files with more are refused.

    Raises:
        DatasetError: ``spacing`` is none.
    """

    image_key: str = "image"
    spacing: float | Sequence[float] | None = None
    nifti_form: str = "itk"
    most_voxels: int = MOST_VOXELS

    def __post_init__(self) -> None:
        try:
            sides = np.ones(1) if self.spacing is None else np.asarray(self.spacing, float).ravel()
        except (TypeError, ValueError):
            sides = np.zeros(1)
        if len(sides) not in (1, 3) or not (np.isfinite(sides) & (sides > 0)).all():
            raise DatasetError(f"spacing is {self.spacing}: expected one or three positive numbers, mm.")
        if isinstance(self.spacing, (list, np.ndarray)):  # a reader can be hashed
            object.__setattr__(self, "spacing", tuple(float(side) for side in sides))

    def open(self, path: str | Path, label: bool = False) -> Stored:
        """The header of an image or, with ``label``, of a label.

        A file with an unknown suffix, or a folder, is read by MONAI's `ITKReader`: MONAI Label gives DICOM series so.

        Raises:
            Fault: the file cannot be used.
            FileNotFoundError: there is no such file.
        """
        path, format = Path(path), format_of(path)
        if format is None:
            return _open_with_itk(path)
        try:
            return format.open(path, self._options(label))
        except (Fault, MemoryError):
            raise
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # readers raise many kinds of errors on a damaged file
            raise damaged(error) from error

    def grid(self, path: str | Path, label: bool = False) -> Grid:
        """Affine and shape of a scan, from its header."""
        return self._named(path, self.open, label).grid

    def volume(self, path: str | Path, label: bool = False) -> MetaTensor:
        """One image or label as stored: (1, H, W, D) float32 with its affine (RAS mm).

        Raises:
            DatasetError: the file cannot be used.
        """
        return self._named(path, self._volume, label)

    def _volume(self, path: str | Path, label: bool) -> MetaTensor:
        found = self.open(path, label)
        values = found.voxels() if label else filled(found.voxels())[0]
        return MetaTensor(torch.from_numpy(values)[None], meta=meta_of(found.grid, path))

    def _named(self, path: str | Path, function, label: bool):
        try:
            return function(path, label)
        except Fault as fault:
            raise DatasetError(f"{path}: {fault}") from fault

    def _options(self, label: bool) -> ReadOptions:
        spacing = None if self.spacing is None else tuple(float(s) for s in np.broadcast_to(self.spacing, 3))
        return ReadOptions(LABEL if label else self.image_key, spacing, self.nifti_form, self.most_voxels)

    # MONAI's interface.

    def verify_suffix(self, filename: Sequence[str | Path] | str | Path) -> bool:
        names = [filename] if isinstance(filename, (str, Path)) else filename
        return all(format_of(name) is not None for name in names)

    def read(self, data: Sequence[str | Path] | str | Path, **kwargs) -> MetaTensor:
        return self.volume(data if isinstance(data, (str, Path)) else data[0])

    def get_data(self, img: MetaTensor) -> tuple[np.ndarray, dict]:
        return img.numpy()[0], dict(img.meta) | {"original_channel_dim": float("nan")}


def filled(values: np.ndarray) -> tuple[np.ndarray, int]:
    """An image with its lowest finite value in place of NaN and infinity, and how many voxels those are."""
    finite = np.isfinite(values)
    count = int(values.size - finite.sum())
    if count == 0 or count == values.size:
        return values, count
    return np.where(finite, values, values[finite].min()), count


def meta_of(grid: Grid, path: str | Path) -> dict:
    """MONAI's meta data of a volume on a grid."""
    affine = np.array(grid.affine, float)
    return {
        MetaKeys.AFFINE: torch.from_numpy(affine),
        MetaKeys.ORIGINAL_AFFINE: affine.copy(),
        MetaKeys.SPATIAL_SHAPE: np.asarray(grid.shape),
        MetaKeys.SPACE: SpaceKeys.RAS,
        MetaKeys.ORIGINAL_CHANNEL_DIM: 0,
        "filename_or_obj": str(path),
    }


def _open_with_itk(path: Path) -> Stored:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    reader = ITKReader()
    if path.is_dir():
        refuse_uneven_series(path)
    try:
        array, meta = reader.get_data(reader.read(str(path)))
    except Exception as error:  # ITK and MONAI raise many kinds
        raise damaged(error) from error
    grid = Grid(np.asarray(meta["affine"], float), tuple(int(n) for n in meta["spatial_shape"]))
    return Stored(grid, lambda: array)


class ScanError(DatasetError):
    """A scan cannot be read or transformed; ``case``: its name."""

    def __init__(self, case: str):
        super().__init__(f"case {case} cannot be prepared")
        self.case = case


@contextmanager
def naming(item: Mapping) -> Iterator[None]:
    """An error of the body becomes a `ScanError` with the ``case`` of an item."""
    try:
        yield
    except Exception as error:
        raise ScanError(item["case"]) from error


class ScanDataset(Dataset):
    """MONAI's `Dataset` of items with a ``case``; a `ScanError` says which one failed."""

    def _transform(self, index: int):
        with naming(self.data[index]):
            return super()._transform(index)


class CachedScanDataset(CacheDataset):
    """MONAI's `CacheDataset` of items with a ``case``; a `ScanError` says which one failed."""

    def _load_cache_item(self, idx: int):
        with naming(self.data[idx]):
            return super()._load_cache_item(idx)

    def _transform(self, index: int):
        with naming(self.data[index]):
            return super()._transform(index)


class LoadScand(MapTransform):
    """Loads the images that ``keys`` of an item name: (1, H, W, D) float32 with affine (RAS mm).

    ``reader``: how files are read.
    """

    def __init__(self, keys: KeysCollection, reader: ScanReader | None = None):
        super().__init__(keys)
        self.reader = reader or ScanReader()

    def __call__(self, data: Mapping[Hashable, str | Path]) -> dict:
        return dict(data) | {key: self.reader.volume(data[key]) for key in self.key_iterator(data)}
