"""HDF5 files: one dataset inside the file itself; nothing that the file points to elsewhere is read."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from semisam_o1.data.findings import Fault
from semisam_o1.data.grids import Grid
from semisam_o1.data.stored import DEFLATE, ReadOptions, Stored, check_size, damaged, drop_trailing, sniff
from semisam_o1.files import read_hdf5
from semisam_o1.types import Affine

ELSEWHERE = ("data inside the file", "store it in the file itself")


def hdf5_affine(spacing: float | tuple[float, ...] | None) -> Affine:
    """The affine of an HDF5 scan: its spacing on the diagonal, 1 mm if None."""
    return np.diag([*np.broadcast_to(1.0 if spacing is None else spacing, 3), 1.0]).astype(float)


def open_hdf5(path: Path, options: ReadOptions) -> Stored:
    """The dataset ``options.dataset`` of an HDF5 file.

    Raises:
        Fault: it is missing, damaged, not numbers, or stored outside of the file.
    """
    sniff(path)
    try:
        with read_hdf5(path) as file:
            found = _dataset(file, options.dataset)
            shape, findings = drop_trailing(found.shape)
            ratio = 1 if found.chunks is None else DEFLATE if found.compression == "gzip" else None
            stored = found.id.get_storage_size()
            check_size(found.shape, found.dtype.itemsize, stored, options.most_voxels, ratio if stored else None)
            if stored == 0 and found.size:
                raise damaged("no data in the dataset")
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise _unreadable(error) from error
    return Stored(Grid(hdf5_affine(options.spacing), shape), lambda: _voxels(path, options.dataset), tuple(findings))


def has_dataset(path: Path, name: str) -> bool:
    """Whether a file has a dataset of that name; False if it cannot be read."""
    try:
        with read_hdf5(path) as file:
            return name in file
    except (OSError, RuntimeError, KeyError, ValueError):  # reported where the file is opened
        return False


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """The dataset ``name``, every link to it being a hard one."""
    if name not in file and file.get(name, getlink=True) is None:
        raise Fault(f"no dataset '{name}' in the file, which has {_some(file)}", f"a dataset '{name}'", "see image_key")
    parts = [part for part in name.split("/") if part]
    for last in range(1, len(parts) + 1):
        if not isinstance(file.get("/".join(parts[:last]), getlink=True), h5py.HardLink):
            raise Fault(f"the dataset '{name}' is a link to other data", *ELSEWHERE)
    found = file[name]
    if not isinstance(found, h5py.Dataset):
        raise Fault(f"'{name}' is a group", "a dataset", "name the dataset inside it (image_key)")
    if found.external or found.is_virtual:
        raise Fault(f"the dataset '{name}' is stored in other files", *ELSEWHERE)
    if found.dtype.kind == "c" or found.dtype.names == ("r", "i"):
        raise Fault("complex numbers", "real numbers", "store the magnitude")
    if found.dtype.kind not in "iufb" or found.dtype.itemsize > 8:
        raise Fault(f"voxels of type {found.dtype.name}", "integers or floating-point numbers", "store it as float32")
    if found.shape is None:
        raise damaged("no data in the dataset")
    return found


def _voxels(path: Path, name: str) -> np.ndarray:
    try:
        with read_hdf5(path) as file:
            return _dataset(file, name)[()]
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> Fault:
    if isinstance(error, Fault):
        return error
    if "filter" in str(error) and ("not registered" in str(error) or "not available" in str(error)):
        remedy = "store it again with gzip or without compression"
        return Fault("a compression that this installation cannot read", "gzip, lzf or none", remedy)
    if isinstance(error, PermissionError):
        return Fault("a file that may not be read", "permission to read it", "change its permissions")
    return damaged(error)


def _some(file: h5py.File) -> str:
    names = sorted(file)
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "none"
