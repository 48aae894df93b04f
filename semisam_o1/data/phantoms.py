"""Synthetic scans whose truth is known at every point of space: a small data set of two organs in a body.

The anatomy is a set of functions of the position in RAS mm, so a case can be sampled on any grid: fine, anisotropic,
flipped or oblique. All cases share one layout. Each case has its own smooth displacement, rotation, scale and shift,
its own texture and its own organ sizes. Other structures have the same intensities as the organs, so no threshold can
segment the organs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from scipy.spatial.transform import Rotation

from semisam_o1.ledger import Ledger
from semisam_o1.runfolder import folder_path
from semisam_o1.types import Affine, DatasetError

CLASSES = {1: "bright organ", 2: "dim organ"}
EDGE = 0.6  # mm; width of the intensity transition between tissues, like the partial volume effect

# centre, radii (mm) and intensity; later structures cover earlier ones; the body spans 40 x 36 x 34 mm
BODY = ((0, 0, 0), (20, 18, 17), 0.42)
ORGANS = (((-5.0, 3.0, 1.0), (6.2, 7.2, 8.0), 0.72), ((5.0, 1.0, -1.0), (5.8, 6.8, 7.0), 0.60))
OTHERS = (
    ((9.5, -7.5, 4.0), (4.5, 3.8, 5.0), 0.72),
    ((-9.0, -7.0, -4.0), (4.5, 4.0, 4.5), 0.60),
    ((1.0, 12.0, -5.0), (5.0, 2.8, 4.0), 0.72),
    ((11.5, 7.0, 2.0), (3.5, 4.0, 4.5), 0.60),
    ((-12.5, 2.0, 6.0), (2.8, 5.0, 3.5), 0.66),
    ((0.0, -12.0, 0.0), (3.5, 3.2, 14.0), 0.92),
)


def grid_affine(
    shape: Sequence[int],
    spacing: float | Sequence[float] = 1.0,
    axcodes: str = "RAS",
    turn: Sequence[float] = (0, 0, 0),
) -> Affine:
    """The affine (4, 4), voxel index to RAS mm, of a grid centred on the phantom.

    Args:
        shape: voxels along the stored axes (H, W, D).
        spacing: voxel size in mm along the stored axes, one number or three.
        axcodes: directions of the stored axes, e.g. "LAS" if the first axis runs from right to left.
        turn: rotation in degrees about the R, A and S axes, in that order; nonzero for an oblique scan.
    """
    sizes = np.broadcast_to(spacing, 3).astype(float)
    axes = np.zeros((3, 3))
    for stored, (axis, sign) in enumerate(axcodes2ornt(axcodes)):
        axes[int(axis), stored] = sign
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", turn, degrees=True).as_matrix() @ axes * sizes
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def make_phantom(
    seed: int | None,
    shape: Sequence[int] = (48, 48, 40),
    spacing: float | Sequence[float] = 1.0,
    affine: Affine | None = None,
    num_classes: int = 3,
    noise: float = 0.06,
) -> tuple[np.ndarray, np.ndarray]:
    """One case, sampled at the voxels of a grid: image (H, W, D) float32 and label (H, W, D) uint8.

    Args:
        seed: selects the case: deformation, intensity scale, bias field and noise; None is the undeformed layout.
        shape: voxels along the stored axes.
        spacing: mm along the stored axes, of a RAS grid centred on the phantom; ignored if ``affine`` is given.
        affine: (4, 4), voxel index to RAS mm. It changes the sampling positions, not the anatomy.
        num_classes: including background: 3, or 2 for the first organ only.
        noise: standard deviation relative to the brightest tissue's intensity. It is drawn per voxel, so only the noise
            depends on the grid.

    Raises:
        ValueError: ``num_classes`` is neither 2 nor 3.
    """
    if num_classes not in (2, 3):
        raise ValueError(f"A phantom has 2 or 3 classes including background, not {num_classes}.")
    affine = grid_affine(shape, spacing) if affine is None else np.asarray(affine, float)
    index = np.moveaxis(np.indices(shape, dtype=float), 0, -1)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    image = intensity(points, seed)
    if noise:
        scatter = np.random.default_rng([9, *_key(seed)]).standard_normal(tuple(shape))
        image += noise * _brightness(seed) * scatter
    label = tissue(points, seed)
    return image.astype(np.float32), np.where(label < num_classes, label, 0).astype(np.uint8)


def tissue(points: np.ndarray, seed: int | None) -> np.ndarray:
    """The class number at each position: points (..., 3) in RAS mm -> (...) uint8."""
    at = layout(points, seed)
    depths = np.stack([_depth(at, *organ[:2]) for organ in organs_of(seed)])
    return np.where(depths.max(0) > 0, 1 + depths.argmax(0), 0).astype(np.uint8)


def intensity(points: np.ndarray, seed: int | None) -> np.ndarray:
    """The intensity without noise at each position: points (..., 3) in RAS mm -> (...)."""
    at = layout(points, seed)
    values = np.zeros(points.shape[:-1])
    for structure in (BODY, *OTHERS):
        values += (structure[2] - values) * _share(_depth(at, *structure[:2]))
    first, second = (_depth(at, *organ[:2]) for organ in organs_of(seed))
    # the organs touch: a position belongs to the organ it is deeper in, as in `tissue`
    among = _share(first - second)
    organs = among * ORGANS[0][2] + (1 - among) * ORGANS[1][2]
    values += (organs - values) * _share(np.maximum(first, second))
    values += 0.045 * _waves(at, seed=[5, *_key(seed)], wavelengths=(6, 12), count=16) * _share(_depth(at, *BODY[:2]))
    bias = 1 + 0.2 * _waves(points, seed=[6, *_key(seed)], wavelengths=(60, 120), count=3)
    return _brightness(seed) * values * (bias if seed is not None else 1)


def organs_of(seed: int | None) -> tuple:
    """The organs of a case in the layout; position and size vary in addition to the body's deformation."""
    if seed is None:
        return ORGANS
    rng = np.random.default_rng([3, *_key(seed)])
    return tuple(
        (np.add(centre, rng.normal(0, 0.6, 3)), np.multiply(radii, rng.normal(1, 0.07, 3).clip(0.85, 1.15)), value)
        for centre, radii, value in ORGANS
    )


def layout(points: np.ndarray, seed: int | None) -> np.ndarray:
    """Map positions of a case to the undeformed layout: points (..., 3) in RAS mm -> (..., 3) mm."""
    if seed is None:
        return points
    rng = np.random.default_rng([7, *_key(seed)])
    turn = Rotation.from_euler("xyz", rng.normal(0, 3, 3), degrees=True).as_matrix()
    at = (points - rng.normal(0, 0.8, 3)) @ turn.T / rng.normal(1, 0.035, 3).clip(0.88, 1.12)
    # wavelengths far above the displacement keep the deformation invertible
    shifts = [_waves(at, [8, axis, *_key(seed)], wavelengths=(24, 45), count=5) for axis in range(3)]
    return at + 0.9 * np.stack(shifts, axis=-1)


def _key(seed: int | None) -> list[int]:
    return [] if seed is None else [int(seed)]


def _brightness(seed: int | None) -> float:
    """The value of intensity 1 in this scan; every scan has its own scale."""
    return 1000.0 if seed is None else 1000 * float(np.exp(np.random.default_rng([4, seed]).normal(0, 0.5)))


def _depth(at: np.ndarray, centre, radii) -> np.ndarray:
    """Approximate depth of each position inside an ellipsoid, mm; negative outside."""
    return (1 - np.linalg.norm((at - np.array(centre)) / np.array(radii), axis=-1)) * min(radii)


def _share(depth: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(depth / EDGE))


def _waves(at: np.ndarray, seed, wavelengths: tuple[float, float], count: int) -> np.ndarray:
    """A smooth random field of unit variance: ``count`` plane waves with wavelengths (mm) drawn from a range."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((count, 3))
    directions *= (2 * np.pi / rng.uniform(*wavelengths, count) / np.linalg.norm(directions, axis=1))[:, None]
    phases = rng.uniform(0, 2 * np.pi, count)
    return np.sqrt(2 / count) * sum(np.sin(at @ d + phase) for d, phase in zip(directions, phases))


def reorient(array: np.ndarray, affine: Affine, axcodes: str) -> tuple[np.ndarray, Affine]:
    """The same scan with its axes stored along ``axcodes``: array (H, W, D) and affine; no resampling."""
    change = ornt_transform(io_orientation(affine), axcodes2ornt(axcodes))
    stored = nibabel.orientations.apply_orientation(array, change)
    return np.ascontiguousarray(stored), affine @ inv_ornt_aff(change, array.shape)


# storage of each demo case; the first is the template's
_STORED: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"spacing": (1, 1, 2)},
    {"axcodes": "LAS"},
    {"turn": (8, -6, 15)},
    {"axcodes": "LPS"},
    {"spacing": (1.2, 0.9, 1)},
    {"axcodes": "PSR", "spacing": (1, 2, 1)},
)


def write_demo_data(
    out: str | Path, cases: int = 12, seed: int = 0, shape: Sequence[int] = (48, 48, 40), spacing: float = 1.0
) -> Path:
    """Write a data set of phantoms: ``images/``, ``labels/`` (truth for every case), three lists, class names.

    The first case of ``train.txt`` is the template, on a plain RAS grid. Other cases are anisotropic, flipped, permuted
    or oblique. A quarter of the cases is for test. One in twelve is for validation, at least one if there are four or
    more cases.

    Args:
        out: the folder; created if missing.
        cases: number of cases, at least 3.
        seed: selects the cases.
        shape, spacing: voxels and mm of the plain grid; the other grids cover the same field of view.

    Returns:
        ``out`` as a path.

    Raises:
        DatasetError: too few cases. UserError: the folder is an empty text, or contains files that are not from here.
    """
    out = folder_path(out)
    if cases < 3:
        raise DatasetError(f"{cases} demo cases: at least 3 are needed, for template, pool and test.")
    ledger = Ledger(out, "demo-data")
    ours = (ledger.path, ledger.reviewed)
    files = (path for path in out.rglob("*") if path.is_file() and not any(map(path.is_relative_to, ours)))
    ledger.refuse_foreign(files)
    for folder in ("images", "labels"):  # of another number of cases
        ledger.remove_below(out / folder)
    names = [f"phantom_{number:0{max(2, len(str(cases - 1)))}d}" for number in range(cases)]
    for number, name in enumerate(names):
        stored = _STORED[number % len(_STORED)]
        sizes = np.broadcast_to(stored.get("spacing", 1.0), 3) * spacing
        axcodes, turn = stored.get("axcodes", "RAS"), stored.get("turn", (0, 0, 0))
        # the field of view in mm is along R, A, S; stored axes may be permuted
        order = [int(axis) for axis in axcodes2ornt(axcodes)[:, 0]]
        extent = np.array(shape, float)[order] * spacing
        size = tuple(int(n) for n in np.ceil(extent / sizes))
        affine = grid_affine(size, sizes.tolist(), axcodes, turn)
        image, label = make_phantom(1000 * seed + number, size, affine=affine)
        for folder, array in (("images", np.rint(image).astype(np.int16)), ("labels", label)):
            with ledger.writing(out / folder / f"{name}.nii.gz") as aside:
                _save(aside, array, affine)
    test = max(1, cases // 4)
    val = max(1, cases // 12) if cases > 3 else 0
    train = cases - val - test
    for file, listed in (
        ("train", names[:train]),
        ("val", names[train : train + val]),
        ("test", names[train + val :]),
    ):
        with ledger.writing(out / f"{file}.txt") as aside:
            aside.write_text("".join(f"{name}\n" for name in listed), encoding="utf-8")
    with ledger.writing(out / "classes.json") as aside:
        aside.write_text(json.dumps({str(n): name for n, name in CLASSES.items()}) + "\n", encoding="utf-8")
    return out


def _save(path: Path, array: np.ndarray, affine: Affine) -> None:
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
