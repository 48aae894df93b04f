"""Round 0 alone, by the command line: what is computed once, which scans get labels, other ways to carry them over."""

import csv

import numpy as np
import pytest

from semisam_o1.cli import main
from tests.jobs import labels, small

TEXTS = ("case", "cannot_tell", "odd")  # columns of quality.csv


@pytest.mark.slow
def test_features_are_not_computed_again(phantom_dir, tmp_path):
    arguments = ["propagate", str(phantom_dir), "--output", str(tmp_path), *small(label_fusion=False)]
    assert main(arguments) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
    assert main(arguments) == 0
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
    assert not (tmp_path / "round_1").exists() and not (tmp_path / "bundle").exists()
    assert labels(tmp_path / "pseudo_labels") and (tmp_path / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("split", ["val", "test"])
def test_propagate_to_another_split(phantom_dir, tmp_path, split):
    command = ["propagate", str(phantom_dir), "--output", str(tmp_path), "--split", split]
    assert main([*command, *small()]) == 0
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert {row["split"] for row in rows} == {split} and len(labels(tmp_path / "pseudo_labels")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["copy", "prototype"])
def test_other_propagations_by_setting(phantom_dir, tmp_path, method):
    name = f"propagation#method#_target_=semisam_o1.round_0.{method}"
    command = ["propagate", str(phantom_dir), "--output", str(tmp_path), *small()]
    assert main([*command, "--set", name]) == 0
    quality = list(csv.DictReader((tmp_path / "round_0" / "quality.csv").open()))
    assert all(np.isfinite(float(value)) for row in quality for key, value in row.items() if key not in TEXTS)
    if method == "copy":  # judged all the same, though nothing was aligned
        assert max(float(row["predicted_dice"]) for row in quality) > 0


def test_sam_med3d_without_weights_says_what_to_put_where(phantom_dir, tmp_path, capsys):
    extra = small(pretrained_ckpt=str(tmp_path / "sam_med3d_turbo.pth"))
    assert main(["propagate", str(phantom_dir), "--output", str(tmp_path), "--encoder", "sam_med3d", *extra]) == 2
    said = capsys.readouterr().err
    assert "sam_med3d_turbo.pth" in said and "mind" in said and "Traceback" not in said
