"""What a run will take, and what `validate` says of a data set."""

from dataclasses import replace

import pytest

from semisam_o1.data import ScanReader
from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.estimate import estimate, estimate_text, validate_text
from tests.data.studies import halve, image_of


def test_estimate_grows_with_rounds_and_iterations(phantom_dir):
    cohort = open_cohort(phantom_dir)
    nothing = estimate(cohort, {"num_rounds": 0, "max_iterations": 100})
    one, two = (estimate(cohort, {"num_rounds": n, "max_iterations": 100}) for n in (1, 2))
    assert nothing["training"] == nothing["prediction"] == nothing["model_bytes"] == 0 < nothing["features"]
    long = estimate(cohort, {"num_rounds": 2, "max_iterations": 100, "first_round_factor": 3})
    assert long["training"] == pytest.approx(4 * one["training"], abs=0.3)
    assert two["training"] == 2 * one["training"] > 0 and two["bytes"] > one["bytes"] > nothing["bytes"]
    for result in (nothing, one, two):
        stages = sum(result[stage] for stage in ("features", "propagation", "training", "prediction"))
        assert result["seconds"] == pytest.approx(stages, abs=0.3)
    assert "on disk" in estimate_text(one)


def test_estimate_hangs_on_no_spacing(phantom_h5_dir):
    """Scans whose voxel size is unsaid cost what they cost with it, as `choose_spacing` promises."""
    settings = {"num_rounds": 1, "max_iterations": 10}
    unsaid, said = (estimate(open_cohort(phantom_h5_dir, reader=ScanReader(spacing=s)), settings) for s in (None, 0.4))
    assert unsaid["seconds"] == pytest.approx(said["seconds"], rel=0.01)


def test_many_classes_train_longer(phantom_dir):
    """Measured: an iteration with 38 classes takes four times as long as with five; round 0 and disk are the same."""
    cohort = open_cohort(phantom_dir)
    few, many = (
        estimate(replace(cohort, classes={n: str(n) for n in range(count)}), {"num_rounds": 1, "max_iterations": 9000})
        for count in (5, 38)
    )
    assert many["training"] == pytest.approx(4 * few["training"], rel=0.1)
    assert many["propagation"] == few["propagation"] and many["bytes"] == few["bytes"]


def test_validate_text(root):
    halve(image_of(root))
    cohort = open_cohort(root)
    text = validate_text(cohort, cohort.problems, {"num_rounds": 1, "max_iterations": 10})
    for part in (
        "truncated",
        "1 pool, 0 val, 1 test, 1 set aside",
        "1 class 1, 2 class 2",
        "6 x 7 x 8",
        "on disk",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100
