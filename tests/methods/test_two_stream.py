"""Batches of two streams, the published ramps and loss, by hand and in numpy."""

import logging
import math
from collections import Counter

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from torch.utils.data import DataLoader

from semisam_o1.methods.two_stream import (
    LossProgress,
    PolynomialDecay,
    PresentDiceCE,
    TwoStreamLoss,
    TwoStreamSampler,
    gaussian_ramp,
    prepare_batch,
    published_loss,
)

ITEMS = [{"labelled": n in (1, 4)} for n in range(7)]  # templates 1 and 4, pool 0 2 3 5 6


def plain_loss(logits, label):
    """(CE + Dice) / 2 in numpy: logits (B, C, ...), label (B, 1, ...); Dice a class over the whole batch."""
    logits, label = np.asarray(logits, float), np.asarray(label, int)[:, 0]
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    p = np.moveaxis(exponents / exponents.sum(1, keepdims=True), 1, -1)
    t = np.eye(logits.shape[1])[label]
    cross_entropy = -np.log((p * t).sum(-1)).mean()
    axes = tuple(range(p.ndim - 1))
    dice = 1 - (2 * (p * t).sum(axes) + 1e-5) / ((p**2).sum(axes) + (t**2).sum(axes) + 1e-5)
    return (cross_entropy + dice.mean()) / 2


def batch_of(num_classes=3, batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, num_classes, 3, 4, 2, generator=generator)
    return logits, torch.randint(0, num_classes, (batch, 1, 3, 4, 2), generator=generator).float()


# Batches


def test_batches_are_templates_then_pool_scans():
    torch.manual_seed(0)
    sampler = TwoStreamSampler(ITEMS, labelled=1, pool=2, num_batches=20)
    batches = list(sampler)
    assert len(sampler) == len(batches) == 20
    for batch in batches:
        assert [ITEMS[i]["labelled"] for i in batch] == [True, False, False]
    # each stream is used up before any of it comes again
    templates = [batch[0] for batch in batches]
    assert all(set(templates[n : n + 2]) == {1, 4} for n in range(0, 20, 2))
    pool = [i for batch in batches for i in batch[1:]]
    assert all(sorted(pool[n : n + 5]) == [0, 2, 3, 5, 6] for n in range(0, 40, 5))
    assert len({tuple(pool[n : n + 5]) for n in range(0, 40, 5)}) > 1  # shuffled anew


def test_a_stream_goes_on_over_epochs():
    torch.manual_seed(1)
    sampler = TwoStreamSampler(ITEMS, 1, 1, num_batches=3)
    pool = [i for _ in range(5) for batch in sampler for i in batch[1:]]
    assert Counter(pool) == dict.fromkeys((0, 2, 3, 5, 6), 3)


def test_batches_hang_on_the_seed():
    orders = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        orders.append(list(TwoStreamSampler(ITEMS, 1, 1, num_batches=10)))
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("mark", [True, False])
def test_an_empty_stream_is_filled_by_the_other(mark):
    batches = list(TwoStreamSampler([{"labelled": mark}] * 3, labelled=1, pool=2, num_batches=4))
    assert all(sorted(batch) == [0, 1, 2] for batch in batches)


def test_items_without_a_mark_are_templates():
    sampler = TwoStreamSampler([{}, {"labelled": False}], 2, 1, num_batches=2)
    assert list(sampler) == [[0, 0, 1]] * 2


def test_batches_reach_the_loss_through_a_loader():
    items = [
        {"image": torch.full((1, 2, 2, 2), n), "label": torch.zeros(1, 2, 2, 2), **item} for n, item in enumerate(ITEMS)
    ]
    loader = DataLoader(items, batch_sampler=TwoStreamSampler(items, 1, 2, num_batches=2))
    for batch in loader:
        image, target = prepare_batch(batch)
        assert image.shape == target["label"].shape == (3, 1, 2, 2, 2)
        assert target["labelled"].dtype == torch.bool and target["labelled"].tolist() == [True, False, False]


def test_a_batch_without_marks_is_labelled():
    _, target = prepare_batch({"image": torch.zeros(2, 1, 2, 2, 2), "label": torch.ones(2, 1, 2, 2, 2)})
    assert target["labelled"].tolist() == [True, True]


# Ramps


def test_the_gaussian_ramp_by_hand():
    assert gaussian_ramp(0) == pytest.approx(math.exp(-5))
    assert gaussian_ramp(0.5) == pytest.approx(math.exp(-1.25))
    assert gaussian_ramp(1) == gaussian_ramp(7) == 1
    assert gaussian_ramp(-3) == gaussian_ramp(0)


@pytest.mark.parametrize(
    "iteration, expected",
    [
        (0, 0.1 * math.exp(-5)),
        (149, 0.1 * math.exp(-5)),
        (150, 0.1 * math.exp(-5 * (199 / 200) ** 2)),
        (300, 0.1 * math.exp(-5 * 0.99**2)),
        (14999, 0.1 * math.exp(-5 * (101 / 200) ** 2)),
        (30000, 0.1),
        (10**6, 0.1),
    ],
)
@pytest.mark.parametrize("iterations", [500, 15000])
def test_the_published_consistency_ramp_hangs_on_the_iteration_alone(iteration, expected, iterations):
    loss = TwoStreamLoss(consistency=0.1, published_ramp=True)
    loss.iteration, loss.iterations = iteration, iterations
    assert loss.consistency_weight() == pytest.approx(expected, rel=1e-9)


def test_the_published_ramp_at_two_known_iterations():
    loss = TwoStreamLoss(consistency=0.1, published_ramp=True)
    loss.iteration = 300
    assert loss.consistency_weight() == pytest.approx(0.0007, abs=5e-5)
    loss.iteration = 15000
    assert loss.consistency_weight() == pytest.approx(0.029, abs=5e-4)


def test_the_other_ramp_is_full_at_its_share_of_the_iterations():
    loss = TwoStreamLoss(consistency=0.2, consistency_rampup=0.4)
    loss.iterations = 1000
    for iteration, expected in (
        (0, 0.2 * math.exp(-5)),
        (200, 0.2 * math.exp(-1.25)),
        (400, 0.2),
        (999, 0.2),
    ):
        loss.iteration = iteration
        assert loss.consistency_weight() == pytest.approx(expected)


def test_the_pseudo_ramp_by_hand():
    loss = TwoStreamLoss()
    loss.iterations = 15000
    for iteration, expected in ((0, 0), (450, 0.1), (2250, 0.5), (4500, 1), (14999, 1)):
        loss.iteration = iteration
        assert loss.pseudo_weight() == pytest.approx(expected)


@pytest.mark.parametrize("weight", ["pseudo_weight", "consistency_weight"])
def test_without_a_ramp_the_weight_is_full_at_once(weight):
    loss = TwoStreamLoss(consistency=1.0, pseudo_rampup=0, consistency_rampup=0)
    assert getattr(loss, weight)() == 1


# Loss


def test_the_published_loss_by_hand():
    """Two voxels, two classes, logits 0: p = 1/2 everywhere, truth (0, 1)."""
    logits, label = torch.zeros(1, 2, 1, 1, 2), torch.tensor([0.0, 1]).reshape(1, 1, 1, 1, 2)
    dice = 1 - (2 * 0.5 + 1e-5) / (2 * 0.25 + 1 + 1e-5)  # of either class
    assert float(published_loss()(logits, label)) == pytest.approx((math.log(2) + dice) / 2, rel=1e-5)


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_the_published_loss_is_the_plain_formula(num_classes):
    logits, label = batch_of(num_classes)
    assert float(published_loss()(logits, label)) == pytest.approx(plain_loss(logits, label), rel=1e-4)
    label[:] = 0  # all other classes absent
    assert float(published_loss()(logits, label)) == pytest.approx(plain_loss(logits, label), rel=1e-4)


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_a_loss_of_classes_that_are_all_present_is_the_published_one(num_classes):
    logits, label = batch_of(num_classes)
    assert label.unique().numel() == num_classes
    assert float(PresentDiceCE()(logits, label)) == pytest.approx(float(published_loss()(logits, label)), rel=1e-6)


def test_a_class_that_labels_lack_is_left_to_the_cross_entropy():
    """By hand: two voxels, three classes, p = (1/2, 1/2 - e, e), truth (0, 1); the third has no part in the Dice."""
    e = 1e-3
    logits = torch.tensor([0.5, 0.5 - e, e]).log().reshape(1, 3, 1, 1, 1).repeat(1, 1, 1, 1, 2)
    label = torch.tensor([0.0, 1]).reshape(1, 1, 1, 1, 2)
    dice = sum(1 - (2 * p + 1e-5) / (2 * p**2 + 1 + 1e-5) for p in (0.5, 0.5 - e)) / 2
    cross = -(math.log(0.5) + math.log(0.5 - e)) / 2
    logits.requires_grad_()
    loss = PresentDiceCE()(logits, label)
    assert float(loss.detach()) == pytest.approx((cross + dice) / 2, rel=1e-5)
    others = PresentDiceCE()(logits.detach()[:, :2], label)  # the class being not there at all changes little
    assert float(loss.detach()) == pytest.approx(float(others), abs=e)
    lacking = 1 - 1e-5 / (2 * e**2 + 1e-5)  # what the published Dice adds for the third class
    published = float(published_loss()(logits.detach(), label))
    assert published == pytest.approx((cross + (2 * dice + lacking) / 3) / 2, rel=1e-5)


def test_training_is_told_which_loss_it_has():
    assert isinstance(TwoStreamLoss(absent_classes=False).segmentation, PresentDiceCE)
    assert isinstance(TwoStreamLoss().segmentation, type(published_loss()))


class Consistent(TwoStreamLoss):
    def consistency_term(self, logits, labelled):
        return logits[~labelled].square().mean()


@pytest.mark.parametrize("marks", [(True, False, False, False), (True, True, False, True), (False, True, True, False)])
def test_the_terms_are_weighted_and_summed(marks):
    logits, label = batch_of()
    labelled = torch.tensor(marks)
    loss = Consistent(consistency=0.1, published_ramp=True)
    loss.iteration, loss.iterations = 3000, 15000  # mu = 2/3, t = 20
    found = float(loss(logits, {"label": label, "labelled": labelled}))
    expected = {
        "supervised": plain_loss(logits[labelled], label[labelled]),
        "pseudo": 2 / 3 * plain_loss(logits[~labelled], label[~labelled]),
        "consistency": 0.1 * math.exp(-5 * 0.9**2) * float(logits[~labelled].square().mean()),
    }
    assert found == pytest.approx(sum(expected.values()), rel=1e-4)
    assert loss.weighted == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("mark, name", [(True, "supervised"), (False, "pseudo")])
def test_a_batch_of_one_kind(mark, name):
    logits, label = batch_of()
    loss = TwoStreamLoss()
    loss.iteration, loss.iterations = 1, 1
    found = float(loss(logits, {"label": label, "labelled": torch.full((4,), mark)}))
    assert found == pytest.approx(plain_loss(logits, label), rel=1e-4)
    assert list(loss.weighted) == [name]


def test_at_the_first_iteration_pseudo_labels_count_nothing():
    logits, label = batch_of()
    logits.requires_grad_()
    loss = TwoStreamLoss()
    loss.iterations = 10
    loss(logits, {"label": label, "labelled": torch.tensor([True, False, False, False])}).backward()
    assert logits.grad[0].abs().sum() > 0 and logits.grad[1:].eq(0).all()


# Handlers


def run(handler, epochs=2, length=5, seen=None):
    engine = Engine(lambda engine, batch: seen() if seen else None)
    handler.attach(engine)
    engine.run([0] * length, max_epochs=epochs)


def test_the_loss_is_told_how_far_training_is(caplog):
    loss, told = TwoStreamLoss(), []
    with caplog.at_level(logging.INFO, logger="semisam_o1"):
        loss.weighted = {"supervised": 0.5, "pseudo": 0.25}
        run(LossProgress(loss), seen=lambda: told.append((loss.iteration, loss.iterations)))
    assert told == [(i, 10) for i in range(10)]
    expected = [f"iteration {i} of 10: supervised 0.5, pseudo 0.25" for i in (5, 10)]
    assert [record.getMessage() for record in caplog.records] == expected


def test_the_learning_rate_decays_as_published():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimiser = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.5}], lr=0.01)
    rates = []
    run(
        PolynomialDecay(optimiser),
        seen=lambda: rates.append([group["lr"] for group in optimiser.param_groups]),
    )
    factors = (1 - np.arange(10) / 10) ** 0.9
    np.testing.assert_allclose(rates, np.outer(factors, [0.01, 0.5]))
    assert rates[0] == [0.01, 0.5] and rates[5][0] == pytest.approx(0.01 * 0.535887, rel=1e-5)


def test_another_power():
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = []
    run(
        PolynomialDecay(optimiser, power=2),
        epochs=1,
        length=4,
        seen=lambda: rates.append(optimiser.param_groups[0]["lr"]),
    )
    assert rates == pytest.approx([1, 9 / 16, 1 / 4, 1 / 16])
