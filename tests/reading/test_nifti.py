"""Where a NIfTI file lies, for every kind of header; ITK, which 3D Slicer and ITK-SNAP use, is the oracle."""

import gzip
import itertools

import itk
import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from semisam_o1.data import ScanReader
from semisam_o1.data.findings import NOTE, WARNING, Fault
from semisam_o1.data.nifti import sheared
from semisam_o1.data.phantoms import grid_affine
from tests.reading.headers import PLAIN, SHAPE, SHEARED, SIZES, TURNED, VOXELS, patch, write_nifti

FLIP = np.diag([-1.0, -1, 1, 1])


def by_itk(path):
    """Affine (RAS mm) and voxels as ITK reads them."""
    image = itk.imread(str(path))
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return FLIP @ affine, itk.array_from_image(image).T


def found(path, **options):
    stored = ScanReader(**options).open(path)
    return stored, [(finding.severity, finding.found) for finding in stored.findings]


@pytest.mark.parametrize("codes", itertools.product(range(5), range(5)))
def test_the_form_is_the_one_that_itk_takes(tmp_path, codes):
    path = write_nifti(
        tmp_path / "a.nii", TURNED @ np.diag([1, 1, -1, 1]), PLAIN, codes, fields={"pixdim": [1, 2, 3, 4, 0, 0, 0, 0]}
    )
    stored, findings = found(path)
    if codes[0] and not (codes[1] and codes[0] > 1):  # the sform; ITK takes its sizes from pixdim
        np.testing.assert_allclose(stored.grid.affine, TURNED @ np.diag([1, 1, -1, 1]), atol=1e-5)
        direction = by_itk(path)[0][:3, :3] / SIZES
        np.testing.assert_allclose(stored.grid.affine[:3, :3] / stored.grid.spacing, direction, atol=1e-5)
    else:
        np.testing.assert_allclose(stored.grid.affine, by_itk(path)[0], atol=1e-5)
    differ = [severity for severity, text in findings if "sform and qform differ" in text]
    assert differ == ([WARNING] if all(codes) else [])
    bare = [severity for severity, text in findings if "neither form" in text]
    assert bare == ([] if any(codes) else [NOTE])
    np.testing.assert_array_equal(stored.voxels(), VOXELS)


@pytest.mark.parametrize("form, affine", [("sform", PLAIN), ("qform", TURNED)])
def test_the_other_form_can_be_taken(tmp_path, form, affine):
    both = write_nifti(tmp_path / "a.nii.gz", PLAIN, TURNED, (2, 1))
    np.testing.assert_allclose(found(both, nifti_form=form)[0].grid.affine, affine, atol=1e-5)
    alone = write_nifti(tmp_path / "b.nii.gz", PLAIN, None, (1, 0))
    np.testing.assert_allclose(found(alone, nifti_form=form)[0].grid.affine, PLAIN, atol=1e-5)


@pytest.mark.parametrize("shift, said", [(1e-4, False), (0.01, True)])
def test_rounding_is_no_difference(tmp_path, shift, said):
    moved = PLAIN.copy()
    moved[0, 3] += shift
    _, findings = found(write_nifti(tmp_path / "a.nii", moved, PLAIN, (2, 1)))
    assert bool(findings) == said
    if said:
        assert findings == [(WARNING, "sform and qform differ by 0.005 voxels; the qform is taken")]


def test_a_shear_is_kept_where_it_is_all_there_is_and_else_said(tmp_path):
    alone, findings = found(
        write_nifti(tmp_path / "a.nii", SHEARED, None, (1, 0), fields={"pixdim": [1, 2, 3, 4.176123, 0, 0, 0, 0]})
    )
    np.testing.assert_allclose(alone.grid.affine, SHEARED, atol=1e-5)
    assert [severity for severity, _ in findings] == [NOTE] and "right angles" in findings[0][1]
    with pytest.raises(RuntimeError, match="orthonormal"):
        by_itk(tmp_path / "a.nii")
    path = write_nifti(tmp_path / "b.nii", SHEARED, PLAIN, (1, 1))
    both, findings = found(path)
    np.testing.assert_allclose(both.grid.affine, by_itk(path)[0], atol=1e-5)
    assert "the sform is sheared; the qform is taken" in findings[0][1] and findings[0][0] == WARNING


def test_pixdim_that_the_sform_denies_is_said(tmp_path):
    path = write_nifti(tmp_path / "a.nii", PLAIN, None, (1, 0), fields={"pixdim": [1, 2, 3, 5, 0, 0, 0, 0]})
    stored, findings = found(path)
    np.testing.assert_allclose(stored.grid.spacing, SIZES)
    assert findings == [(WARNING, "voxel sizes of the sform (2 x 3 x 4 mm) and of pixdim (2 x 3 x 5 mm) differ")]


@pytest.mark.parametrize("units, scale", [("micron", 1e-3), ("meter", 1e3), ("mm", 1), ("unknown", 1)])
@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (0, 0)])
def test_units_are_converted(tmp_path, units, scale, codes):
    path = write_nifti(tmp_path / "a.nii", PLAIN, PLAIN, codes, units)
    stored, findings = found(path)
    np.testing.assert_allclose(stored.grid.affine, by_itk(path)[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(stored.grid.spacing, np.array(SIZES) * scale, rtol=1e-5)
    assert any("sizes in" in text for _, text in findings) == (scale != 1)


def test_a_quaternion_a_hair_too_long_is_shortened(tmp_path):
    path = write_nifti(tmp_path / "a.nii", None, np.diag([2.0, -3, -4, 1]), (0, 1))
    patch(path, 256, "<3f", 1.00001, 0.0, 0.0)
    stored, findings = found(path)
    np.testing.assert_allclose(stored.grid.affine, by_itk(path)[0], atol=1e-4)
    assert findings == [(NOTE, "a quaternion longer than 1")]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII.GZ"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64", "int64"])
def test_every_number_type_and_byte_order(tmp_path, order, suffix, dtype):
    voxels = (VOXELS % 200).astype(np.dtype(dtype).newbyteorder(order))
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(voxels.dtype)
    nibabel.save(nibabel.Nifti1Image(voxels, PLAIN, header), tmp_path / f"a{suffix.lower()}")
    (tmp_path / f"a{suffix.lower()}").rename(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(found(tmp_path / f"a{suffix}")[0].voxels(), VOXELS % 200)


def test_slope_and_intercept_are_applied(tmp_path):
    path = write_nifti(tmp_path / "a.nii", PLAIN, None, (1, 0))
    patch(path, 112, "<2f", 0.5, -3)
    np.testing.assert_allclose(found(path)[0].voxels(), VOXELS * 0.5 - 3)


@pytest.mark.parametrize("axes", [1, 2])
def test_trailing_axes_of_one_are_dropped(tmp_path, axes):
    path = write_nifti(tmp_path / "a.nii.gz", PLAIN, None, (1, 0), voxels=VOXELS.reshape(*SHAPE, *[1] * axes))
    stored, findings = found(path)
    assert stored.grid.shape == SHAPE and stored.voxels().shape == SHAPE
    assert findings == [(NOTE, f"{3 + axes} axes, the last of length 1")]


@pytest.mark.parametrize("where", [0.3, 0.6, 0.9])
def test_a_flipped_bit_in_gzip_is_found(tmp_path, where):
    path = write_nifti(tmp_path / "a.nii.gz", PLAIN, None, (1, 0))
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * where)] ^= 4
    path.write_bytes(raw)
    with pytest.raises(Fault, match="truncated or damaged"):
        ScanReader().open(path).voxels()


@pytest.mark.parametrize("cut", [1, 4, 8, 9])
def test_the_last_bytes_of_gzip_are_missed(tmp_path, cut):
    path = write_nifti(tmp_path / "a.nii.gz", PLAIN, None, (1, 0))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(Fault, match="truncated or damaged"):
        ScanReader().open(path).voxels()


def test_a_header_that_promises_more_than_the_file_has_allocates_nothing(tmp_path):
    path = write_nifti(tmp_path / "a.nii", PLAIN, None, (1, 0))
    patch(path, 42, "<3h", 1300, 1300, 1300)
    with pytest.raises(Fault, match="2,197,000,000 voxels"):
        ScanReader().open(path)
    with pytest.raises(Fault, match="shorter than its header says"):
        ScanReader(most_voxels=10**12).open(path)
    packed = tmp_path / "b.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(Fault, match="shorter than its header says"):
        ScanReader(most_voxels=10**12).open(packed)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: write_nifti(path, PLAIN, None, (1, 0), voxels=VOXELS.astype(np.complex64)), "complex numbers"),
        (lambda path: patch(write_nifti(path, PLAIN, None, (1, 0)), 70, "<h", 128), "RGB"),
        (lambda path: patch(write_nifti(path, PLAIN, None, (1, 0)), 70, "<h", 9999), "voxels of type unknown"),
        (lambda path: path.write_bytes(gzip.compress(b"x" * 900)), "compressed by gzip"),
        (lambda path: path.write_bytes(b""), "an empty file"),
        (lambda path: path.write_bytes(b"/annex/objects/MD5E-s3--1.nii"), "a pointer of Git LFS or git-annex"),
        (lambda path: path.symlink_to("../.git/annex/objects/x"), "a link to a file that is not there"),
        (lambda path: path.write_bytes(b"x" * 500), "truncated or damaged"),
    ],
)  # fmt: skip
def test_damaged_is_said_of_damaged_bytes_alone(tmp_path, spoil, said):
    path = tmp_path / "a.nii"
    spoil(path)
    with pytest.raises(Fault, match=said):
        ScanReader().open(path).voxels()


def test_pairs_analyze_and_freesurfer(tmp_path):
    nibabel.save(nibabel.Nifti1Pair(VOXELS, TURNED), tmp_path / "pair.hdr")
    nibabel.save(nibabel.AnalyzeImage(VOXELS, np.diag([*SIZES, 1])), tmp_path / "old.hdr")
    nibabel.save(nibabel.MGHImage(VOXELS.astype(np.int32), TURNED), tmp_path / "fs.mgz")
    for name, affine in (("pair.hdr", TURNED), ("old.hdr", np.diag([-2.0, -3, 4, 1])), ("fs.mgz", TURNED)):
        stored, findings = found(tmp_path / name)
        np.testing.assert_allclose(stored.grid.affine, affine, atol=1e-4)
        np.testing.assert_array_equal(stored.voxels(), VOXELS)
        assert bool(findings) == (name == "old.hdr")
    (tmp_path / "pair.img").unlink()
    with pytest.raises(Fault, match="one file of a pair"):
        ScanReader().open(tmp_path / "pair.hdr")


angles = some.tuples(*[some.floats(-180, 180)] * 3)
sides = some.tuples(*[some.floats(0.05, 20)] * 3)


@settings(max_examples=60)
@given(
    codes=some.sampled_from([(1, 0), (0, 1), (1, 1), (2, 1), (4, 3)]), angles=angles, sides=sides,
    axcodes=some.sampled_from(["RAS", "LPS", "ASR", "IPL"]),
)  # fmt: skip
def test_any_affine_of_right_angles_is_read_as_by_itk(tmp_path_factory, codes, angles, sides, axcodes):
    path = tmp_path_factory.mktemp("affines") / "a.nii"
    affine = grid_affine(SHAPE, sides, axcodes, angles)
    fields = {
        "pixdim": [np.linalg.det(affine[:3, :3]) < 0 and -1 or 1, *np.linalg.norm(affine[:3, :3], axis=0), 0, 0, 0, 0]
    }
    write_nifti(path, affine, affine, codes, fields=fields)
    stored, findings = found(path)
    assert not sheared(affine)
    assert all(codes) or findings == []  # near a half turn, float32 rounds a quaternion by up to 3e-4
    scale = np.abs(affine).max()
    np.testing.assert_allclose(stored.grid.affine, affine, atol=1e-3 * scale)
    np.testing.assert_allclose(stored.grid.affine, by_itk(path)[0], atol=1e-5 * scale)
