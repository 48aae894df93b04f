"""HDF5: data inside the file alone, without locks; what else a file may hold is refused by name."""

import fcntl

import h5py
import numpy as np
import pytest

from semisam_o1.data import ScanReader
from semisam_o1.data.findings import Fault
from tests.reading.headers import SHAPE, VOXELS


def said(path, **options):
    with pytest.raises(Fault) as raised:
        ScanReader(**options).open(path).voxels()
    return str(raised.value)


def test_links_and_other_files_are_not_followed(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["image"] = VOXELS
    (tmp_path / "raw").write_bytes(VOXELS.tobytes())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["external"] = h5py.ExternalLink("other.h5", "image")
        file["plain"] = VOXELS
        file["soft"] = h5py.SoftLink("/plain")
        file["hard"] = file["plain"]
        file.create_group("group")["image"] = VOXELS
        file.create_dataset("raw", SHAPE, "int16", external=[(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)])
        layout = h5py.VirtualLayout(SHAPE, "int16")
        layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "image", SHAPE)
        file.create_virtual_dataset("virtual", layout)
    for key in ("external", "soft"):
        assert "is a link to other data" in said(tmp_path / "a.h5", image_key=key)
    for key in ("raw", "virtual"):
        assert "is stored in other files" in said(tmp_path / "a.h5", image_key=key)
    assert "'group' is a group" in said(tmp_path / "a.h5", image_key="group")
    for key in ("plain", "hard", "group/image"):
        np.testing.assert_array_equal(ScanReader(key).open(tmp_path / "a.h5").voxels(), VOXELS)


def test_sizes_types_and_codecs_have_sentences_of_their_own(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("huge", (1300, 1300, 1300), "int16", chunks=(10, 10, 10))
        file.create_dataset("unwritten", (30, 30, 30), "int16")
        file["complex"], file["text"] = VOXELS.astype(complex), "hello"
        file["bool"] = VOXELS > 500
        file.create_dataset("packed", data=VOXELS, compression="gzip")
    assert "2,197,000,000 voxels" in said(tmp_path / "a.h5", image_key="huge")
    assert "no data in the dataset" in said(tmp_path / "a.h5", image_key="unwritten")
    assert "complex numbers" in said(tmp_path / "a.h5", image_key="complex")
    assert "voxels of type" in said(tmp_path / "a.h5", image_key="text")
    np.testing.assert_array_equal(ScanReader("bool").open(tmp_path / "a.h5").voxels(), VOXELS > 500)
    raw = (tmp_path / "a.h5").read_bytes()
    place = raw.index(b"deflate")
    (tmp_path / "b.h5").write_bytes(raw[: place - 8] + b"\x7f\x7d" + raw[place - 6 :])
    text = said(tmp_path / "b.h5", image_key="packed")
    assert "compression that this installation cannot read" in text or "truncated or damaged" in text


@pytest.mark.parametrize("cut", [0.3, 0.7, 0.99])
def test_damaged_files_are_said_to_be_damaged(tmp_path, cut):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = VOXELS
    raw = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(raw[: int(len(raw) * cut)])
    assert "truncated or damaged" in said(tmp_path / "a.h5")


def test_a_locked_file_is_read(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = VOXELS
    with (tmp_path / "a.h5").open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        np.testing.assert_array_equal(ScanReader().open(tmp_path / "a.h5").voxels(), VOXELS)
