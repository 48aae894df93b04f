"""Tests in a real MONAI Label server. `make clinic` makes its environment; without that they are skipped."""

from pathlib import Path

import pytest

from tests.clinic.server import CLINIC


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            if not (CLINIC / "monailabel").exists():
                item.add_marker(pytest.mark.skip(reason="MONAI Label is not installed: make clinic"))
