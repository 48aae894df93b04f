"""What holds for every list and every setting, tried on many that Hypothesis makes up."""

import contextlib
import io
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from monai.bundle import ConfigParser

from semisam_o1.cli import main
from semisam_o1.data.datasets import open_cohort
from semisam_o1.literals import as_config
from semisam_o1.types import DatasetError
from tests.hostile.settings import BAD
from tests.hostile.trials import OTHER, POOL, TEMPLATE, TEST, VAL

LISTS = ("train.txt", "val.txt", "test.txt")
KNOWN = [TEMPLATE, POOL, OTHER, VAL, TEST]
often = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
# A large number of classes or voxels only costs time.
sized = some.one_of(some.none(), some.booleans(), some.integers(-9, 9), some.floats(-9, 9), some.text())
lines = some.one_of(some.sampled_from(KNOWN), some.sampled_from([f"{name}.nii.gz" for name in KNOWN]), some.text())
texts = some.lists(lines, max_size=12).map(lambda found: "\n".join(found).encode("utf-8", "surrogateescape"))
contents = some.one_of(some.none(), texts, some.binary(max_size=60))
plain = some.one_of(some.none(), some.booleans(), some.integers(), some.floats(), some.text())
values = some.recursive(sized, lambda inner: some.lists(inner) | some.dictionaries(some.text(), inner), max_leaves=5)


@pytest.fixture(scope="module")
def data(phantom_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("properties") / "data"
    shutil.copytree(phantom_dir, folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    """A made-up setting may be a path: what is written there stays out of the checkout."""
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        yield


@often
@given(found=some.tuples(contents, contents, contents))
def test_any_lists_give_a_cohort_or_an_error_for_users(data, found):
    for name, content in zip(LISTS, found):
        (data / name).unlink(missing_ok=True)
        if content is not None:
            (data / name).write_bytes(content)
    try:
        cohort = open_cohort(data, check=False, need_pool=False)
    except DatasetError as error:
        assert str(error).isascii() or str(error).encode()
        assert len(str(error).splitlines()) < 150
        return
    names = [case.name for case in cohort.cases]
    assert len(set(names)) == len(names) and set(names) <= set(KNOWN)
    assert all(case.image.parent == data / "images" for case in cohort.cases)


@often
@given(value=some.recursive(plain.filter(lambda value: value == value), some.lists, max_leaves=5))
def test_data_stays_data_in_a_config(value):
    assert ConfigParser({"a": as_config(value)}).get_parsed_content("a") == value


@often
@given(
    id=some.one_of(some.sampled_from(sorted(BAD)), some.text()), value=some.one_of(values.map(json.dumps), some.text())
)
def test_any_setting_is_taken_or_refused_in_a_line(phantom_dir, id, value):
    if value.strip().strip('"').startswith("$"):
        return  # a value after --set may be code
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert main(["validate", str(phantom_dir), "--device", "cpu", "--set", f"{id}={value}"]) in (0, 2)
    assert "Traceback" not in said.getvalue() and said.getvalue().count("\n") < 150
