"""Which folders of DICOM files are read, as MONAI Label sends them."""

import numpy as np
import pytest
import SimpleITK as sitk

from semisam_o1.data import ScanReader
from semisam_o1.data.findings import Fault
from tests.dicom import write_series

SLICES = 6


def stack():
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 900, (SLICES, 12, 10)).astype(np.int16))
    image.SetSpacing((1.0, 1.5, 2.0))
    image.SetOrigin((3.0, -4.0, 5.0))
    return image


@pytest.mark.parametrize("order", [1, -1])
def test_a_whole_series_is_read_in_its_place(tmp_path, order):
    image = stack()
    places = [image.TransformIndexToPhysicalPoint((0, 0, number)) for number in range(SLICES)]
    write_series(image, tmp_path / "a", places[::order])
    found = ScanReader().open(tmp_path / "a")
    assert found.grid.shape == (10, 12, SLICES)
    np.testing.assert_allclose(np.abs(np.diag(found.grid.affine)[:3]), (1.0, 1.5, 2.0))
    np.testing.assert_allclose(found.grid.affine[:3, 3], (-3.0, 4.0, 5.0))


def test_positions_are_even_as_far_as_they_are_rounded(tmp_path):
    places = [(3.0, -4.0, round(5.0 + 2.0 * number + 0.02 * (-1) ** number, 2)) for number in range(SLICES)]
    write_series(stack(), tmp_path / "a", places)
    assert ScanReader().open(tmp_path / "a").grid.shape[2] == SLICES


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (lambda n: (0, 0, 2.0 * n + 4.0 * (n > 2)), "DICOM slices 2 to 6 mm apart; expected even distances"),
        (lambda n: (0, 1.0 * n, 2.0 * n), "tilted gantry"),
        (lambda n: (0, 0, 2.0 * (n // 2)), "DICOM slices 0 to 2 mm apart"),
    ],
)
def test_slices_that_are_no_even_stack_are_refused(tmp_path, place, said):
    write_series(stack(), tmp_path / "a", [place(number) for number in range(SLICES)])
    with pytest.raises(Fault, match=said):
        ScanReader().open(tmp_path / "a")


def test_several_series_in_a_folder_are_refused(tmp_path):
    write_series(stack(), tmp_path / "a")
    write_series(stack(), tmp_path / "a", series="1.2.3.5")
    with pytest.raises(Fault, match="2 DICOM series in one folder; expected one series: put each series"):
        ScanReader().open(tmp_path / "a")
