"""What corrections have won, of hand-made tables."""

import pytest

from semisam_o1.report.curve import Step, curve, curve_text, handed_out, remark
from semisam_o1.runfolder import RunFolder

ROWS = [
    {"split": split, "round": number, "stage": stage, "class": name, "case": case, "dice": value}
    for split, number, stage, name, case, value in (
        ("pool", 1, "predicted", "mean", "a", 0.1),
        ("pool", 1, "refined", "mean", "a", 0.8),
        ("pool", 1, "refined", "1", "a", 0.2),
        ("pool", 0, "copied", "mean", "a", 0.3),
        ("pool", 0, "propagated", "mean", "a", 0.9),
        ("test", 1, "refined", "mean", "a", 0.4),
    )
]


@pytest.mark.parametrize("number, dice", [(0, 0.9), (1, 0.8)])
def test_handed_out_is_the_last_stage_of_the_round_that_the_labels_come_from(tmp_path, number, dice):
    run = RunFolder(tmp_path)
    run.round(number).path.mkdir()
    run.round(number).quality.write({"a": {"predicted_dice": 0.7}})
    found = handed_out(run, number, 2, 3, ["a", "b"], ROWS, "dice")
    assert found == {"labelled": 2, "rounds": 3, "round": number, "cases": {"a": [0.7, dice], "b": [None, None]}}


def test_means_are_over_the_scans_that_nobody_touched_yet():
    steps = [
        {"labelled": 1, "rounds": 2, "round": 0, "cases": {"a": [0.5, 0.4], "b": [0.7, 0.8], "c": [0.9, None]}},
        {"labelled": 2, "rounds": 3, "round": 3, "cases": {"b": [0.8, 0.9], "c": [1.0, None], "new": [0.1, 0.1]}},
    ]
    before, after = curve(steps)
    assert (before.labelled, before.rounds, before.source, after.source) == (1, 2, 0, 3)
    assert (before.predicted, before.true) == pytest.approx((0.8, 0.8))
    assert (after.predicted, after.true) == pytest.approx((0.9, 0.9))
    assert "1    2    0 0.800  0.800" in curve_text([before, after])
    steps[1]["cases"]["c"][0] = None  # it cannot be told any more
    assert [step.predicted for step in curve(steps)] == pytest.approx([0.7, 0.8])


def test_it_is_said_that_estimates_of_round_0_and_of_a_network_are_not_compared():
    first, trained = Step(1, 2, 0, 0.84, None), Step(3, 3, 3, 0.81, None)
    assert "two different estimates" in remark([first, trained]) and remark([first, trained]) in curve_text(
        [first, trained]
    )
    assert remark([first, first]) is remark([trained, trained]) is None
    assert remark([first, trained._replace(predicted=None)]) is None


def test_there_is_no_curve_before_the_first_correction_and_none_without_truth():
    one = {"labelled": 1, "rounds": 2, "round": 0, "cases": {"a": [None, None]}}
    assert curve([]) == curve([one]) == []
    assert curve([one, one])[0][3:] == (None, None) and "-  -" in curve_text(curve([one, one]))
