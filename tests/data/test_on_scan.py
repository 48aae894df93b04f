"""A label inside MONAI Label is the one that `predict` writes."""

import nibabel
import numpy as np
import torch
from monai.transforms import Invertd

from semisam_o1.data import LabelOnScand, image_chain
from semisam_o1.data.grids import Grid, to_grid
from tests.data.studies import write_nifti


def test_probabilities_become_class_numbers_on_the_stored_grid(tmp_path):
    affine = nibabel.affines.from_matvec(np.diag([-1.0, 1.5, 3.0]), [4, 5, 6])
    write_nifti(tmp_path / "a.nii.gz", np.random.default_rng(0).normal(size=(12, 10, 8)).astype(np.float32), affine)
    item = image_chain(2.0)({"image": str(tmp_path / "a.nii.gz"), "image_path": "a"})
    shares = torch.rand(3, *item["image"].shape[1:], generator=torch.Generator().manual_seed(0)).softmax(0)
    expected = to_grid(shares, np.asarray(item["image"].affine), Grid(affine, (12, 10, 8))).argmax(0).numpy()
    found = LabelOnScand("pred", [0, 17, 300])(item | {"pred": shares})["pred"]
    np.testing.assert_array_equal(found[0].numpy(), np.array([0, 17, 300])[expected])
    np.testing.assert_allclose(found.affine, affine)
    assert isinstance(LabelOnScand("pred", [0, 1]), Invertd)  # MONAI Label leaves these out to score scans


def test_the_largest_component_alone(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", np.random.default_rng(0).normal(size=(12, 10, 8)).astype(np.float32))
    item = image_chain(None)({"image": str(tmp_path / "a.nii.gz")})
    label = torch.zeros(item["image"].shape[1:])
    label[2:5, 2:5, 2:5] = label[9, 8, 6] = 1
    found = LabelOnScand("pred", [0, 7], [7])(item | {"pred": torch.stack([1 - label, label])})["pred"][0]
    assert found.dtype == torch.uint8 and int((found == 7).sum()) == 27
