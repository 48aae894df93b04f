"""NRRD and MetaImage files of every kind, against SimpleITK, with or without other packages."""

import bz2
import gzip
import zlib

import numpy as np
import pytest
import SimpleITK as sitk

from semisam_o1.data import ScanReader
from semisam_o1.data.findings import NOTE, WARNING, Fault
from tests.reading.headers import SHAPE, VOXELS, write_mha, write_nrrd

AXES = "space directions: (0,2,0) (-3,0,0) (0,0,4)"
NRRD = {
    "space": ["space: left-posterior-superior", AXES, "space origin: (1,2,3)"],
    "space by letters": ["space: LPS", AXES, "space origin: (1,2,3)"],
    "RAS": ["space: RAS", AXES, "space origin: (1,2,3)"],
    "LAS": ["space: left-anterior-superior", AXES, "space origin: (1,2,3)"],
    "no origin": ["space: LPS", AXES],
    "spacings alone": ["spacings: 2 3 4"],
    "space dimension": ["space dimension: 3", AXES, "space origin: (1,2,3)"],
    "nothing": [],
    "kinds and a comment": [
        "# scanned by Doe",
        "kinds: domain domain domain",
        "space: LPS",
        AXES,
        "space origin: (0,0,0)",
    ],
}
MHA = {
    "matrix": ["TransformMatrix = 0 1 0 -1 0 0 0 0 1", "Offset = 1 2 3", "ElementSpacing = 2 3 4"],
    "orders": [
        "Position = 1 2 3",
        "Orientation = 1 0 0 0 1 0 0 0 1",
        "ElementSpacing = 2 3 4",
        "AnatomicalOrientation = RAI",
    ],
    "sizes": ["ElementSize = 2 3 4"],
    "nothing": [],
}


def by_sitk(path):
    """Affine (RAS mm) and voxels as SimpleITK reads them."""
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1.0, -1, 1, 1]) @ affine, sitk.GetArrayFromImage(image).T


def assert_as_by_sitk(path):
    stored = ScanReader().open(path)
    affine, voxels = by_sitk(path)
    np.testing.assert_allclose(stored.grid.affine, affine, atol=1e-6)
    np.testing.assert_array_equal(stored.voxels(), voxels)
    return stored


@pytest.mark.parametrize("kind", NRRD)
def test_every_nrrd_header_is_read_as_by_itk(tmp_path, kind):
    stored = assert_as_by_sitk(write_nrrd(tmp_path / "a.nrrd", NRRD[kind]))
    np.testing.assert_array_equal(stored.voxels(), VOXELS)
    said = [(finding.severity, finding.found) for finding in stored.findings]
    assert said == ([(NOTE, "the header has no space")] if kind in ("spacings alone", "nothing") else [])


@pytest.mark.parametrize("kind", MHA)
def test_every_metaimage_header_is_read_as_by_itk(tmp_path, kind):
    assert_as_by_sitk(write_mha(tmp_path / "a.mha", MHA[kind]))


def test_units_that_are_not_mm_are_said(tmp_path):
    path = write_nrrd(tmp_path / "a.nrrd", [*NRRD["space"], 'space units: "um" "um" "um"'])
    (finding,) = ScanReader().open(path).findings
    assert finding.severity == WARNING and finding.found == "space units um"


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "int64"])
def test_number_types(tmp_path, dtype):
    voxels = (VOXELS % 200).astype(dtype)
    stored = ScanReader().open(write_nrrd(tmp_path / "a.nrrd", NRRD["space"], voxels))
    np.testing.assert_array_equal(stored.voxels(), voxels)


PACK = {"gzip": gzip.compress, "bzip2": bz2.compress}


@pytest.mark.parametrize("encoding", PACK)
def test_compressed_nrrd(tmp_path, encoding):
    data = PACK[encoding](VOXELS.tobytes(order="F"))
    path = write_nrrd(tmp_path / "a.nrrd", NRRD["space"], encoding=encoding, data=data)
    if encoding == "gzip":
        assert_as_by_sitk(path)
        for cut in (1, 4, 8, 9, len(data) // 2):
            write_nrrd(path, NRRD["space"], encoding=encoding, data=data[:-cut])
            with pytest.raises(Fault, match="truncated or damaged"):
                ScanReader().open(path).voxels()


@pytest.mark.parametrize("where", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_a_flipped_bit_in_compressed_data_is_found(tmp_path, suffix, where):
    """ITK's MetaImage reader takes some of these as good."""
    pack = {".mha": zlib.compress, ".nrrd": gzip.compress}[suffix]
    data = bytearray(pack(VOXELS.tobytes(order="F")))
    data[int(len(data) * where)] ^= 8
    if suffix == ".mha":
        path = write_mha(tmp_path / "a.mha", ["CompressedData = True", f"CompressedDataSize = {len(data)}"], data=data)
    else:
        path = write_nrrd(tmp_path / "a.nrrd", NRRD["space"], encoding="gzip", data=data)
    with pytest.raises(Fault, match="truncated or damaged"):
        ScanReader().open(path).voxels()


def test_compressed_metaimage(tmp_path):
    data = zlib.compress(VOXELS.tobytes(order="F"))
    assert_as_by_sitk(
        write_mha(tmp_path / "a.mha", ["CompressedData = True", f"CompressedDataSize = {len(data)}"], data=data)
    )


def test_data_beside_the_header(tmp_path):
    (tmp_path / "a.raw").write_bytes(VOXELS.tobytes(order="F"))
    assert_as_by_sitk(write_nrrd(tmp_path / "a.nhdr", [*NRRD["space"], "data file: a.raw"], data=b""))
    assert_as_by_sitk(write_mha(tmp_path / "a.mhd", MHA["matrix"], data=b"", last="ElementDataFile = a.raw"))
    (tmp_path / "a.raw").unlink()
    for name in ("a.nhdr", "a.mhd"):
        with pytest.raises(Fault, match="the file of the voxels is missing"):
            ScanReader().open(tmp_path / name)


@pytest.mark.parametrize("form", ["utf-8", "latin-1"])
def test_headers_may_have_letters_of_either_coding(tmp_path, form):
    for name, write in (("a.nrrd", write_nrrd), ("b.nrrd", write_nrrd)):
        write(tmp_path / name, [*NRRD["space"], "content: caf\u00e9"])
    plain = (tmp_path / "a.nrrd").read_bytes()
    (tmp_path / "a.nrrd").write_bytes(plain.replace("caf\u00e9".encode(), "caf\u00e9".encode(form)))
    assert_as_by_sitk(tmp_path / "a.nrrd")


def test_data_beside_the_header_may_have_any_letters(tmp_path):
    (tmp_path / "kopf_\u00fc.raw").write_bytes(VOXELS.tobytes(order="F"))
    assert_as_by_sitk(write_nrrd(tmp_path / "a.nhdr", [*NRRD["space"], "data file: kopf_\u00fc.raw"], data=b""))


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a.raw", "sub/a.raw", "..\\a.raw", "C:a.raw", "..", "LIST", "a%02d.raw 1 9 1"]
)
def test_data_elsewhere_are_refused(tmp_path, name):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for place in (tmp_path, tmp_path / "in" / "sub"):
        (place / "a.raw").write_bytes(VOXELS.tobytes(order="F"))
    write_nrrd(tmp_path / "in" / "a.nhdr", [*NRRD["space"], f"data file: {name}"], data=b"")
    write_mha(tmp_path / "in" / "a.mhd", MHA["matrix"], data=b"", last=f"ElementDataFile = {name}")
    for file in ("a.nhdr", "a.mhd"):
        with pytest.raises(Fault, match="another folder|several files"):
            ScanReader().open(tmp_path / "in" / file)


def test_a_header_that_promises_more_than_the_file_has_allocates_nothing(tmp_path):
    huge = np.lib.stride_tricks.as_strided(VOXELS, (1000, 1000, 1000), (0, 0, 0))
    for path in (
        write_nrrd(tmp_path / "a.nrrd", NRRD["space"], huge, data=b"x"),
        write_mha(tmp_path / "a.mha", [], huge, data=b"x"),
    ):
        with pytest.raises(Fault, match="shorter than its header says"):
            ScanReader().open(path)
        with pytest.raises(Fault, match="1,000,000,000 voxels"):
            ScanReader(most_voxels=10**6).open(path)


def test_other_axes_keep_their_number(tmp_path):
    film = np.stack([VOXELS] * 2, -1)
    grid = ScanReader().grid(write_nrrd(tmp_path / "a.nrrd", [], film))
    assert grid.shape == (*SHAPE, 2)
    single = ScanReader().open(write_nrrd(tmp_path / "b.nrrd", [], VOXELS[..., None]))
    assert single.grid.shape == SHAPE
    np.testing.assert_array_equal(single.voxels(), VOXELS)
