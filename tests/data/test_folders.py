"""No file of a data set's folders vanishes, and names are matched as people and programs write them."""

import unicodedata

import nibabel
import numpy as np
import pytest

from semisam_o1.cli import main
from semisam_o1.data import open_cohort
from semisam_o1.data.findings import NOTE, STOPS, WARNING
from semisam_o1.types import DatasetError
from tests.data.studies import organ, voxels

NOTHING = ()


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


def study(root, images=("t", "a"), labels=("t",), train=None):
    for number, name in enumerate(images):
        write(root / "images" / f"{name}.nii.gz", voxels(number))
    for name in labels:
        write(root / "labels" / f"{name}.nii.gz", organ())
    if train is not None:
        (root / "train.txt").write_text("\n".join(train), encoding="utf-8")
    return root


def said(cohort):
    return [(problem.case, problem.severity, problem.found) for problem in cohort.problems]


def test_files_that_are_no_scans_are_counted(tmp_path):
    study(tmp_path)
    for name in ("._a.nii.gz", "._t.nii.gz", ".DS_Store", "a.json", "notes.docx"):
        (tmp_path / "images" / name).write_bytes(b"\0")
    cohort = open_cohort(tmp_path)
    assert [case.name for case in cohort.cases] == ["t", "a"]
    text = "ignored in images/: files of the desktop (1), AppleDouble files of macOS (2), sidecars and documents"
    assert said(cohort) == [("data set", NOTE, f"{text} (2: a.json, notes.docx)")]
    for name in ("b.json", "photo.png"):
        (tmp_path / "images" / name).write_bytes(b"\0")
    assert said(open_cohort(tmp_path)) == [("data set", NOTE, f"{text} (4: a.json, b.json, notes.docx, ...)")]
    (note,) = open_cohort(tmp_path, pseudonyms=tmp_path / "key.csv").problems
    assert note.found == f"{text} (4)"  # their names may be those of patients


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("x.dcm", "a DICOM file in images/"),
        ("IM0001", "a DICOM file in images/"),
        ("x.mnc", "a format that is not read in images/"),
        ("x.nii.bz2", "NIfTI in a compression that is not read in images/"),
        ("scans.zip", "an archive in images/"),
        ("x.h5", "HDF5 in images/"),
        ("x.seg.nrrd", "a segmentation in images/"),
        ("series", "a folder in images/"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, name, found):
    path = study(tmp_path) / "images" / name
    path.mkdir() if name == "series" else path.write_bytes(b"\0" * 128 + b"DICM" if name == "IM0001" else b"\0")
    cohort = open_cohort(tmp_path)
    assert said(cohort) == [(name, WARNING, found)] and cohort.problems[0].remedy


def test_a_link_to_a_file_that_was_not_fetched_sets_the_scan_aside(tmp_path):
    study(tmp_path)
    (tmp_path / "images" / "b.nii.gz").symlink_to("../.git/annex/objects/b")
    cohort = open_cohort(tmp_path)
    assert "a link to a file that is not there" in cohort.set_aside["b"]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_composed_or_not_are_one_name(tmp_path, forms):
    in_files, in_lists = (unicodedata.normalize(form, "Böhm") for form in forms)
    study(tmp_path, ("t", in_files), ("t", in_lists), ["t", in_lists])
    cohort = open_cohort(tmp_path)
    assert cohort.problems == NOTHING and cohort.pool[0].label is not None
    assert cohort.pool[0].name == unicodedata.normalize("NFC", "Böhm")


def test_lists_may_have_folders_and_suffixes(tmp_path):
    study(tmp_path, train=["images/t.nii.gz", f"{tmp_path}/images/a.nii.gz"])
    assert [case.name for case in open_cohort(tmp_path).cases] == ["t", "a"]
    (tmp_path / "train.txt").write_text("images\\t.nii.gz\n../a.nii.gz")
    with pytest.raises(DatasetError, match="leaves the data folder"):
        open_cohort(tmp_path)


def test_channels_of_nnunet(tmp_path):
    study(tmp_path, ("t_0000", "a_0000"), ("t",))
    cohort = open_cohort(tmp_path)
    assert [case.name for case in cohort.cases] == ["t", "a"] and cohort.problems == NOTHING
    for number, name in enumerate(("t_0001", "a_0001")):
        write(tmp_path / "images" / f"{name}.nii.gz", voxels(number + 5))
    with pytest.raises(DatasetError) as raised:
        open_cohort(tmp_path)
    (problem,) = raised.value.problems
    assert problem.severity == STOPS and problem.remedy == "choose one: --set channel=0"
    for channel in (0, 1):
        cohort = open_cohort(tmp_path, channel=channel)
        assert [case.image.name for case in cohort.cases] == [f"t_000{channel}.nii.gz", f"a_000{channel}.nii.gz"]


def test_numbers_of_cases_are_no_channels(tmp_path):
    study(tmp_path, ("patient_0000", "patient_0001"), ("patient_0000",))
    assert [case.name for case in open_cohort(tmp_path).cases] == ["patient_0000", "patient_0001"]


def test_bids_entities(tmp_path):
    images = ("sub-01_ses-1_T1w", "sub-01_ses-2_T1w", "sub-02_T1w")
    study(tmp_path, images, ("sub-01_ses-1_space-orig_desc-lesion_mask",))
    cohort = open_cohort(tmp_path)
    assert [case.name for case in cohort.templates] == ["sub-01_ses-1_T1w"] and len(cohort.pool) == 2
    (tmp_path / "train.txt").write_text("sub-01_ses-1\nsub-02\n")
    cohort = open_cohort(tmp_path)
    assert [case.name for case in cohort.pool] == ["sub-02_T1w"]


def test_a_header_and_its_voxels_are_one_scan(tmp_path):
    study(tmp_path)
    nibabel.save(nibabel.Nifti1Pair(voxels(3), np.eye(4)), tmp_path / "images" / "p.hdr")
    cohort = open_cohort(tmp_path)
    assert [case.name for case in cohort.cases] == ["t", "a", "p"] and cohort.problems == NOTHING
    (tmp_path / "images" / "p.hdr").unlink()
    assert said(open_cohort(tmp_path)) == [("p.img", WARNING, "a format that is not read in images/")]


@pytest.mark.slow
def test_predict_takes_a_folder(run, phantom_dir, tmp_path, capsys, caplog):
    folder, out = tmp_path / "scans", tmp_path / "out"
    folder.mkdir()
    for name in ("phantom_01.nii.gz", "phantom_02.nii.gz"):
        (folder / name).write_bytes((phantom_dir / "images" / name).read_bytes())
    (folder / "phantom_03.nii.gz").write_bytes(b"")
    (folder / "x.dcm").write_bytes(b"\0")
    assert main(["predict", str(folder), "--run", str(run), "--output", str(out), "--device", "cpu"]) == 1
    assert sorted(path.name for path in (out / "labels").iterdir()) == ["phantom_01.nii.gz", "phantom_02.nii.gz"]
    text = capsys.readouterr()
    assert "left out, 1 of 3: phantom_03" in text.err and "a DICOM file" in caplog.text + text.out + text.err
    (tmp_path / "none").mkdir()
    assert main(["predict", str(tmp_path / "none"), "--run", str(run), "--output", str(out), "--device", "cpu"]) == 2
    assert "no image" in capsys.readouterr().err


def test_a_channel_in_one_name_alone_is_matched(tmp_path):
    """Beside images without one: as a set grows, people export in several ways."""
    study(tmp_path, ("t_0000", "b", "c_12_0000"), ("t",))
    found = open_cohort(tmp_path)
    assert sorted(case.name for case in found.pool) == ["b", "c_12"]
    assert found.templates[0].image.name == "t_0000.nii.gz"


def test_two_channels_beside_plain_names_are_refused(tmp_path):
    study(tmp_path, ("t_0000", "t_0001", "b"), ("t",))
    with pytest.raises(DatasetError, match="several channels per scan"):
        open_cohort(tmp_path)
    assert open_cohort(tmp_path, channel=1).templates[0].image.name == "t_0001.nii.gz"


def test_a_label_with_more_in_its_name_than_an_image_is_told(tmp_path):
    study(tmp_path, ("t", "b"), ("t", "b_seg"))
    (note,) = [problem for problem in open_cohort(tmp_path).problems if "without an image" in problem.found]
    assert note.remedy == "nothing, if not needed; if b_seg is of b, rename it so"
