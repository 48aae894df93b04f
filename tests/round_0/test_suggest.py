"""Which scan to outline: hand-worked distances, and phantoms among which one is the odd one out."""

import html
import shutil

import nibabel
import numpy as np
import pytest

from semisam_o1.cli import main
from semisam_o1.data import ScanReader
from semisam_o1.data.phantoms import make_phantom, write_demo_data
from semisam_o1.round_0.suggest import Suggestion, coverage, reason, suggest_template, write_page
from semisam_o1.types import Case, DatasetError

DISTANCES = np.array([[0, 1, 5, 9], [1, 0, 2, 9], [5, 2, 0, 4], [9, 9, 4, 0]], float)


def test_the_scan_in_the_middle_covers_best():
    np.testing.assert_allclose(coverage(DISTANCES), [15 / 4, 12 / 4, 11 / 4, 22 / 4])


def test_beside_one_given_the_scan_it_serves_worst_is_sought():
    found = coverage(DISTANCES, [1])
    # distances to scan 1: 1, 0, 2, 9; each candidate shortens some of them
    np.testing.assert_allclose(found, [(0 + 0 + 2 + 9) / 4, 12 / 4, (1 + 0 + 0 + 4) / 4, (1 + 0 + 2 + 0) / 4])
    assert found.argmin() == 3


def test_the_diagonal_does_not_count():
    np.testing.assert_allclose(coverage(DISTANCES + 7 * np.eye(4)), coverage(DISTANCES))


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    root = write_demo_data(tmp_path_factory.mktemp("suggest") / "data", 4, shape=(24, 24, 20), spacing=2.0)
    for label in (root / "labels").glob("*"):
        label.unlink()
    for name in ("train.txt", "val.txt", "test.txt"):
        (root / name).unlink(missing_ok=True)
    (root / "images" / "broken.nii.gz").write_bytes(b"not a scan")
    return root


@pytest.mark.slow
def test_the_command_needs_no_label_and_sets_a_broken_scan_aside(unlabelled, tmp_path, capsys, caplog):
    assert main(["suggest-template", str(unlabelled), "--top", "2", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    ranks = [line.split() for line in lines if line.split()[0] in ("1", "2")]
    assert len(ranks) == 2 and float(ranks[0][1]) <= float(ranks[1][1])
    assert "broken" in caplog.text and "broken" not in "".join(lines)
    page = (tmp_path / "suggestion.html").read_text()
    assert page.count("<img") == 2 and ranks[0][2] in page and "mean distance" in page

    first = ranks[0][2]
    again = ["suggest-template", str(unlabelled), "--given", first, "--top", "9", "--output", str(tmp_path)]
    assert main(again) == 0
    assert first not in [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:-1]]


def test_a_scan_without_one_usable_intensity_is_set_aside(unlabelled, tmp_path, caplog):
    data = shutil.copytree(unlabelled, tmp_path / "data")
    image = nibabel.load(data / "images" / "phantom_02.nii.gz")
    nothing = nibabel.Nifti1Image(np.full(image.shape, np.nan, np.float32), image.affine)
    nibabel.save(nothing, data / "images" / "phantom_02.nii.gz")
    found = suggest_template(data, tmp_path / "out", top=9, feature_voxels=5000)
    assert sorted(one.case for one in found) == ["phantom_00", "phantom_01", "phantom_03"]
    assert np.isfinite([one.distance for one in found]).all() and "case phantom_02: has no usable" in caplog.text


def test_a_given_scan_is_not_suggested_again(unlabelled, tmp_path):
    found = suggest_template(unlabelled, tmp_path, top=9, given=["phantom_01"], feature_voxels=5000)
    assert [one.rank for one in found] == [1, 2, 3]
    assert sorted(one.case for one in found) == ["phantom_00", "phantom_02", "phantom_03"]


def test_a_given_case_that_is_not_there_is_named(unlabelled, tmp_path, capsys):
    with pytest.raises(DatasetError, match="nobody"):
        suggest_template(unlabelled, tmp_path, given=["nobody"])
    assert main(["suggest-template", str(unlabelled), "--given", "nobody", "--output", str(tmp_path)]) != 0
    assert "nobody" in capsys.readouterr().err


def test_a_scan_may_be_less_central_than_the_median():
    assert "16% above that of the median scan" in reason(Suggestion(9, "far", 0.58, "near"), np.array([0.5]))


def test_names_on_the_page_are_text(tmp_path):
    evil = "<script>x & 'y'\"</script>"
    image = tmp_path / "image.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((8, 9, 10), np.float32), np.eye(4)), image)
    found = [Suggestion(1, evil, 0.25, f"{evil} far")]
    write_page(tmp_path / "page.html", found, [Case(evil, image, None, "pool")], np.array([0.5]), [evil], ScanReader())
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    said = " ".join(html.unescape(text).split())
    for part in (
        f"Which scan to outline beside {evil}</h1>",
        "These of 1 scans are the most similar",
        f"1. <b>{evil}</b>: mean distance to the other scans 0.2500, 50% below that of the median scan (0.5000)",
        f"least similar: {evil} far</figcaption>",
    ):
        assert part in said
    assert text.count('src="data:image/png;base64,') == 1


@pytest.mark.slow
def test_settings_of_scans_are_those_of_a_run(tmp_path, capsys):
    """Two channels of each scan, padded with one value, and a header whose two forms differ."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    for number in range(3):
        image, _ = make_phantom(number, (24, 24, 20), 2.0)
        for channel in (0, 1):
            file = nibabel.Nifti1Image(np.pad(image, 4, constant_values=-9999), np.diag([2.0, 2, 2, 1]))
            file.set_qform(np.diag([2.0, 2, 2, 1]), 1)
            nibabel.save(file, root / "images" / f"s{number}_{channel:04d}.nii.gz")
    (root / "train.txt").write_text("s0\ns1\ns2\n")
    command = ["suggest-template", str(root), "--output", str(tmp_path / "out")]
    assert main(command) == 2 and "--set channel" in capsys.readouterr().err
    settings = ["channel=1", "nifti_form=qform", "feature_voxels=3000", "window=[0,300]"]
    assert main([*command, "--set", *settings]) == 0
    assert "s1" in capsys.readouterr().out
    for wrong, said in (("max_iterations=5", "knows image_key"), ("window=[1]", "window"), ("channel", "ID=VALUE")):
        assert main([*command, "--set", wrong]) == 2 and said in capsys.readouterr().err
