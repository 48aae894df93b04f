"""DICOM series that tests write."""

import SimpleITK as sitk


def write_series(image, folder, places=None, series="1.2.3.4"):
    """A DICOM series of MR slices of a SimpleITK image; ``places``: where each begins, mm, if not where it does."""
    folder.mkdir(exist_ok=True)
    direction = image.GetDirection()
    axes = "\\".join(f"{direction[n]:.8f}" for n in (0, 3, 6, 1, 4, 7))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number in range(image.GetDepth()):
        plane = image[:, :, number]
        place = image.TransformIndexToPhysicalPoint((0, 0, number)) if places is None else places[number]
        tags = {
            "0008|0060": "MR", "0008|0016": "1.2.840.10008.5.1.4.1.1.4", "0020|000d": "1.2.3", "0020|000e": series,
            "0008|0018": f"{series}.{number + 1}", "0020|0013": str(number + 1), "0020|0037": axes,
            "0020|0032": "\\".join(f"{x:.6f}" for x in place), "0018|0050": f"{image.GetSpacing()[2]}",
        }  # fmt: skip
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}_{number:03d}.dcm"))
        writer.Execute(plane)
