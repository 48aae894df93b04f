"""What is said of labels without truth: by hand, and on phantoms whose labels are spoiled on purpose."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from semisam_o1.data.phantoms import make_phantom
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.report.overlap import soft_dice, soft_dices
from semisam_o1.round_0 import engines
from semisam_o1.round_0.calibration import USUAL_FACTOR, Calibration, calibrate
from semisam_o1.round_0.places import centred_points
from semisam_o1.round_0.propagation import Reference, nearest
from semisam_o1.round_0.quality import (
    Evidence,
    back_from,
    back_propagate,
    evidence,
    look_of_classes,
    nonpositive_jacobian,
    roughness,
    shape_of_classes,
)
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import Case

SHAPE, STEP = (20, 19, 18), 2.4


def one_hot(label):
    return torch.from_numpy(np.eye(3, dtype=np.float32)[label].transpose(3, 0, 1, 2).copy())


def phantom(seed):
    image, label = make_phantom(seed, SHAPE, STEP)
    image = torch.from_numpy((image - image.mean()) / image.std())
    return Reference(mind(dilations=(1,), boxes=(3, 5))(image[None, None])[0], one_hot(label))


def test_soft_dice_by_hand():
    one = torch.tensor([[0.2, 1.0], [0.8, 0.0], [0.0, 0.0]]).reshape(3, 2, 1, 1)
    other = torch.tensor([[0.5, 0.6], [0.5, 0.4], [0.0, 0.0]]).reshape(3, 2, 1, 1)
    assert soft_dice(one, other) == pytest.approx(2 * 0.5 / 1.7)  # class 2 is in neither
    assert soft_dice(one, other, "product") == pytest.approx(2 * 0.4 / 1.7)
    assert soft_dice(one, one) == pytest.approx(1)
    hard = torch.tensor([[1.0, 0], [0, 1.0], [0, 0]]).reshape(3, 2, 1, 1)
    assert soft_dice(hard, hard.flip(1)) == 0
    assert soft_dices(one, other).tolist() == pytest.approx([2 * 0.5 / 1.7, np.nan], nan_ok=True)
    assert soft_dice(one[:1], other[:1]) == 1  # no class at all


def test_roughness_of_a_cube_is_its_surface_over_its_volume():
    label = np.zeros((9, 9, 9), int)
    label[2:6, 2:6, 2:6] = 1
    assert roughness(one_hot(label)) == pytest.approx(6 * 16 / 64)


def test_folding_is_where_the_map_runs_backwards():
    points = centred_points((8, 5, 5), 2.0).clone()
    weight = torch.zeros(8, 5, 5)
    weight[2:4] = 1
    assert nonpositive_jacobian(points, weight) == 0
    points[..., 0] = -points[..., 0]
    assert nonpositive_jacobian(points, weight) == 1


@pytest.fixture(scope="module")
def carried():
    """A template, another case, round 0's label for it and the way back."""
    template, scan = phantom(0), phantom(2)
    return template, scan, nearest([template], scan.tokens, STEP), back_propagate(template.tokens, scan.tokens, STEP)


def spoiled(label):
    """Labels that are wrong in the ways in which propagation goes wrong."""
    number = label.argmax(0).numpy()
    cut = number.copy()
    cut[:, : 2 * number.shape[1] // 3] = 0
    return {
        "shifted": np.roll(number, (4, -4, 3), (0, 1, 2)),
        "mirrored": number[::-1].copy(),
        "cut": cut,
        "empty": np.zeros_like(number),
    }


@pytest.fixture(scope="module")
def judge(carried):
    """Label, its probabilities -> quality, by the usual factor and a pool of one good label."""
    template, scan, found, back = carried

    def look(label, probabilities):
        return evidence(template, Reference(scan.tokens, label), probabilities, back, STEP, 0.1)

    good = one_hot(found.probabilities.argmax(0).numpy())
    calibration = calibrate([look(good, found.probabilities)])
    return lambda label, probabilities: calibration.predict(look(label, probabilities))


def test_a_good_label_is_told_from_spoiled_ones(carried, judge):
    _, _, found, _ = carried
    good = judge(one_hot(found.probabilities.argmax(0).numpy()), found.probabilities)
    assert good.predicted_dice > 0.7 and good.reverse_consistency > 0.7
    assert good.low < good.predicted_dice < good.high
    for name, label in spoiled(found.probabilities).items():
        quality = judge(one_hot(label), found.probabilities)
        assert quality.predicted_dice < 0.6, name
        assert quality.reverse_consistency < 0.7 * good.reverse_consistency, name


def test_a_failure_with_which_round_0_agrees_is_found_by_the_way_back(carried, judge):
    _, _, found, _ = carried
    wrong = torch.roll(found.probabilities, (4, -4, 3), (1, 2, 3))
    quality = judge(one_hot(wrong.argmax(0).numpy()), wrong)
    assert quality.agreement > 0.6 and quality.predicted_dice < 0.6


def test_a_class_in_the_wrong_place_is_named(carried, judge):
    _, _, found, _ = carried
    number = found.probabilities.argmax(0).numpy()
    astray = np.where(number == 1, 1, 0) + np.roll(np.where(number == 2, 2, 0), (5, -5, 4), (0, 1, 2))
    quality = judge(one_hot(np.minimum(astray, 2)), found.probabilities)
    assert quality.classes[1] < 0.5 < quality.classes[0]
    row = quality.row([0, 3, 7])
    assert row["predicted_dice_7"] == quality.classes[1] and "classes" not in row


def known(agreement, back, unlike=0.1):
    return Evidence(np.array(agreement), np.array(back), unlike, 0.1, 0.0, 0.5)


def test_copies_move_the_factor_half_of_the_way():
    """Expected error 0.2; copies say 0.1 and 0.4, the usual factor 0.17: the geometric means of both."""
    pool, usual = [known([0.8, 0.8], [0.9, 0.9])], 0.2 * USUAL_FACTOR
    found = calibrate(pool, [np.array([0.9, 0.6])] * 3, [np.array([0.8, 0.8])] * 3).predict(pool[0])
    assert found.classes == pytest.approx((1 - (0.1 * usual) ** 0.5, 1 - (0.4 * usual) ** 0.5))
    assert calibrate(pool).predict(pool[0]).predicted_dice == pytest.approx(1 - usual)


def test_the_pool_is_the_measure_of_a_scan():
    pool = [known([0.8], [0.9], 0.1), known([0.8], [0.8], 0.1), known([0.8], [0.9], 0.2)]
    calibration = calibrate(pool)
    plain, inconsistent, unlike = (calibration.predict(one).predicted_dice for one in pool)
    assert plain == pytest.approx(1 - 0.2 * USUAL_FACTOR)
    assert 1 - inconsistent == pytest.approx((1 - plain) * 2**0.3) and 1 - unlike == pytest.approx((1 - plain) * 2**0.3)


def test_a_pool_that_failed_as_a_whole_is_no_measure():
    """The labels of both scans, or that of the only one, do not come back to the template."""
    for backs in ([0.03], [0.05, 0.03, 0.9]):
        pool = [known([0.9], [back]) for back in backs]
        predicted = [calibrate(pool).predict(one).predicted_dice for one in pool]
        assert predicted[0] < 0.15 and all(one > 0.8 for one, back in zip(predicted, backs) if back > 0.5)


def distances(unlike, back):
    return known([0.8], [0.9], unlike)._replace(back_residual=back)


@pytest.mark.parametrize(
    ("unlike", "back", "said"),
    [
        (0.14, 0.29, ""),
        (0.16, 0.2, "the scan is unlike the scans that its label comes from (1.6 times the usual distance)"),
        (0.1, 0.32, "the scan is unlike the template (1.6 times the usual distance)"),
        (0.2, 0.6, "comes from (2.0 times the usual distance) and the template (3.0 times the usual distance)"),
    ],
)
def test_nobody_can_tell_of_a_scan_far_from_the_pool(unlike, back, said):
    """Median distances 0.1 to the atlases and 0.2 to the template."""
    calibration = calibrate([distances(0.08, 0.2), distances(0.1, 0.1), distances(0.3, 0.4)])
    found = calibration.predict(distances(unlike, back))
    assert found.doubt.endswith(said) and bool(found.doubt) == bool(said)
    row = found.row([0, 4])
    dice = [row[name] for name in ("predicted_dice", "low", "high", "predicted_dice_4")]
    assert row["cannot_tell"] == (found.doubt or None)
    assert dice == [None] * 4 if said else None not in dice
    assert None not in (row["reverse_consistency"], row["dissimilarity"], row["back_residual"])


def test_a_calibration_from_before_there_was_doubt_is_read():
    content = calibrate([distances(0.1, 0.2)]).content()
    del content["back_residual"]
    assert Calibration.of_content(content).predict(distances(0.1, 0.9)).doubt == ""


def test_a_class_that_is_nowhere_counts_for_nothing():
    pool = [known([0.8, np.nan], [0.9, np.nan])]
    found = calibrate(pool, [np.array([0.9, np.nan])] * 3, [np.array([0.8, np.nan])] * 3).predict(pool[0])
    assert found.predicted_dice == found.classes[0] and np.isnan(found.classes[1])
    assert found.row([0, 1, 2])["predicted_dice_2"] is None


def test_a_class_of_another_template_is_not_expected_on_the_way_back(carried):
    """The scan's label has it from a template of its own."""
    template, scan, found, back = carried
    label = template.label.clone()
    label[0] += label[1]
    label[1] = 0
    labelled = Reference(scan.tokens, found.probabilities)
    seen = evidence(Reference(template.tokens, label), labelled, found.probabilities, back, STEP, 0.1)
    assert np.isnan(seen.reverse_consistency[0]) and seen.reverse_consistency[1] > 0.5


def test_a_calibration_survives_its_file():
    found = calibrate([known([0.8, 0.7], [0.9, 0.6])], [np.array([0.9, 0.6])], [np.array([0.8, 0.8])])
    again = Calibration.of_content(found.content())
    assert again.predict(known([0.6, 0.7], [0.5, 0.5])) == found.predict(known([0.6, 0.7], [0.5, 0.5]))


def test_volume_and_place_of_a_class_by_hand():
    label = torch.zeros(3, 10, 10, 10)
    label[1, 2:4, 2:4, 2:4], label[2, 6:8, 6:8, 6:8] = 1, 1
    warped = torch.zeros_like(label)
    warped[1, 2:4, 2:4, 3:7] = 1  # twice as long, its centre 2 tokens further
    volume, shift = shape_of_classes(warped, label)
    np.testing.assert_allclose(volume, [np.log(2), -np.inf])
    np.testing.assert_allclose(shift, [2 / (3 * 8 / (4 * np.pi)) ** (1 / 3), np.nan], rtol=1e-5)


def test_the_look_of_a_class_by_hand():
    tokens, label = torch.zeros(2, 4, 1, 1), torch.zeros(4, 4, 1, 1)
    tokens[0, :2], tokens[1, 2] = torch.tensor([1.0, 3.0])[:, None, None], 5
    label[1, :2], label[2, 2], label[0, 3] = 1, 1, 1
    other = torch.zeros_like(tokens)
    other[0, :2] = 5
    found = look_of_classes(Reference(tokens.half(), label), Reference(other, label))
    np.testing.assert_allclose(found, [3, 5, np.nan])


def shaped(volume, shift, look=(1.0, 1.0)):
    return known([0.8, 0.8], [0.9, 0.9])._replace(volume=np.log(volume), shift=np.array(shift), look=np.array(look))


@pytest.mark.parametrize(
    "volume, shift, said",
    [
        ([1.3, 1.0], [0.2, 0.1], {}),
        ([0.4, 1.0], [0.2, 0.1], {0: "0.4 times its usual volume"}),
        ([1.0, 2.5], [0.2, 0.1], {1: "2.5 times its usual volume"}),
        ([1.0, 1.0], [0.2, 0.9], {1: "0.9 of its radius from its place"}),
        ([1.0, 0.0], [0.2, np.nan], {1: "0 times its usual volume"}),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_class_that_no_other_scan_has_so_is_odd(volume, shift, said):
    pool = [shaped([v, 1.0], [s, 0.1]) for v, s in ((0.9, 0.2), (1.0, 0.2), (1.1, 0.3), (1.0, 0.1))]
    found = Calibration.of_content(calibrate(pool).content()).predict(shaped(volume, shift))
    assert found.odd == said
    assert found.row([0, 3, 7])["odd"] == ("; ".join(f"{(3, 7)[i]}: {text}" for i, text in said.items()) or None)


def test_a_class_that_looks_like_no_other_is_odd():
    pool = [shaped([1.0, 1.0], [0.1, 0.1], [look, np.nan]) for look in (0.9, 1.0, 1.1, 1.0)]
    settled = Calibration.of_content(calibrate(pool).content())
    assert settled.predict(shaped([1.0, 1.0], [0.1, 0.1], [1.4, 3.0])).odd == {}
    assert settled.predict(shaped([1.0, 1.0], [0.1, 0.1], [2.0, np.nan])).odd == {
        0: "it looks 2 times as unlike as usual"
    }


def test_a_class_that_varies_over_the_pool_is_not_odd():
    pool = [shaped([v, 1.0], [0.1, 0.1]) for v in (0.4, 0.7, 1.0, 1.5, 2.5)]
    assert calibrate(pool).predict(shaped([0.4, 1.0], [0.1, 0.1])).odd == {}


def test_a_failed_way_back_is_mended_from_the_forward_alignment(carried):
    """A way back that starts from the inverse of a good alignment is as close as an independent one."""
    template, scan, found, back = carried
    again = back_from(template.tokens, scan.tokens, STEP, found.to_template)
    assert again.residual < 1.2 * back.residual and (again.points - back.points).norm(dim=-1).mean() < 2 * STEP


def test_the_way_back_is_its_own(carried):
    template, scan, found, back = carried
    there = found.to_template(centred_points(SHAPE, STEP))
    assert back.points.shape == (*SHAPE, 3) and not torch.allclose(back.points, there)
    again = back_propagate(template.tokens, scan.tokens, STEP)
    assert torch.equal(back.points, again.points)
    assert not torch.equal(back.points, back_propagate(template.tokens, scan.tokens, STEP, seed=2).points)


def test_the_run_says_how_many_labels_nobody_can_tell(tmp_path, monkeypatch, caplog):
    found = {"near": distances(0.1, 0.2), "other": distances(0.1, 0.2), "far": distances(0.1, 0.5)}
    estimate = SimpleNamespace(evidence=lambda case, label: found[case.name], small=[])
    monkeypatch.setattr(engines, "QualityEstimate", lambda *_: estimate)
    cases = [Case(name, tmp_path, None, "pool") for name in found]
    with caplog.at_level("INFO", "semisam_o1"):
        engines.quality_engine(None, SimpleNamespace(class_numbers=[0, 4], labelled=()), tmp_path, 0).run(
            cases, epoch_length=3
        )
    rows = RunFolder(tmp_path).round(0).quality.read()
    assert list(rows) == ["far", "near", "other"]
    assert rows["far"]["predicted_dice"] is None and rows["far"]["cannot_tell"].startswith(
        "the scan is unlike the temp"
    )
    assert rows["near"]["predicted_dice"] > 0.7 and not rows["near"]["cannot_tell"]
    assert "cannot tell how good 1 of 3 labels are" in caplog.text
