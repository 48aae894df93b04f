import pytest

from tests.data.studies import study


@pytest.fixture
def root(tmp_path):
    """Template ``t``, pool ``a`` and ``b``, test ``z``, all sound and labelled."""
    return study(tmp_path, "tabz", "tabz", train="t\na\nb\n", test="z\n")
