"""Phantom cohorts for all tests, small enough that every stage takes seconds on them."""

import os

# Before torch is imported, and for every process that a test starts: another number of threads, other last digits.
os.environ["OMP_NUM_THREADS"] = "1"

import h5py
import pytest
import torch

from semisam_o1.data.phantoms import make_phantom, write_demo_data

SHAPE, SPACING = (32, 32, 24), 1.5  # the phantom's field of view, coarser than the demo's


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory):
    """Five NIfTI phantoms with lists (template and two pool cases, one val, one test); not to be written to.

    Stored as RAS, RAS, 3 mm slices, LAS and oblique, in this order.
    """
    return write_demo_data(tmp_path_factory.mktemp("phantoms"), cases=5, shape=SHAPE, spacing=SPACING)


@pytest.fixture(scope="session")
def phantom_h5_dir(tmp_path_factory):
    """The same five cases in the published HDF5 layout, all on the plain grid; not to be written to."""
    root = tmp_path_factory.mktemp("phantoms_h5")
    (root / "data").mkdir()
    names = [f"phantom_{number:02d}" for number in range(5)]
    for number, name in enumerate(names):
        image, label = make_phantom(number, SHAPE, SPACING)
        with h5py.File(root / "data" / f"{name}.h5", "w") as file:
            file.create_dataset("image", data=(image - image.mean()) / image.std(), compression="gzip")
            file.create_dataset("label", data=label, compression="gzip")
    (root / "train.txt").write_text("\n".join(names[:3]), encoding="utf-8")  # no newline at the end, as published
    (root / "val.txt").write_text(names[3] + "\n", encoding="utf-8")
    (root / "test.txt").write_text(names[4] + "\n", encoding="utf-8")
    return root
