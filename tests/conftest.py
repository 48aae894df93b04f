"""Phantom cohorts and jobs for all tests, small enough that every stage takes seconds on them."""

import os

# Before torch is imported, and for every process that a test starts: another number of threads, other last digits.
os.environ["OMP_NUM_THREADS"] = "1"

import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from semisam_o1.cli import main
from semisam_o1.data.phantoms import make_phantom, write_demo_data
from semisam_o1.encoders import SAMMed3DEncoder
from tests.jobs import after_round_0, small, start

# The same examples every time; --hypothesis-profile=default draws new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")

SHAPE, SPACING = (32, 32, 24), 1.5  # the phantom's field of view, coarser than the demo's


def pytest_collection_modifyitems(items):
    """Coverage leaves slow tests out: tracing costs two fifths of their time, and other tests reach the same lines."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker("no_cover")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(name, make): the folder ``name``, filled by make(folder) once for all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name: str, make) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def phantom_dir(made_once):
    """Five NIfTI phantoms with lists (template and two pool cases, one val, one test); not to be written to.

    Stored as RAS, RAS, 3 mm slices, LAS and oblique, in this order.
    """
    return made_once("phantoms", lambda root: write_demo_data(root, cases=5, shape=SHAPE, spacing=SPACING))


@pytest.fixture(scope="session")
def phantom_h5_dir(made_once):
    """The same five cases in the published HDF5 layout, all on the plain grid; not to be written to."""

    def make(root: Path) -> None:
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

    return made_once("phantoms_h5", make)


@pytest.fixture(scope="session")
def run(phantom_dir, made_once) -> Path:
    """A finished run by the command line; not to be written to."""

    def make(folder: Path) -> None:
        command = ["run", str(phantom_dir), "--output", str(folder / "run"), "--device", "cpu", *small()]
        assert main(command) == 0

    return made_once("job", make) / "run"


@pytest.fixture
def begun(run, tmp_path) -> Path:
    """`run` as it was after round 0: a run with other settings of the rounds goes on there."""
    return after_round_0(run, tmp_path / "begun")


@pytest.fixture(scope="session")
def process():
    """process(arguments, out, err): the command line in a process of its own, that need not import everything first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["monai.bundle", "semisam_o1.job", "semisam_o1.round_0", "semisam_o1.refinement"])

    def begin(arguments: list[str], out: Path, err: Path) -> multiprocessing.Process:
        begun = context.Process(target=start, args=(arguments, out, err))
        begun.start()
        return begun

    begin(["--version"], Path(os.devnull), Path(os.devnull)).join()  # by then all is imported
    return begin


@pytest.fixture(scope="session")
def sam_weights(made_once) -> Path:
    """Random weights in the form of the released checkpoint: for the plumbing alone."""

    def make(folder: Path) -> None:
        state = SAMMed3DEncoder().state_dict()
        state = {f"image_encoder.{name}": value for name, value in state.items()}
        torch.save({"model_state_dict": state}, folder / "sam_med3d_turbo.pth")

    return made_once("weights", make) / "sam_med3d_turbo.pth"


@pytest.fixture(scope="session")
def fail(made_once) -> Path:
    """The library of `hostile/fail.c`, which makes calls fail for the process that preloads it."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler, cc")

    source = Path(__file__).parent / "hostile" / "fail.c"

    def make(folder: Path) -> None:
        subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "fail.so", source, "-ldl"], check=True)

    return made_once("fail", make) / "fail.so"
