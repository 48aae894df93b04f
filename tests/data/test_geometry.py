"""However a scan is stored, round 0 labels the same anatomy, on the scan's own grid."""

import nibabel
import numpy as np
import pytest

from semisam_o1.cli import main
from semisam_o1.data.phantoms import grid_affine, make_phantom, reorient

SHAPE, SPACING = (32, 32, 26), 1.5  # the template's grid
# One pass alone: in the second, copies of one scan would be atlases of one another, each of others.
SMALL = ["--set", "feature_voxels=27000", "label_fusion=false", "quality_estimate=false"]


def dice(one: np.ndarray, other: np.ndarray) -> float:
    pairs = [(one == c, other == c) for c in (1, 2)]
    return float(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs]))


def turned(degrees: float) -> np.ndarray:
    """A turn about an oblique axis, (4, 4)."""
    from scipy.spatial.transform import Rotation

    axis = np.array([1.0, 2.0, 2.0]) / 3
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(np.radians(degrees) * axis).as_matrix()
    return matrix


@pytest.fixture(scope="module")
def carried(made_once):
    """The same anatomy stored in several ways: name -> (label by round 0, truth, affine)."""
    affine = grid_affine(SHAPE, SPACING)
    template = make_phantom(0, SHAPE, SPACING, noise=0)
    plain = make_phantom(1, SHAPE, SPACING, noise=0)
    stored = {"plain": (*plain, affine)}
    for codes in ("LPS", "SAR", "AIL"):
        image, new = reorient(plain[0], affine, codes)
        stored[codes] = (image, reorient(plain[1], affine, codes)[0], new)
    thick = (48, 48, 13)
    stored["thick"] = (
        *make_phantom(1, thick, affine=grid_affine(thick, (1, 1, 3)), noise=0),
        grid_affine(thick, (1, 1, 3)),
    )
    oblique = turned(20) @ affine
    stored["oblique"] = (*make_phantom(1, SHAPE, affine=oblique, noise=0), oblique)  # the head lies as ever
    stored["tilted"] = (*plain, oblique)  # the head lay askew: the same voxels, another affine

    def make(root):
        for folder in ("images", "labels"):
            (root / folder).mkdir()
        nibabel.save(nibabel.Nifti1Image(template[0], affine), root / "images" / "template.nii.gz")
        nibabel.save(nibabel.Nifti1Image(template[1], affine), root / "labels" / "template.nii.gz")
        for name, (image, _, where) in stored.items():
            nibabel.save(nibabel.Nifti1Image(image, where), root / "images" / f"{name}.nii.gz")
        assert main(["propagate", str(root), "--output", str(root / "run"), *SMALL]) == 0

    root, found = made_once("geometry", make), {}
    for name, (_, truth, where) in stored.items():
        label = nibabel.load(root / "run" / "pseudo_labels" / f"{name}.nii.gz")
        np.testing.assert_allclose(label.affine, where, atol=1e-5)
        assert label.shape == truth.shape
        found[name] = (np.asarray(label.dataobj), truth, where)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("codes", ["LPS", "SAR", "AIL"])
def test_flipped_or_permuted(carried, codes):
    label, _, where = carried[codes]
    back, _ = reorient(label, where, "RAS")
    assert dice(back, carried["plain"][0]) >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("name", ["thick", "oblique", "tilted"])
def test_costs_little_against_truth(carried, name):
    label, truth, _ = carried[name]
    plain = dice(*carried["plain"][:2])
    assert plain > 0.85 and dice(label, truth) > plain - 0.03
