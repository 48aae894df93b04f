"""Writing of results as files in the scan's own geometry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

from semisam_o1.data.grids import Grid
from semisam_o1.data.nifti import header_of, quaternion_vector
from semisam_o1.files import atomic_write, write_torch

GEOMETRY = (
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units",
)  # fmt: skip


def write_weights(path: str | Path, state: dict) -> None:
    """Write a plain ``state_dict`` of CPU tensors."""
    write_torch(path, {key: value.detach().cpu() for key, value in state.items()})


def write_label(
    path: str | Path, label: np.ndarray, scan: str | Path, grid: Grid, numbers: Sequence[int] | None = None
) -> None:
    """Write ``label`` (H, W, D) as uint8 NIfTI (uint16 for class numbers above 255) on the grid of the file ``scan``.

    From a NIfTI scan, sform, qform, their codes and the units are copied, so that viewers overlay both exactly.
    ``numbers``: the class number of each channel, if ``label`` holds channels.
    """
    if numbers is not None:
        label = np.asarray(numbers)[np.asarray(label, int)]
    _write(path, label.astype(np.uint8 if label.max(initial=0) < 256 else np.uint16), scan, grid)


def write_image(path: str | Path, image: np.ndarray, scan: str | Path, grid: Grid) -> None:
    """Write ``image`` (H, W, D) as float32 NIfTI on the grid of the file ``scan``, without the scan's texts."""
    _write(path, image.astype(np.float32), scan, grid)


def write_share(path: str | Path, share: np.ndarray, scan: str | Path, grid: Grid) -> None:
    """Write ``share`` (H, W, D) in [0, 1], an uncertainty or a confidence, with 8 bits per voxel on the scan's grid."""
    _write(path, np.clip(np.rint(share * 255), 0, 255).astype(np.uint8), scan, grid, 1 / 255)


def _write(path: str | Path, array: np.ndarray, scan: str | Path, grid: Grid, slope: float | None = None) -> None:
    if array.shape != tuple(grid.shape):
        raise ValueError(f"{path}: result of shape {array.shape} for a scan of shape {tuple(grid.shape)}.")
    source = header_of(scan)
    # with an affine, nibabel would write forms of its own
    image = nibabel.Nifti1Image(array, grid.affine if source is None else None)
    if source is not None:
        for field in GEOMETRY:  # as stored, even if a code marks a form as unused
            image.header[field] = source[field]
        image.header["pixdim"][:4] = source["pixdim"][:4]
        vector = quaternion_vector(source)
        for part, value in zip("bcd", vector / max(1.0, float(np.linalg.norm(vector)))):  # a longer one is unreadable
            image.header[f"quatern_{part}"] = value
    else:
        image.header.set_xyzt_units("mm")
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    with atomic_write(path) as aside:
        nibabel.save(image, aside)
