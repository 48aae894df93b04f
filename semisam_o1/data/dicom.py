"""Whether a folder of DICOM files is one volume: one series of parallel slices at even distances.

ITK takes the first of several series, spreads slices evenly over a gap, and straightens a tilted gantry, with no more
than a warning.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from semisam_o1.data.findings import Fault

UNEVEN = 0.05  # of the distance between slices, by which one may lie elsewhere


def refuse_uneven_series(folder: Path) -> None:
    """Refuse a folder of DICOM files that is not one volume.

    Raises:
        Fault: it has several series, or slices at uneven distances or that lie oblique to each other.
    """
    import itk

    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(True)
    names.AddSeriesRestriction("0008|0021")  # as MONAI's reader
    names.SetDirectory(str(folder))
    series = names.GetSeriesUIDs()
    if len(series) > 1:
        remedy = "put each series into a folder of its own"
        raise Fault(f"{len(series)} DICOM series in one folder", "one series", remedy)
    if series:
        _refuse_uneven([_plane(file) for file in names.GetFileNames(series[0])])


def _plane(file: str) -> tuple[np.ndarray, np.ndarray]:
    """Where a slice begins, mm, and the direction that is normal to it: (3,) each."""
    import itk

    io = itk.GDCMImageIO.New()
    io.SetFileName(file)
    io.ReadImageInformation()
    return np.array([io.GetOrigin(axis) for axis in range(3)]), np.array(io.GetDirection(2))


def _refuse_uneven(planes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Refuse planes that are no stack; for the arguments see `_plane`."""
    if len(planes) < 3:
        return
    normal = planes[0][1]
    places = np.array(sorted((place for place, _ in planes), key=lambda place: float(place @ normal)))
    steps = np.diff(places, axis=0)
    along, typical = steps @ normal, np.median(steps @ normal)
    if np.abs(along - typical).max() > UNEVEN * typical:
        found = f"DICOM slices {along.min():.3g} to {along.max():.3g} mm apart"
        raise Fault(found, "even distances", "send the whole series, or resample it to even distances")
    if np.linalg.norm(steps - along[:, None] * normal, axis=1).max() > UNEVEN * typical:
        found = "DICOM slices that are shifted against each other (a tilted gantry)"
        raise Fault(found, "slices straight above each other", "resample the series to a straight volume")
