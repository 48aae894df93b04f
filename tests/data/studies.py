"""Small NIfTI data sets, sound ones and ways to spoil them."""

import nibabel
import numpy as np

SHAPE = (6, 7, 8)


def write_nifti(path, array, affine=None):
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def voxels(seed=0):
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def organ(classes=3):
    label = np.zeros(SHAPE, np.uint8)
    for k in range(1, classes):
        label[2:4, 2:4, 1 + k] = k
    return label


def study(root, images, labelled="", **lists):
    """A NIfTI data set of cases with one-letter names, some `labelled`; lists by their file's stem."""
    for folder, cases in (("images", images), ("labels", labelled)):
        (root / folder).mkdir(parents=True)
        for number, name in enumerate(cases):
            write_nifti(root / folder / f"{name}.nii.gz", organ() if folder == "labels" else voxels(number))
    for name, text in lists.items():
        (root / f"{name}.txt").write_text(text)
    return root


def names(cases):
    return [case.name for case in cases]


def image_of(root, name="a"):
    return root / "images" / f"{name}.nii.gz"


def label_of(root, name="a"):
    return root / "labels" / f"{name}.nii.gz"


def halve(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def with_value(value, array=None):
    array = voxels() if array is None else array.astype(np.float32)
    array[1, 2, 3] = value
    return array


def flattened(array):
    """All but one voxel set to zero: nothing varies between the percentiles that clip intensities."""
    array = np.zeros_like(array)
    array[1, 1, 1] = 5
    return array


def moved(by):
    affine = np.eye(4)
    affine[0, 3] = by
    return affine
