"""Numbers of the published code, point by point; see the README beside the golden files."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden files in {GOLDEN}")


def pytest_collection_modifyitems(items):
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytestmark)


@pytest.fixture(scope="session")
def golden():
    """golden("dtc_loss") -> the arrays of a file by name."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / "paper" / f"{name}.npz") as file:
            return {key: file[key] for key in file}

    return load


@pytest.fixture(scope="session")
def inputs():
    """The module that makes the golden files' inputs from seeds."""
    spec = importlib.util.spec_from_file_location("golden_inputs", GOLDEN / "paper" / "inputs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
