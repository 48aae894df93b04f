"""Competing methods: registration with ANTs SyN, and with the affine registration of ANTs followed by convexAdam.

Needs ``pip install .[bench]``. Both have the same input as the propagation: scans in the working space and the
template's fractional label. ``seed`` sets the samples of ANTs; with several threads ANTs is still not reproducible.
"""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import torch

from semisam_o1.round_0.alignment import centred_points, sample

AVAILABLE = all(importlib.util.find_spec(name) for name in ("ants", "convexAdam"))


def ants_syn(template: np.ndarray, label: torch.Tensor, scan: np.ndarray, step_mm: float, seed: int) -> torch.Tensor:
    """Affine and SyN with ANTs' defaults; ``template``, ``scan`` (H, W, D), ``label`` (C, H, W, D)."""
    return _carry(template, label, scan, step_mm, seed, "SyN")[0]


def ants_convex_adam(template, label, scan, step_mm: float, seed: int) -> torch.Tensor:
    """ANTs' affine, then convexAdam with its defaults on MIND-SSC."""
    with warnings.catch_warnings():  # its import silences all warnings of the process
        from convexAdam.convex_adam_MIND import convex_adam_pt

    carried, warped = _carry(template, label, scan, step_mm, seed, "Affine")
    with warnings.catch_warnings():  # about defaults of grid_sample
        warnings.simplefilter("ignore")
        field = convex_adam_pt(torch.from_numpy(scan), torch.from_numpy(warped), dtype=torch.float32, verbose=False)
    field = torch.from_numpy(np.ascontiguousarray(field)).float()
    return sample(carried, centred_points(scan.shape, 1.0) + field, 1.0)


def _carry(template, label, scan, step_mm: float, seed: int, kind: str) -> tuple[torch.Tensor, np.ndarray]:
    """Label (C, H, W, D) and template on the scan's grid."""
    import ants

    # Intensities from zero, because ANTs starts from centres of mass.
    shifted = (np.ascontiguousarray(x - x.min()) for x in (scan, template))
    fixed, moving = (ants.from_numpy(x, spacing=(step_mm,) * 3) for x in shifted)
    found = ants.registration(fixed, moving, type_of_transform=kind, random_seed=seed + 1)
    shares = []
    for part in label[1:].numpy():
        image = ants.from_numpy(np.ascontiguousarray(part), spacing=(step_mm,) * 3)
        shares.append(ants.apply_transforms(fixed, image, found["fwdtransforms"], interpolator="linear").numpy())
    shares = torch.from_numpy(np.stack(shares)).float().clamp(0, 1)
    return torch.cat([(1 - shares.sum(0, keepdim=True)).clamp(min=0), shares]), found["warpedmovout"].numpy()
