"""Competing methods: registration with ANTs SyN, and with the affine registration of ANTs followed by convexAdam.

Needs ``pip install .[bench]``. Both get scans and the template's fractional label on an isotropic grid like that of the
propagation, or at each scan's own voxel size. ``seed`` sets the samples of ANTs; with several threads ANTs is still not
reproducible.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import CommonKeys as Keys

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.grids import choose_spacing, cropped, to_grid
from semisam_o1.data.transforms import image_chain, label_chain
from semisam_o1.round_0.places import centred_points, sample
from semisam_o1.types import Case

AVAILABLE = all(importlib.util.find_spec(name) for name in ("ants", "convexAdam"))
COARSER = 1.02  # steps in which the finest axes of a scan are coarsened until it has few enough voxels


class Scan(NamedTuple):
    """``values`` (H, W, D) and the voxel size in mm along each axis."""

    values: np.ndarray
    spacing: tuple[float, ...]


def ants_syn(template: Scan, label: torch.Tensor, scan: Scan, seed: int) -> torch.Tensor:
    """Affine and SyN with ANTs' defaults; ``label`` (C, H, W, D) on the template's grid; returns it on the scan's."""
    return _carry(template, label, scan, seed, "SyN")[0]


def ants_convex_adam(template: Scan, label: torch.Tensor, scan: Scan, seed: int) -> torch.Tensor:
    """ANTs' affine, then convexAdam with its defaults on MIND-SSC; its grid is finer for scans of under 18 slices."""
    with warnings.catch_warnings():  # its import silences all warnings of the process
        from convexAdam.convex_adam_MIND import convex_adam_pt

    carried, warped = _carry(template, label, scan, seed, "Affine")
    fixed, moving = torch.from_numpy(scan.values), torch.from_numpy(warped)
    cell = max(1, min(6, min(fixed.shape) // 3))  # 6 voxels by default; it needs three cells along each axis
    with warnings.catch_warnings():  # about defaults of grid_sample
        warnings.simplefilter("ignore")
        field = convex_adam_pt(fixed, moving, grid_sp=cell, dtype=torch.float32, verbose=False)
    field = torch.from_numpy(np.ascontiguousarray(field)).float()
    return sample(carried, centred_points(fixed.shape, 1.0) + field, 1.0)


RIVALS = {"syn": ("ANTs SyN", ants_syn), "convexadam": ("ANTs affine + convexAdam", ants_convex_adam)}


def _carry(template: Scan, label: torch.Tensor, scan: Scan, seed: int, kind: str) -> tuple[torch.Tensor, np.ndarray]:
    """Label (C, H, W, D) and template on the scan's grid."""
    import ants

    # Intensities from zero, because ANTs starts from centres of mass.
    shifted = (Scan(np.ascontiguousarray(x.values - x.values.min()), x.spacing) for x in (scan, template))
    fixed, moving = (ants.from_numpy(x.values, spacing=x.spacing) for x in shifted)
    found = ants.registration(fixed, moving, type_of_transform=kind, random_seed=seed + 1)
    shares = []
    for part in label[1:].numpy():
        image = ants.from_numpy(np.ascontiguousarray(part), spacing=template.spacing)
        shares.append(ants.apply_transforms(fixed, image, found["fwdtransforms"], interpolator="linear").numpy())
    shares = torch.from_numpy(np.stack(shares)).float().clamp(0, 1)
    return torch.cat([(1 - shares.sum(0, keepdim=True)).clamp(min=0), shares]), found["warpedmovout"].numpy()


Spacing = Callable[[Case], tuple[float, ...]]  # of a case's grid for a rival, mm along R, A and S


def grids(cohort: Cohort, voxels: Sequence[int]) -> dict[str, Spacing]:
    """The grids on which rivals are tried, by name: two for each number of ``voxels``."""
    found: dict[str, Spacing] = {}
    for most in voxels:
        step = choose_spacing(cohort.template_grids, most)
        found[f"{most} isotropic"] = lambda case, step=step: (step,) * 3
        found[f"own spacing, at most {most}"] = lambda case, most=most: own_spacing(cohort, case, most)
    return found


def own_spacing(cohort: Cohort, case: Case, most: int) -> tuple[float, ...]:
    """A scan's voxel size, mm along R, A and S; its finest axes are coarsened if it has more than ``most`` voxels."""
    grid = cropped(cohort.grid(case), cohort.data_box(case))
    axes = nibabel.io_orientation(grid.affine)[:, 0].astype(int)
    spacing, extent = np.empty(3), np.empty(3)
    spacing[axes], extent[axes] = grid.spacing, grid.spacing * grid.shape
    finest = spacing.min()
    while (extent / np.maximum(spacing, finest)).prod() > most:
        finest *= COARSER
    return tuple(float(f"{step:.5g}") for step in np.maximum(spacing, finest))


def carried(method: Callable, cohort: Cohort, case: Case, spacing: Spacing) -> torch.Tensor:
    """A rival's label of a case on its stored grid, (H, W, D) channels, from the first template."""
    template = cohort.templates[0]
    label = label_chain(spacing(template), cohort)(template.item())[Keys.LABEL].as_tensor()
    label = label.clamp(min=0) / label.sum(0).clamp(min=1e-6)
    moving, fixed = (_image(cohort, scan, spacing) for scan in (template, case))
    scans = [Scan(x[0].numpy(), spacing(c)) for x, c in ((moving, template), (fixed, case))]
    return to_grid(method(scans[0], label, scans[1], 0), fixed.affine, cohort.grid(case)).argmax(0)


def _image(cohort: Cohort, case: Case, spacing: Spacing) -> MetaTensor:
    return image_chain(spacing(case), cohort.reader, find_no_data=cohort.find_no_data)(case.item())[Keys.IMAGE]
