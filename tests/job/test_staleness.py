"""What a changed setting makes stale follows from the config's own references."""

import json
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

import semisam_o1
from semisam_o1.job.config import ACTIONS, JobConfig, flatten, reaches
from semisam_o1.job.resume import FREE
from semisam_o1.job.stages import FINISH_IDS, ROUND_0, round_stages

CONFIGS = Path(semisam_o1.BUNDLE_ROOT) / "configs"
STAGES = (*ROUND_0, *round_stages(1))
MACHINE = {"threads", "restart_from", "checkpoint_seconds", "cache_num", "bundle_root", "preset", "device"}


def job_config(phantom_dir, *overlays: str) -> JobConfig:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.json"), *(str(CONFIGS / overlay) for overlay in overlays)])
    parser.update({"dataset_dir": str(phantom_dir), "output_dir": str(phantom_dir.parent / "nowhere"), "device": "cpu"})
    return JobConfig(parser.get())


def first_stale(config: JobConfig, id: str) -> str | None:
    """The first stage that a change of the value ``id`` makes stale."""
    return next((stage.name for stage in STAGES if reaches(config.needed(stage.needs()), id)), None)


@pytest.mark.parametrize(
    ("id", "stage"),
    [
        ("feature_voxels", "features"),
        ("finer_features", "features"),
        ("encoder#_target_", "features"),
        ("template", "features"),
        ("split", "features"),
        ("cohort#pool a", "features"),
        ("seed", "propagation/first"),
        ("propagation#method#neighbours", "propagation/first"),
        ("label_fusion", "propagation/fusion"),
        ("propagation#label_fusion#atlases", "propagation/fusion"),
        ("quality_estimate", "propagation/first"),
        ("min_predicted_dice", "round_1/training"),
        ("max_iterations", "round_1/training"),
        ("train#optimizer#weight_decay", "round_1/training"),
        ("train#random_transforms#4#prob", "round_1/training"),
        ("train_voxels", "round_1/training"),
        ("view_turn", "round_1/prediction"),
        ("overlap", "round_1/prediction"),
        ("windows#mode", "round_1/prediction"),
        ("guard", "round_1/refinement"),
        ("least_gain", "round_1/refinement"),
        ("refinement#propose#share", "round_1/refinement"),
        ("metric_definition", None),
        ("num_rounds", None),
        ("least_change", None),
        ("quality_tolerance", None),
        ("cache_num", "round_1/training"),  # but it is FREE: a matter of memory
    ],
)
def test_the_first_stage_that_a_setting_makes_stale(phantom_dir, id, stage):
    assert first_stale(job_config(phantom_dir), id) == stage


def test_every_id_reaches_a_stage_or_is_declared_free(phantom_dir):
    """Some are for an overlay alone: the widths of the published network, the volume refinement, validation."""
    names = ("methods/dtc.json", "methods/ua_mt.json", "refinements/volume.json", "presets/paper.json")
    overlays = [(), *((name,) for name in names)]
    configs = [job_config(phantom_dir, *overlay) for overlay in overlays]
    for id in flatten(json.loads((CONFIGS / "train.json").read_text())):
        known = id.split("#")[0] in (*ACTIONS, *FREE, *FINISH_IDS)
        assert known or any(first_stale(config, id) for config in configs), id


def test_what_is_free_is_a_matter_of_the_machine_or_of_the_command_or_compared_by_its_effect():
    assert set(FREE) == MACHINE | {"dataset_dir", "output_dir", "pseudonyms", "reviewed", "round", "template"}


def test_overlays_hold_nothing_but_differences():
    train = ConfigParser()
    train.read_config(str(CONFIGS / "train.json"))
    for path in CONFIGS.glob("*/*.json"):
        for id, value in json.loads(path.read_text()).items():
            assert id not in train or train.get(id) != value, f"{path.name}: {id}"


def test_the_config_is_one_that_a_user_of_the_model_zoo_dares_to_edit():
    train = json.loads((CONFIGS / "train.json").read_text())

    def expressions(value) -> int:
        if isinstance(value, (dict, list)):
            return sum(map(expressions, value.values() if isinstance(value, dict) else value))
        return isinstance(value, str) and value.startswith("$")

    assert expressions(train) <= 45
    assert all(isinstance(handler, dict) for handler in train["train"]["handlers"])  # MONAI Label reads them so
    for id in ("network_def", "preprocessing", "inferer"):
        assert "_target_" in train[id]
    parts = ("random_transforms", "preprocessing", "loss", "optimizer", "dataloader", "inferer", "trainer")
    assert all("_target_" in (p if isinstance(p := train["train"][part], dict) else p[0]) for part in parts)
