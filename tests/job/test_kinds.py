"""Every setting is checked by kind and range before any work."""

import contextlib
import copy
import json

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser

from semisam_o1.cli import main
from semisam_o1.errors import plainly
from semisam_o1.job import Job
from semisam_o1.job.config import Config
from semisam_o1.kinds import KINDS, is_code, refuse_wrong
from semisam_o1.runtime import set_up
from semisam_o1.types import DatasetError
from tests.jobs import CONFIGS, bundle, bundle_process, config_of
from tests.test_docs import HEADS, ROOT, first_code, tables

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=3), st.none()), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(
        [10**400, -(10**30), [[1]], "$", "@", "%", "@nothing", "%nothing", "$1 / 0", "$(", {"_target_": 5}]
    ),
)
WRONG = [
    ("seed", 1.5, "a whole number from 0 to 4,000,000,000"),
    ("seed", True, "a whole number from 0 to 4,000,000,000"),
    ("feature_voxels", 0, "a number from 500 to 1,000,000,000"),
    ("feature_voxels", float("nan"), "a number from 500 to 1,000,000,000"),
    ("finer_features", 0.5, "a number from 1 to 1,000"),
    ("num_classes", "abc", "a whole number from 2 to 250 or null"),
    ("num_classes", 10**9, "a whole number from 2 to 250 or null"),
    ("feature_spacing", 1e9, "a number from 0.001 to 100 or null"),
    ("num_rounds", 1.5, "a whole number from 0 to 1,000 or auto"),
    ("num_rounds", "two", "a whole number from 0 to 1,000 or auto"),
    ("label_fusion", 5, "true or false"),
    ("split", "bogus", "pool or val or test"),
    ("feature_crop", "middle", "center or null"),
    ("patch_size", [8, 8], "3 whole numbers from 1 to 4,096"),
    ("patch_size", [0, 8, 8], "3 whole numbers from 1 to 4,096"),
    ("flip_axes", [3], "a list of whole numbers from 0 to 2"),
    ("uncertainty_quantile", 2, "a number from 0 to 1"),
    ("overlap", 1, "a number from 0 to below 1"),
    ("learning_rate", 0, "a number above 0 to 1,000"),
    ("template", 5, "a list of texts"),
    ("image_key", [], "a text"),
    ("seed", {"a": 1}, "a whole number from 0 to 4,000,000,000"),
    ("max_iterations", 10**30, "a whole number from 1"),
    ("view_turn", float("inf"), "a number from 0 to 3.14"),
    ("spacing", [1, 2], "a number from 0.001 to 1,000 or 3 numbers from 0.001 to 1,000 or null"),
    ("device", "tpu", "cpu or cuda or cuda:0, cuda:1, ..."),
    ("threads", 0, "a whole number from 1 to 4,096 or null"),
    ("feature_dtype", "int8", "float16 or float32"),
    ("intensities", "x", "percentiles or foreground or null"),
    ("teacher_start", 5, "a component or null"),
]


def rows() -> dict[str, tuple[str, str]]:
    """Id -> default and range, as docs/settings.md says them."""
    found = [row for table in tables(ROOT / "docs" / "settings.md") if table[0] == HEADS for row in table[1:]]
    return {row[0].strip("`"): (first_code(row[1]), row[3].replace("`", "")) for row in found}


def test_every_setting_of_the_page_with_a_plain_default_has_a_kind():
    plain = set()
    for id, (default, _) in rows().items():
        with contextlib.suppress(json.JSONDecodeError):
            if not is_code(json.loads(default)):
                plain.add(id)
    assert len(plain) > 70 and sorted(plain - set(KINDS)) == [] and sorted(set(KINDS) - set(rows())) == []


def test_the_page_says_the_ranges_that_messages_say():
    for id, kind in KINDS.items():
        range_ = rows()[id][1]
        assert f"{range_};".replace(" (", ";").startswith(f"{kind};"), f"docs/settings.md: {id} is {kind}"


def test_what_is_shipped_fits():
    for file in (CONFIGS / "train.json", *CONFIGS.glob("*/*.json")):
        refuse_wrong({id: value for id, value in json.loads(file.read_text()).items() if not is_code(value)})


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
    if KINDS[id].fits(value):
        refuse_wrong({id: value})
    else:
        with pytest.raises(DatasetError, match=f"^{id} is "):
            refuse_wrong({id: value})


@pytest.fixture(scope="module")
def raw(phantom_dir, tmp_path_factory) -> dict:
    return config_of(phantom_dir, tmp_path_factory.mktemp("kinds") / "run")


@given(st.sampled_from(sorted(KINDS)), VALUES, st.booleans())
@settings(max_examples=60)
def test_a_config_names_the_setting_that_is_wrong(raw, id, value, computed):
    """As it is, and as the result of an expression."""
    assume(not KINDS[id].fits(value) and value != {"_target_": 5})
    assume(not computed or "@" not in repr(value))
    assume(not computed or ("%" not in repr(value) and not KINDS[id].part))  # a network is not built to check it
    parser = ConfigParser(copy.deepcopy(raw))
    parser[id] = f"$eval({repr(value)!r}, dict(nan=float('nan'), inf=float('inf')))" if computed else value
    code = is_code(value) and not computed  # then the message may name what the expression refers to
    with pytest.raises(DatasetError, match=".*" if code else f"^{id} (is|cannot be evaluated)"):
        Config(parser.get())


@given(st.sampled_from(sorted(id for id in KINDS if "#" not in id)), VALUES)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_job_takes_a_value_or_says_what_is_wrong(phantom_dir, tmp_path, id, value):
    assume(id not in ("dataset_dir", "output_dir", "pseudonyms"))
    config = config_of(phantom_dir, tmp_path / "run") | {id: value}
    with contextlib.suppress(DatasetError):
        Job(config)
    assert not (tmp_path / "run").exists()


SAID = [
    ("seed=1.5", "seed is 1.5: expected a whole number"),
    ("seed=$'abc'", "seed is 'abc': expected a whole number"),
    ("seed=$1/0", "seed cannot be evaluated: division by zero"),
    ("seed=@nothing", "seed is '@nothing': the config has no such id"),
    ("affine_prob=@", "affine_prob is '@': the config has no such id"),
    ("affine_prob=%", "affine_prob is '%': the config has no such id"),
    ("affine_prob=%nothing#0", "affine_prob is '%nothing#0': the config has no such id"),
    ("seed#a=1", "no id 'seed#a'"),
    ("train#random_transforms#99#prob=1", "no id 'train#random_transforms#99#prob'"),
    ("_target_=os.system", "no id '_target_'"),
    ("nothing=$1", "no id 'nothing'"),
    ("refinement#propos=$1", "no id 'refinement#propos': did you mean refinement#propose"),
    ('refinement#propos={"_target_": "builtins.dict"}', "no id 'refinement#propos'"),
    ("train=5", "train is 5: expected a component"),
    ("refinement#propose=volume", "refinement#propose is 'volume': expected a component"),
    ("feature_voxels=0", "feature_voxels is 0: expected"),
    ("feature_voxels={}", "feature_voxels is {}: expected"),
    ("feature_spacing=1e9", "feature_spacing is 1000000000.0: expected"),
    ("feature_spacing=$len(@cohort.pool) * 1000", "feature_spacing is 2000: expected"),
    ("num_classes=abc", "num_classes is 'abc': expected"),
    ("num_classes=$[3]", "num_classes is [3]: expected"),
    ("labeled_num=[1]", "labeled_num is [1]: expected"),
    ("view_turn=NaN", "view_turn is NaN: expected"),
    ("knn_k=1e400", "knn_k is Infinity: expected"),
    (f"knn_k={10**30}", "knn_k is a number above 10^12: expected"),
    (f"knn_k={'1' * 5000}", "knn_k is '111"),
    ("num_rounds=-1", "num_rounds is -1: expected"),
    ("num_rounds=two", "num_rounds is 'two': expected"),
    ("amp=yes", "amp is 'yes': expected true or false"),
    ("amp=1", "amp is 1: expected true or false"),
    ("pool_batch=true", "pool_batch is true: expected"),
    ("train#optimizer#weight_decay=$'abc'", "train#optimizer#weight_decay is 'abc': expected"),
    ("windows#mode=middle", "windows#mode is 'middle': expected gaussian or constant"),
    ("train#optimiser=5", "did you mean train#optimizer"),
    ("consistency_rampup=200", "consistency_rampup is 200: expected a share of a round"),
    ("dataset_dir=", "dataset_dir is '': expected a text"),
]


@pytest.mark.parametrize(("setting", "said"), SAID, ids=[setting[:40] for setting, _ in SAID])
def test_the_command_says_it_in_a_line(phantom_dir, tmp_path, capsys, setting, said):
    assert main(["run", str(phantom_dir), "--output", str(tmp_path / "run"), "--set", setting]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"semisam-o1: {said}") or said in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["run", "validate"])
def test_a_batch_has_scans(phantom_dir, tmp_path, capsys, command):
    output = ["--output", str(tmp_path / "run")] if command == "run" else []
    assert main([command, str(phantom_dir), *output, "--set", "labelled_batch=0", "pool_batch=0"]) == 2
    assert "expected one of them above 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["propagate", "validate", "predict", "evaluate"])
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("spacing=[1,2]", "spacing is [1, 2]: expected"),
        ("view_turn=$-1", "view_turn is -1: expected"),
        ("overlapp=0.3", "did you mean overlap"),
    ],
)
def test_other_commands_say_it_too(run, phantom_dir, tmp_path, capsys, command, setting, said):
    scan = str(next((phantom_dir / "images").iterdir()))
    arguments = {
        "propagate": [str(phantom_dir), "--output", str(tmp_path / "run")],
        "validate": [str(phantom_dir)],
        "predict": [scan, "--run", str(run), "--output", str(tmp_path / "run")],
        "evaluate": [str(run), str(phantom_dir)],
    }
    assert main([command, *arguments[command], "--set", setting]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_monai_checks_a_trained_bundle_too(phantom_dir, tmp_path):
    ids = {"dataset_dir": str(phantom_dir / "images"), "output_dir": str(tmp_path / "out"), "overlap": 1}
    with pytest.raises(RuntimeError) as error:
        bundle("run", CONFIGS / "inference.json", **ids)
    assert plainly(error.value) == "overlap is 1: expected a number from 0 to below 1."


@pytest.mark.parametrize(
    "command",
    [
        ["suggest-template", "DIR", "--top", "-1"],
        ["demo-data", "OUT", "--cases", "-3"],
        ["run", "DIR", "--output", "RUN", "--seed", "-1"],
        ["run", "DIR", "--output", "RUN", "--seed", "1.5"],
        ["run", "DIR", "--output", "RUN", "--rounds", "-1"],
        ["demo-data", "OUT", "--seed", "NaN"],
    ],
)
def test_options_say_it_too(command, capsys):
    with pytest.raises(SystemExit) as end:
        main(command)
    error = capsys.readouterr().err
    assert end.value.code == 2 and "expected a whole number from" in error and error.count("\n") == 1


@pytest.mark.parametrize("spacing", [["0"], ["nan"], ["1", "2"]])
def test_the_spacing_of_suggest_template_is_checked(tmp_path, capsys, spacing):
    try:
        status = main(["suggest-template", str(tmp_path), "--spacing", *spacing])
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and "expected a number from 0.001 to 1,000" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "said"), [((1.5, None, "cpu"), "seed"), ((0, 0, "cpu"), "threads"), ((0, None, "tpu"), "device")]
)
def test_what_a_bundle_sets_up_first_is_checked_there(values, said):
    with pytest.raises(DatasetError, match=f"^{said} is "):
        set_up(*values)


def test_a_component_of_ones_own_takes_any_argument(raw):
    parser = ConfigParser(copy.deepcopy(raw))
    parser["refinement#propose"] = {"_target_": "mine.Votes", "share": "half"}
    Config(parser.get())


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
