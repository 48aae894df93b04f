"""Every example of docs/extending.md: a method, an encoder, a metric, a format, a setting."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import semisam_o1
from semisam_o1.cli import main
from semisam_o1.data import formats
from semisam_o1.data.datasets import open_cohort
from semisam_o1.job.config import JobConfig, reaches
from semisam_o1.job.stages import ROUND_0
from semisam_o1.report import metrics

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "extending.md").read_text()
CONFIG = Path(semisam_o1.BUNDLE_ROOT) / "configs" / "train.json"


def example(section: str, language: str) -> str:
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1]


def names_of(section: str) -> dict:
    names: dict = {}
    exec(example(section, "python"), names)
    return names


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The example's modules, on the path."""
    for section, name in (("A method", "my_methods"), ("An encoder", "my_encoders")):
        (tmp_path / f"{name}.py").write_text(example(section, "python"))
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)


def settings(*sections: str, **more) -> list[str]:
    overlay = {id: value for section in sections for id, value in json.loads(example(section, "json")).items()}
    return ["--set", *(f"{id}={json.dumps(value)}" for id, value in (overlay | more).items())]


@pytest.mark.slow
def test_a_method_and_an_encoder(phantom_dir, tmp_path, modules):
    small = {"feature_voxels": 6000, "train_voxels": 6000, "max_iterations": 2, "iterations_per_epoch": 2}
    command = ["run", str(phantom_dir), "--output", str(tmp_path / "run"), "--rounds", "1", "--device", "cpu"]
    small |= {"label_fusion": False, "quality_estimate": False}
    assert main([*command, *settings("A method", "An encoder", **small)]) == 0
    settings_of_run = json.loads((tmp_path / "run" / "progress.json").read_text())["settings"]
    assert settings_of_run["train#loss#_target_"] == "my_methods.SureLoss"
    assert len(list((tmp_path / "run" / "pseudo_labels").iterdir())) == 2


def test_a_metric(monkeypatch):
    measure = names_of("A metric")["VOLUME_ERROR"]
    monkeypatch.setitem(metrics.MEASURES, "mm", (*metrics.MEASURES["mm"], measure))
    truth, prediction = np.zeros((2, 6, 6, 6), int)
    truth[1:5, 1:5, 1:5], prediction[1:5, 1:5, 1:4] = 1, 1
    (row, mean) = metrics.score(prediction, truth, (1, 1, 1), 2)
    assert row["volume_error"] == pytest.approx(0.25) == mean["volume_error"]
    assert "volume_error" in metrics.columns()


def test_a_format(tmp_path, monkeypatch):
    found = names_of("A format")["NPZ"]
    monkeypatch.setattr(formats, "FORMATS", (found, *formats.FORMATS))
    monkeypatch.setattr(formats, "SUFFIXES", (*found.suffixes, *formats.SUFFIXES))
    affine, image = np.diag([2.0, 1, 1, 1]), np.random.default_rng(0).normal(size=(8, 7, 6))
    label = np.zeros(image.shape)
    label[2:6, 2:5, 2:5] = 1
    for folder, names, volume in (("images", "ab", image), ("labels", "a", label)):
        (tmp_path / folder).mkdir()
        for name in names:
            np.savez(tmp_path / folder / f"{name}.npz", image=volume, affine=affine)
    cohort = open_cohort(tmp_path)
    assert [case.name for case in cohort.templates + cohort.pool] == ["a", "b"] and cohort.num_classes == 2
    volume = cohort.reader.volume(cohort.pool[0].image)
    np.testing.assert_allclose(volume[0], image, rtol=1e-6)
    np.testing.assert_array_equal(volume.affine, affine)
    assert cohort.grid(cohort.pool[0]).spacing.tolist() == [2, 1, 1]


def test_a_setting(phantom_dir, tmp_path):
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(CONFIG))
    overlay = json.loads(example("A setting", "json"))
    parser.update({"dataset_dir": str(phantom_dir), "output_dir": str(tmp_path), **overlay})
    config = JobConfig(parser.get())
    assert config.setting("fusion_atlases") == 3
    stale = [stage.name for stage in ROUND_0 if reaches(config.needed(stage.needs()), "fusion_atlases")]
    assert stale == ["propagation/fusion", "propagation/copies"]  # copies are labelled as scans are
