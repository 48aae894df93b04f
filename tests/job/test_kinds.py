"""Every setting is checked by kind and range before any work."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import semisam_o1
from semisam_o1.cli import main
from semisam_o1.job import Job
from semisam_o1.job.config import ACTIONS
from semisam_o1.job.kinds import KINDS, is_code, refuse_wrong
from semisam_o1.types import DatasetError
from tests.jobs import CONFIGS, bundle_process, config_of
from tests.test_docs import HEADS, ROOT, tables

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=3), st.none()), max_size=4),
)
WRONG = [
    ("seed", 1.5, "a whole number from 0 to 4,000,000,000"),
    ("seed", True, "a whole number from 0 to 4,000,000,000"),
    ("feature_voxels", 0, "a number from 500 to 1,000,000,000"),
    ("feature_voxels", float("nan"), "a number from 500 to 1,000,000,000"),
    ("num_classes", "abc", "a whole number from 2 to 250 or null"),
    ("num_classes", 10**9, "a whole number from 2 to 250 or null"),
    ("feature_spacing", 1e9, "a number from 0.01 to 100 or null"),
    ("num_rounds", 1.5, "a whole number from 0 to 1,000 or auto"),
    ("num_rounds", "two", "a whole number from 0 to 1,000 or auto"),
    ("label_fusion", 5, "true or false"),
    ("split", "bogus", "pool or val or test"),
    ("feature_crop", "middle", "center or null"),
    ("patch_size", [8, 8], "3 whole numbers from 1 to 4,096"),
    ("patch_size", [0, 8, 8], "3 whole numbers from 1 to 4,096"),
    ("flip_axes", [3], "a list of whole numbers from 0 to 2"),
    ("uncertainty_quantile", 2, "a number from 0 to 1"),
    ("overlap", 1, "a number from 0 below 1"),
    ("learning_rate", 0, "a number above 0 to 1,000"),
    ("template", 5, "a list of texts"),
    ("image_key", [], "a text"),
]


def shipped() -> dict:
    return json.loads((Path(semisam_o1.BUNDLE_ROOT) / "configs" / "train.json").read_text())


def test_every_plain_setting_has_a_kind():
    plain = [id for id, value in shipped().items() if not isinstance(value, dict) and id not in ACTIONS]
    computed = {"out_channels", "template_grids", "feature_cases", "network", "prediction_network", "teacher_start"}
    assert [id for id in plain if id not in KINDS and id not in computed] == []


def test_what_is_shipped_fits():
    for file in (CONFIGS / "train.json", *CONFIGS.glob("*/*.json")):
        refuse_wrong({id: value for id, value in json.loads(file.read_text()).items() if not is_code(value)})


def test_the_page_of_settings_names_words_and_null():
    rows = [row for table in tables(ROOT / "docs" / "settings.md") if table[0] == HEADS for row in table[1:]]
    ranges = {row[0].strip("`"): f"{row[1]} {row[3]}" for row in rows}
    for id, kind in KINDS.items():
        text = ranges[id] if "as `feature_intensities`" not in ranges[id] else ranges["feature_intensities"]
        for word in kind.words:
            assert f"`{word}`" in text, f"docs/settings.md: {id} may be {word}"
        assert not kind.null or "null" in text, f"docs/settings.md: {id} may be null"


@pytest.mark.parametrize(("id", "value", "expected"), WRONG)
def test_the_line_names_id_value_and_what_is_expected(id, value, expected):
    with pytest.raises(DatasetError) as error:
        refuse_wrong({id: value})
    assert str(error.value).startswith(f"{id} is ") and str(error.value).endswith(f"expected {expected}.")


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(DatasetError) as error:
        refuse_wrong({"seed": -1, "amp": "yes", "knn_k": 5})
    assert [line.split()[0] for line in str(error.value).splitlines()] == ["seed", "amp"]


@given(st.sampled_from(sorted(KINDS)), VALUES)
def test_a_value_fits_or_is_refused_by_name(id, value):
    if is_code(value) or KINDS[id].fits(value):
        refuse_wrong({id: value})
    else:
        with pytest.raises(DatasetError, match=f"^{id} is "):
            refuse_wrong({id: value})


@given(st.sampled_from(sorted(id for id in KINDS if "#" not in id)), VALUES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_job_takes_a_value_or_says_what_is_wrong(phantom_dir, tmp_path, id, value):
    if is_code(value) or id in ("dataset_dir", "output_dir"):
        return
    config = config_of(phantom_dir, tmp_path / "run") | {id: value}
    with contextlib.suppress(DatasetError):
        Job(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["seed=1.5", "feature_voxels=0", "num_classes=abc", "view_turn=NaN", "knn_k=1e400"])
def test_the_command_says_it_in_a_line(phantom_dir, tmp_path, capsys, setting):
    assert main(["run", str(phantom_dir), "--output", str(tmp_path / "run"), "--set", setting]) == 2
    said = capsys.readouterr().err
    assert setting.partition("=")[0] in said and "expected" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["suggest-template", "DIR", "--top", "-1"],
        ["demo-data", "OUT", "--cases", "-3"],
        ["run", "DIR", "--output", "RUN", "--seed", "-1"],
    ],
)
def test_options_say_it_too(command, capsys):
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 2 and "expected a whole number from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("id", "hint"),
    [("max_iteration", "did you mean max_iterations"), ("train#optimiser", "did you mean train#optimizer")],
)
def test_misspelt_ids_are_refused_by_the_job_as_well(phantom_dir, tmp_path, id, hint):
    config = config_of(phantom_dir, tmp_path / "run")
    if "#" in id:
        config["train"] = config["train"] | {id.partition("#")[2]: 5}
    else:
        config[id] = 5
    with pytest.raises(DatasetError, match=hint):
        Job(config)


@pytest.mark.slow
def test_monai_bundle_refuses_a_misspelt_id(phantom_dir, tmp_path):
    ids = {"dataset_dir": phantom_dir, "output_dir": tmp_path / "run", "device": "cpu", "max_iteration": 5}
    done = bundle_process("training", CONFIGS / "train.json", **ids)
    assert done.returncode != 0 and "did you mean max_iterations" in done.stderr


def test_an_id_that_an_overlay_refers_to_is_its_own(phantom_dir, tmp_path):
    config = config_of(phantom_dir, tmp_path / "run")
    Job(config | {"my_decay": 0.1, "train": config["train"] | {"optimizer": {"lr": "@my_decay"}}})
