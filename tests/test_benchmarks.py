"""The benchmarks measure what they say: a row is of its own template, and a changed scan is what its row names."""

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from benchmarks import corrected_runs, corrections, cropped, damaged, rivals, turned
from benchmarks.__main__ import main
from benchmarks.pools import Rows, Scan, fill, propagated_dice
from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.grids import Grid
from semisam_o1.data.phantoms import write_demo_data
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.features import FeatureStore
from semisam_o1.tables import TEXT, read_rows
from tests.jobs import small

KEYS = {"set": TEXT, "method": TEXT, "case": TEXT}


def test_another_template_gives_other_labels(phantom_dir, tmp_path):
    cohort = open_cohort(phantom_dir, check=False)
    store = FeatureStore(tmp_path, mind(), 4.0)
    (template,), (other, case) = cohort.templates, cohort.pool
    fill(store, cohort, [template, other, case], 4.0)
    alone = replace(cohort, templates=(replace(other, split="template"),))
    first, second = (propagated_dice(store, c, [case], label_fusion=False) for c in (cohort, alone))
    assert first != second and min(*first, *second) > 0.3


def bench(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
    main()


@pytest.mark.slow
def test_a_killed_table_is_continued(phantom_dir, tmp_path, monkeypatch, capsys):
    table = tmp_path / "table.csv"
    command = ("propagation", phantom_dir, "--voxels", 3000, "--rivals", "--table", table, "--only", "default", "copy")
    bench(monkeypatch, *command)
    rows = table.read_text().splitlines()
    assert len(rows) == 1 + 2 * 3  # two cases: the first pass alone, with label fusion, copied labels
    assert {row["method"] for row in read_rows(table, KEYS)} == {"default", "default, first pass alone", "copy"}
    changed = [row.replace(",copy,", ",other,") for row in rows]
    changed[1] = ",".join([*changed[1].split(",")[:-2], "0.1234", "5.0"])
    table.write_text("\n".join(changed) + "\n")
    capsys.readouterr()
    bench(monkeypatch, *command)
    found = table.read_text().splitlines()
    assert found[: len(rows)] == changed and len(found) == len(rows) + 2  # only `copy` was run again
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("default, first pass alone")]
    assert "0.123" in line  # the worst of the two, read from the table


@pytest.mark.slow
def test_parts_are_left_out(phantom_dir, tmp_path, monkeypatch):
    table = tmp_path / "table.csv"
    names = ("default", "the template's label", "no vote guard", "no search", "no find")
    bench(
        monkeypatch,
        *("propagation", phantom_dir, "--voxels", 3000, "--rivals", "--ablation", "--table", table, "--only", *names),
    )
    dice = {}
    for row in read_rows(table, KEYS | {"dice": ".4f"}):
        dice.setdefault(row["method"], []).append(row["dice"])
    assert len(dice) == 2 * 4 + 1 and all(len(values) == 2 for values in dice.values())
    assert dice["the template's label counts once"] != dice["default"]


def test_rows_replace_those_of_the_same_keys(tmp_path):
    columns = {"case": TEXT, "dice": ".2f"}
    one, other = (Rows(tmp_path / "rows.csv", columns, ["case"]) for _ in range(2))
    one.add([{"case": "a", "dice": 0.1}])
    other.add([{"case": "b", "dice": 0.2}])
    one.add([{"case": "a", "dice": 0.3}])
    assert (tmp_path / "rows.csv").read_text() == "case,dice\na,0.30\nb,0.20\n"


def box(*spacing, axes=(0, 1, 2)) -> Scan:
    """A scan with one bright voxel, stored with axes that run to the left, the front and the feet."""
    image = np.zeros((6, 5, 4), np.float32)
    image[1, 3, 2] = 1
    affine = np.diag([-spacing[0], spacing[1], -spacing[2], 1.0])
    affine[:3, 3] = (10, -20, 30)
    return Scan(image, (image > 0).astype(int), affine)


def place(scan: Scan, values: np.ndarray) -> np.ndarray:
    """World position of the largest value, mm, relative to the middle of the scan."""
    middle = (np.array(values.shape) - 1) / 2
    return scan.affine[:3, :3] @ (np.unravel_index(values.argmax(), values.shape) - middle)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("times", [1, 2])
def test_right_turns_are_rotations_about_the_middle(axis, times):
    scan = box(1.0, 2.0, 5.0)
    found = turned.right_turned(scan, axis, times)
    matrix = np.rint(Rotation.from_rotvec(np.eye(3)[axis] * np.pi / 2 * times).as_matrix())
    flips = np.diag(np.sign(np.diag(scan.affine)[:3]))
    for values in (found.image, found.label):
        assert place(found, values) == pytest.approx(flips @ matrix @ flips @ place(scan, scan.image))
    middles = [s.affine[:3] @ [*((np.array(s.image.shape) - 1) / 2), 1] for s in (scan, found)]
    assert middles[0] == pytest.approx(middles[1])
    assert np.sign(np.diag(found.affine)).tolist() == np.sign(np.diag(scan.affine)).tolist()


def test_rotated_content_is_all_there_and_lowest_outside():
    scan = box(2.0, 2.0, 2.0)
    scan = scan._replace(image=scan.image - 3)
    quarter = Rotation.from_rotvec([0, 0, np.pi / 2]).as_matrix()
    found, exact = turned.rotated(scan, quarter), turned.right_turned(scan, 2, 1)
    np.testing.assert_allclose(found.image, exact.image, atol=1e-4)
    np.testing.assert_array_equal(found.label, exact.label)
    np.testing.assert_allclose(found.affine, exact.affine)
    tilted = turned.rotated(scan, Rotation.from_rotvec([0.4, 0.5, -0.3]).as_matrix())
    assert tilted.image.min() == -3 and min(tilted.image.shape) > 4 and tilted.image.sum() < scan.image.sum()


def test_the_best_cut_loses_the_fewest_voxels_of_other_classes():
    label = np.zeros((10, 10, 10), int)
    label[7:9, 2:8, 2:8] = 2  # may go by itself, from the end of the first axis
    label[2:7, 2:8, 2:8] = 1
    found = cropped.best_cut(label)
    assert (found.channel, found.part[0], found.lost) == (2, slice(0, 7), 0)
    part = cropped.cropped(Scan(label, label, np.eye(4)), (slice(3, 10), slice(0, 10), slice(2, 10)))
    assert part.label.shape == (7, 10, 8) and part.affine[:3, 3].tolist() == [3, 0, 2]
    assert cropped.best_cut(np.ones((4, 4, 4), int)) is None


def damaged_copies(seed=0):
    image = np.random.default_rng(seed).uniform(0, 100, (20, 22, 24)).astype(np.float32)
    image[8, 9, 10] = 1000
    scan = Scan(image, (image == 1000).astype(int), np.diag([2.0, -3.0, 4.0, 1.0]))
    found = damaged.damages(scan, np.random.RandomState(seed))
    return scan, {kind: copy for kind, _, copy in found}


def test_damaged_content_stays_in_its_place():
    scan, copies = damaged_copies()
    assert list(copies) == ["padded", "saturated", "cut", "blurred", "noisy"]
    for kind, copy in copies.items():
        (voxel,) = np.argwhere(copy.label)
        assert copy.image.shape == copy.label.shape and copy.label.sum() == 1, kind
        assert (copy.affine @ [*voxel, 1]).tolist() == (scan.affine @ [8, 9, 10, 1]).tolist(), kind
    assert np.prod(copies["padded"].image.shape) > scan.image.size > copies["cut"].image.size


def test_intensities_are_clipped_blurred_and_noisy():
    scan, copies = damaged_copies()
    assert copies["saturated"].image.max() == pytest.approx(np.quantile(scan.image, 0.9))
    assert copies["blurred"].image.std() < 0.5 * scan.image.std()
    added = copies["noisy"].image - scan.image
    assert 0.2 < added.std() / scan.image.std() < 0.5 and abs(added.mean()) < 0.1 * added.std()


def test_labels_that_nobody_can_tell_are_no_errors():
    row = {"dice": 0.7, "predicted": 0.75}
    line = damaged.summary([row, row | {"predicted": 0.5}, row | {"predicted": None}, row | {"predicted": None}])
    assert line.split() == ["4", "0.700", "0.625", "0.125", "0.200", "0.50", "0.50"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), [("turned", 8), ("cropped", 3), ("damaged", 7)])
def test_spoiled_pools_end_in_a_table(name, rows, phantom_dir, tmp_path, monkeypatch):
    table = tmp_path / "table.csv"
    command = (name, phantom_dir, "--cases", 1, "--voxels", 1000, "--table", table, "--work", tmp_path / "work")
    bench(monkeypatch, *command)
    found, text = read_rows(table, {"case": TEXT, "kind": TEXT}), table.read_text()
    assert len({(row["case"], row["kind"]) for row in found}) == rows
    table.unlink()
    bench(monkeypatch, *command)  # from the first pass that is kept
    assert table.read_text() == text


def test_own_spacing_is_coarsened_from_the_finest_axes(phantom_dir, monkeypatch):
    cohort = open_cohort(phantom_dir, check=False)
    affine = np.array([[0, -1.5, 0, 0], [1.5, 0, 0, 0], [0, 0, 10, 0], [0, 0, 0, 1.0]])
    monkeypatch.setattr(type(cohort), "grid", lambda *_: Grid(affine, (100, 200, 10)))
    monkeypatch.setattr(type(cohort), "data_box", lambda *_: (slice(0, 100), slice(0, 200), slice(0, 10)))
    assert rivals.own_spacing(cohort, cohort.pool[0], 200000) == (1.5, 1.5, 10.0)
    coarser = rivals.own_spacing(cohort, cohort.pool[0], 50000)
    assert coarser[0] == coarser[1] == pytest.approx(3.0, rel=0.02) and coarser[2] == 10.0


@pytest.mark.slow
def test_corrections_go_on_from_the_rows_that_are_there(tmp_path, monkeypatch, capsys):
    data = write_demo_data(tmp_path / "data", cases=9, shape=(24, 24, 20), spacing=2.0)
    table = tmp_path / "table.csv"
    command = ("corrections", data, "--points", 1, 2, "--draws", 1, "--voxels", 3000, "--table", table)
    command += ("--work", tmp_path / "work", "--strategies", "most typical", "worst predicted", "random")
    bench(monkeypatch, *command)
    rows, said = read_rows(table, corrections.COLUMNS), capsys.readouterr().out
    at = {(row["strategy"], row["labelled"]): row["dice"] for row in rows if row["judges"] == "pool"}
    assert {key[0] for key in at} == {"most typical", "worst predicted", "random 1"}
    assert at["most typical", "1"] == at["worst predicted", "1"] == at["random 1", "1"]
    judges = {of: {row["case"] for row in rows if row["judges"] == of} for of in ("pool", "test")}
    assert (len(judges["pool"]), len(judges["test"])) == (2, 2)  # two of the pool's five scans, and the test list
    assert len(rows) == 3 * 2 * 4
    assert all(row["plain"] == row["dice"] for row in rows if row["labelled"] == "1")  # nothing is learned from none
    table.write_text("".join(line for line in table.read_text().splitlines(keepends=True) if ",2," not in line))
    bench(monkeypatch, *command)
    again = read_rows(table, corrections.COLUMNS)
    assert sorted(again, key=str) == sorted(rows, key=str) and capsys.readouterr().out == said


@pytest.mark.slow
def test_corrections_need_no_test_list(phantom_dir, tmp_path, monkeypatch):
    data = shutil.copytree(phantom_dir, tmp_path / "data")
    (data / "test.txt").write_text("")
    table = tmp_path / "table.csv"
    command = ("corrections", data, "--points", 1, "--draws", 1, "--voxels", 3000, "--table", table)
    bench(monkeypatch, *command, "--strategies", "random")
    assert {row["judges"] for row in read_rows(table, corrections.COLUMNS)} == {"pool"}


@pytest.mark.slow
def test_whole_runs_go_on_from_the_rows_that_are_there(phantom_dir, tmp_path, monkeypatch, capsys):
    """With two labelled scans the judge's label is another one; a row that is there starts no run."""
    table = tmp_path / "t.csv"
    command = ["corrected_runs", phantom_dir, "--points", 1, 2, 9, "--no-ceiling", "--table", table]
    command += ["--work", tmp_path / "w", "--set", *small(num_rounds=0)[1:]]
    bench(monkeypatch, *command)
    one, two = (row for row in read_rows(table, corrected_runs.COLUMNS) if row["judges"] == "pool")
    assert (one["labelled"], two["labelled"], one["case"]) == ("1", "2", two["case"])
    assert one["handed_out"] == one["round_0"] != two["round_0"] == two["handed_out"]
    monkeypatch.setattr(corrected_runs, "start", None)
    said = capsys.readouterr().out
    bench(monkeypatch, *command)
    assert capsys.readouterr().out == said
