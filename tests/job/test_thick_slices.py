"""A job on scans of thick slices: trained on the slices as they are, labels in each scan's own geometry."""

import json

import nibabel
import numpy as np
import pytest

from semisam_o1.cli import main
from semisam_o1.data.phantoms import grid_affine, make_phantom
from tests.jobs import assert_same_labels, small

# shape, spacing, axes and turn of each case: thick along S and tilted, in another order, with fewer slices, tilted more
STORED = (
    ((40, 36, 7), (1.2, 1.2, 5.0), "RAS", (6, 0, 0)),
    ((7, 40, 36), (5.0, 1.2, 1.2), "SRA", (0, 0, 0)),
    ((40, 36, 5), (1.2, 1.2, 6.0), "LPS", (0, 0, 0)),
    ((40, 36, 7), (1.2, 1.2, 5.0), "RAS", (12, 0, 5)),
)


@pytest.fixture
def thick_dir(tmp_path):
    root = tmp_path / "data"
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for number, (shape, sizes, axcodes, turn) in enumerate(STORED):
        affine = grid_affine(shape, sizes, axcodes, turn)
        for folder, array in zip(("images", "labels"), make_phantom(number, shape, affine=affine)):
            nibabel.save(nibabel.Nifti1Image(array, affine), root / folder / f"scan{number}.nii.gz")
    (root / "train.txt").write_text("".join(f"scan{n}\n" for n in range(len(STORED))))
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "levels"),
    [
        (["--preset", "quick"], 3),
        (["--preset", "standard"], 4),
        (["--method", "dtc", "--preset", "quick"], 4),
        (["--method", "dan", "--preset", "quick"], 3),
    ],
    ids=["quick", "standard", "dtc", "dan"],
)
def test_slices_are_trained_on_as_they_are(thick_dir, tmp_path, options, levels):
    run, out = tmp_path / "run", tmp_path / "out"
    ids = {"num_rounds": 1, "max_iterations": 2, "first_round_factor": 1, "view_turn": 0.15, "device": "cpu"}
    ids |= {"network_widths": [4, 4, 4, 4, 4]}
    assert main(["run", str(thick_dir), "--output", str(run), *options, *small(**ids)]) == 0
    settings = json.loads((run / "run.json").read_text())["settings"]
    # 48 x 43.2 x 35 mm in 6,000 voxels: 2.3 mm, or slices of 5 mm and sqrt(12.096 / 5) in the plane
    assert settings["train_spacing"] == [1.5554, 1.5554, 5.0]
    assert settings["network_strides"] == [[2, 2, 1], [2, 2, 2], [2, 2, 1], [1, 1, 1]][:levels]
    assert settings["patch_size"][2] == 8  # seven slices, halved once
    bundle = json.loads((run / "bundle" / "configs" / "inference.json").read_text())
    for id in ("train_spacing", "network_strides", "patch_size"):
        assert bundle[id] == settings[id]
    for number, (shape, _, _, _) in list(enumerate(STORED))[1:]:
        found = nibabel.load(run / "pseudo_labels" / f"scan{number}.nii.gz")
        scan = nibabel.load(thick_dir / "images" / f"scan{number}.nii.gz")
        assert found.shape == shape
        np.testing.assert_allclose(found.affine, scan.affine, atol=1e-6)
    scans = [str(thick_dir / "images" / f"scan{number}.nii.gz") for number in range(1, len(STORED))]
    assert main(["predict", *scans, "--run", str(run), "--output", str(out), "--device", "cpu"]) == 0
    assert_same_labels(run / "round_1" / "predictions", out / "labels")


def test_one_number_stays_allowed(thick_dir, tmp_path, capsys):
    command = ["validate", str(thick_dir), "--set"]
    assert main([*command, "train_spacing=2.5"]) == 0
    assert main([*command, "train_spacing=[2,2,5]"]) == 0
    assert main([*command, "train_spacing=[2,5]"]) == 2
    assert "train_spacing is [2, 5]: expected a number from 0.001 to 100 or 3 numbers" in capsys.readouterr().err
    assert main([*command, "network_strides=[[2,2],2,2]"]) == 2
    assert "network_strides is [[2, 2], 2, 2]: expected" in capsys.readouterr().err
