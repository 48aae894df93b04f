"""A template outlined on some slices alone stops a run; whole structures do not, whatever their form."""

import numpy as np
import pytest

from semisam_o1.cli import main
from semisam_o1.data import open_cohort
from semisam_o1.data.findings import NOTE, STOPS, WARNING
from semisam_o1.data.label_shape import shape_findings
from semisam_o1.types import DatasetError
from tests.data.studies import label_of, write_nifti

SIDE = 40
X, Y, Z = np.meshgrid(*[np.arange(SIDE) - 19.5] * 3, indexing="ij")
BALL = (X**2 + Y**2 + Z**2 < 15**2).astype(int)
TUBE = ((X**2 + Y**2 < 3**2) & (abs(Z) < 16)).astype(int)
PAIR = (((abs(X) - 10) ** 2 + Y**2 + Z**2) < 6**2).astype(int)
ONE = (1.0, 1.0, 1.0)


def slices(label, axis, places):
    kept = np.zeros_like(label)
    index = [slice(None)] * 3
    for place in places:
        index[axis] = place
        kept[tuple(index)] = label[tuple(index)]
    return kept


def severities(label, spacing=ONE):
    return [finding.severity for finding in shape_findings(label, spacing, {})]


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize(("every", "said"), [(2, "every 2nd slice"), (3, "every 3rd slice"), (7, "every 7th slice")])
def test_every_nth_slice(axis, every, said):
    found = shape_findings(slices(BALL, axis, range(6, 35, every)), ONE, {1: "organ"})
    assert [finding.severity for finding in found] == [STOPS]
    assert found[0].found.startswith(f"organ is outlined only on {said}") and "label_shape=trust" in found[0].remedy


def test_single_slices_far_from_each_other():
    assert severities(slices(BALL, 2, (8, 13, 21, 30))) == [STOPS]


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("block", [range(18, 21), range(16, 24), range(12, 28)])
def test_a_block_of_slices(axis, block):
    (found,) = shape_findings(slices(BALL, axis, block), ONE, {})
    assert found.severity == STOPS and f"a block of {len(block)} slices" in found.found


def test_one_flat_end_is_a_warning_and_the_end_of_the_image_is_none():
    half = slices(BALL, 1, range(20))
    (found,) = shape_findings(half, ONE, {})
    assert found.severity == WARNING and "cut flat along the second axis" in found.found
    assert severities(half[:, :20]) == []
    assert severities(BALL[:, 12:28]) == []


@pytest.mark.parametrize(
    "label", [BALL, TUBE, BALL[::1, ::1, ::4], (X**2 + Y**2 + 9 * Z**2 < 15**2).astype(int), BALL * (1 + (Z > 0))]
)
def test_whole_structures_are_fine(label):
    assert severities(label, (1, 1, 4) if label.shape[2] == 10 else ONE) == []


def test_pieces_are_said_with_their_sizes():
    assert severities(PAIR) == [NOTE]
    stray = BALL.copy()
    stray[1, 1, 1:4] = 1
    (found,) = shape_findings(stray, ONE, {1: "organ"})
    assert found.severity == WARNING and found.found == f"organ is in 2 pieces, of {BALL.sum():,}, 3 voxels"


def test_small_lesions_on_thick_slices_are_no_gaps():
    lesions = np.zeros((SIDE, SIDE, 10), int)
    for number, place in enumerate((1, 3, 5, 8)):
        lesions[4 + 8 * number : 8 + 8 * number, 11:13, place] = 1
        lesions[5 + 8 * number : 7 + 8 * number, 10:14, place] = 1
    assert STOPS not in severities(lesions, (1, 1, 5))


def test_the_run_stops_before_any_work_and_goes_on_when_told(root, tmp_path, capsys):
    for name in "tabz":
        write_nifti(label_of(root, name), np.zeros((6, 7, 8), np.uint8))
    label = np.zeros((6, 7, 8), np.uint8)
    label[1:5, 1:6, 1::3] = 1
    write_nifti(label_of(root, "t"), label)
    with pytest.raises(DatasetError, match="every 3rd slice"):
        open_cohort(root)
    assert main(["run", str(root), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert not (tmp_path / "out").exists() and "label_shape=trust" in capsys.readouterr().err
    assert open_cohort(root, label_shape="trust").num_classes == 2
