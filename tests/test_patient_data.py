"""What stands inside files, in paths, and in names under pseudonyms reaches nothing that is written."""

import csv
import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from semisam_o1.cli import main
from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.pseudonyms import Pseudonyms, renamed
from semisam_o1.job import Job
from semisam_o1.types import DatasetError
from tests.jobs import config_of, small

SECRET = "MUELLER^ANNA"


def planted(path: Path) -> None:
    """Write ``SECRET`` into every text field of a NIfTI header, and an extension."""
    image = nibabel.load(path)
    header = image.header
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        header[field] = SECRET.encode()
    header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", SECRET.encode()))
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine, header), path)


def as_nrrd(path: Path, suffix: str) -> None:
    """The same scan as NRRD or MHA, with ``SECRET`` among its key values."""
    image = sitk.ReadImage(str(path))
    for key in ("PatientName", "InstitutionName"):
        image.SetMetaData(key, SECRET)
    sitk.WriteImage(image, str(path.with_name(path.name.replace(".nii.gz", suffix))))
    path.unlink()


def text_of(path: Path) -> bytes:
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    return content + path.name.encode()


def who_names(folder: Path, text: str) -> set[str]:
    """The files in ``folder`` that contain ``text``, in their names too, compressed ones unpacked."""
    return {path.name for path in folder.rglob("*") if path.is_file() and text.encode() in text_of(path)}


@pytest.fixture(scope="module")
def cohort(phantom_dir, tmp_path_factory):
    """Phantoms of a patient whose name stands in every text field, in the folder's name and in file names."""
    data = tmp_path_factory.mktemp("clinic") / SECRET / "data"
    shutil.copytree(phantom_dir, data)
    for file in sorted(data.glob("*/*.nii.gz")):
        planted(file)
        file.rename(file.with_name(file.name.replace("phantom", "MUELLER")))
    for name in ("train", "val", "test"):
        (data / f"{name}.txt").write_text((data / f"{name}.txt").read_text().replace("phantom", "MUELLER"))
    as_nrrd(data / "images" / "MUELLER_01.nii.gz", ".nrrd")
    as_nrrd(data / "images" / "MUELLER_02.nii.gz", ".mha")
    return data


@pytest.fixture(scope="module")
def made(cohort, tmp_path_factory):
    """A run under pseudonyms, its key, and what it printed is not kept."""
    folder = tmp_path_factory.mktemp("pseudonyms")
    command = ["run", str(cohort), "--output", str(folder / "run"), "--pseudonyms", str(folder / "key.csv")]
    assert main([*command, "--template", "MUELLER_00", "--device", "cpu", *small(num_rounds=1)]) == 0
    return folder


@pytest.mark.slow
def test_what_stands_inside_files_and_in_paths_is_in_run_json_alone(made):
    assert who_names(made / "run", "ANNA") == {"run.json"}  # as part of the data set's path


@pytest.mark.slow
def test_pseudonyms_replace_names_everywhere(made):
    assert who_names(made / "run", "MUELLER_") == set()
    rows = list(csv.DictReader((made / "key.csv").open()))
    assert {row["case"] for row in rows} == {f"MUELLER_0{n}" for n in range(5)}
    assert {path.name for path in (made / "run" / "pseudo_labels").iterdir()} == {
        f"{row['pseudonym']}.nii.gz" for row in rows if row["case"] in ("MUELLER_01", "MUELLER_02")
    }


@pytest.mark.slow
def test_later_commands_take_the_key(made, cohort, tmp_path, capsys):
    run, key = made / "run", str(made / "key.csv")
    assert main(["evaluate", str(run), str(cohort)]) == 2
    assert "--pseudonyms" in capsys.readouterr().err
    assert main(["evaluate", str(run), str(cohort), "--pseudonyms", key]) == 0
    scan = str(cohort / "images" / "MUELLER_01.nrrd")
    command = ["predict", scan, "--run", str(run), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*command, "--pseudonyms", key]) == 0
    assert who_names(tmp_path / "out", "MUELLER") == set()


@pytest.mark.slow
def test_the_published_test_takes_the_key(made, cohort, tmp_path, capfd):
    out = tmp_path / "out"
    command = ["test", str(cohort), "--run", str(made / "run"), "--save-pred", str(out), "--device", "cpu"]
    (tmp_path / "one.txt").write_text("MUELLER_00\n")
    command += ["--test-list", str(tmp_path / "one.txt")]
    assert main(command) == 2 and "--pseudonyms" in capfd.readouterr().err
    assert main([*command, "--pseudonyms", str(out / "key.csv")]) == 2 and not out.exists()
    capfd.readouterr()
    assert main([*command, "--pseudonyms", str(made / "key.csv")]) == 0
    assert "scan_000" in (said := capfd.readouterr().out) and "MUELLER" not in said
    assert who_names(out, "MUELLER") == set()


@pytest.mark.slow
def test_a_key_may_be_moved(made, cohort, tmp_path):
    moved = shutil.copy(made / "key.csv", tmp_path / "moved.csv")
    command = ["run", str(cohort), "--output", str(made / "run"), "--template", "MUELLER_00", "--device", "cpu"]
    assert main([*command, *small(num_rounds=1), "--pseudonyms", str(moved)]) == 0


def test_pseudonyms_do_not_follow_the_order_of_names(tmp_path):
    names = [f"name_{number:02d}" for number in range(40)]
    renamed(tmp_path / "key.csv", names, [], [])
    key = Pseudonyms(tmp_path / "key.csv").key
    assert sorted(key) == names and [key[name] for name in names] != sorted(key.values())


@pytest.mark.slow
def test_a_run_under_pseudonyms_asks_for_its_key(made, cohort, capsys):
    """The advice of a changed setting, --restart-from, would write the names."""
    command = ["run", str(cohort), "--output", str(made / "run"), "--template", "MUELLER_00", "--device", "cpu"]
    for more in ([], ["--restart-from", "features"]):
        assert main([*command, *more, *small(num_rounds=1)]) == 2
        assert "Give the key: --pseudonyms FILE" in capsys.readouterr().err
    assert who_names(made / "run", "MUELLER_") == set()


def test_a_key_beside_the_results_is_refused(cohort, tmp_path, capsys):
    out = tmp_path / "out"
    scan = str(cohort / "images" / "MUELLER_01.nrrd")
    weights = ["--weights", str(tmp_path / "none.pth")]
    for command in (["run", str(cohort), "--template", "MUELLER_00"], ["predict", scan, *weights]):
        assert main([*command, "--output", str(out), "--pseudonyms", str(out / "key.csv")]) == 2
        assert "Keep the key elsewhere" in capsys.readouterr().err and not out.exists()


def test_a_key_beside_the_results_is_refused_by_monai_too(cohort, tmp_path):
    """Where both are expressions."""
    out = tmp_path / "out"
    ids = {"output_dir": f"${str(out)!r}", "pseudonyms": "$@output_dir + '/key.csv'", "template": ["MUELLER_00"]}
    with pytest.raises(DatasetError, match="Keep the key elsewhere"):
        Job(config_of(cohort, out) | ids)
    assert not out.exists()


def test_a_key_is_kept_and_extended(tmp_path):
    key = tmp_path / "key.csv"
    key.write_text("case,pseudonym\nanna,p-17\n")
    pseudonyms = Pseudonyms(key)
    assert (pseudonyms("anna"), pseudonyms("berta")) == ("p-17", "scan_0002")
    pseudonyms.write()
    assert Pseudonyms(key).key == {"anna": "p-17", "berta": "scan_0002"} and Pseudonyms(key).name("p-17") == "anna"


def test_names_are_replaced_as_whole_words(tmp_path):
    """The longest first, and never inside another word."""
    pseudonyms = Pseudonyms(tmp_path / "key.csv")
    names = {name: pseudonyms(name) for name in ("may", "may_2", "scan")}
    text = "may_2 and may: dismay, scans, scan_0001; (scan)"
    expected = f"{names['may_2']} and {names['may']}: dismay, scans, scan_0001; ({names['scan']})"
    assert pseudonyms.text(text) == expected


def test_names_are_replaced_before_the_number_of_a_channel_and_in_either_form(tmp_path):
    pseudonyms = Pseudonyms(tmp_path / "key.csv")
    anna, umlaut = pseudonyms("anna"), pseudonyms("m\u00fcller")
    text = "2 images: anna_0000.nii.gz, anna_0001.nii.gz; mu\u0308ller and annabel_0000.nii.gz, anna_00001.nii"
    expected = f"2 images: {anna}_0000.nii.gz, {anna}_0001.nii.gz; {umlaut} and annabel_0000.nii.gz, anna_00001.nii"
    assert pseudonyms.text(text) == expected


def test_entries_that_are_no_scans_are_not_named_under_pseudonyms(cohort, tmp_path):
    """A folder, a DICOM file, an archive and a name that cannot be printed, in images and labels."""
    data = shutil.copytree(cohort, tmp_path / "data")
    for folder in ("images", "labels"):
        (data / folder / "Mueller_Hans_1950").mkdir()
        for name in ("Mueller_Hans.dcm", "Mueller_Hans.zip", "Mueller\x07Hans.nii.gz"):
            (data / folder / name).write_bytes(b"x")
    found = open_cohort(data, pseudonyms=tmp_path / "key.csv")
    said = " ".join(str(vars(problem)) for problem in found.problems)
    assert "a folder in images/" in said and "Mueller" not in said
    assert "Mueller" in " ".join(str(vars(problem)) for problem in open_cohort(data).problems)


def test_two_processes_that_share_a_key_give_no_pseudonym_twice(tmp_path):
    """Three at a time, with twenty names each."""
    key = tmp_path / "key.csv"
    command = (
        "import sys; from semisam_o1.data.pseudonyms import renamed; "
        "[renamed(sys.argv[1], {f'{sys.argv[2]}_{n}'}, [], []) for n in range(20)]"
    )
    running = [subprocess.Popen([sys.executable, "-c", command, str(key), f"name{n}"]) for n in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    found = Pseudonyms(key).key
    assert len(found) == len(set(found.values())) == 60


@pytest.mark.parametrize(
    "text", ["", "name,other\na,b\n", "case,pseudonym\na,x\nb,x\n", "case,pseudonym\na,../x\n", "case,pseudonym\na\n"]
)
def test_a_key_that_cannot_serve_is_refused(tmp_path, text):
    (tmp_path / "key.csv").write_text(text)
    with pytest.raises(DatasetError, match="pseudonyms .*key.csv"):
        Pseudonyms(tmp_path / "key.csv")


def test_reasons_name_the_case_alone(cohort, tmp_path):
    """A scan that cannot be read: its path and file name are in no reason."""
    data = shutil.copytree(cohort, tmp_path / "data")
    (data / "images" / "MUELLER_01.nrrd").write_bytes(b"NRRD0004\ntype: float\n")
    found = open_cohort(data, pseudonyms=tmp_path / "key.csv")
    (reason,) = found.set_aside.values()
    assert "MUELLER" not in reason and list(found.set_aside)[0].startswith("scan_")


def test_a_listed_scan_without_an_image_has_a_pseudonym_too(cohort, tmp_path):
    data = shutil.copytree(cohort, tmp_path / "data")
    (data / "images" / "MUELLER_01.nrrd").unlink()
    found = open_cohort(data, pseudonyms=tmp_path / "key.csv")
    assert found.set_aside and "MUELLER" not in f"{found.set_aside} {found.problems}"


def test_the_store_of_features_has_no_paths(made):
    for path in (made / "run" / "features").glob("*.h5"):
        with h5py.File(path) as file:
            assert "ANNA" not in str(dict(file.attrs))
