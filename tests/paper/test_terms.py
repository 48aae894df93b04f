"""Losses, ramps, thresholds, learning rate and sampler of the published code (rows 1, 6, 7, 15, 16)."""

import numpy as np
import pytest
import torch
from ignite.engine import Engine

from semisam_o1.methods import DualTaskLoss, PolynomialDecay, TwoStreamLoss, TwoStreamSampler, UncertaintyAwareLoss


@pytest.mark.parametrize(("case", "classes", "seed"), [("c2", 2, 11), ("c3", 3, 21), ("empty", 2, 31)])
def test_the_loss_of_dtc(golden, inputs, case, classes, seed):
    found = {key.split("/")[1]: value for key, value in golden("dtc_loss").items() if key.startswith(f"{case}/")}
    shape = (2, classes, 12, 11, 10)
    logits = torch.tensor(2 * inputs.normal(seed, shape))
    sdf = torch.tensor(np.tanh(1e-3 * inputs.normal(seed + 1, shape)))
    label = inputs.classes(seed + 2, (2, 12, 11, 10), classes)
    if case == "empty":
        label[1] = 0
    np.testing.assert_allclose([logits.sum(), sdf.sum(), label.sum()], found["input_sums"], rtol=1e-6)
    target = {"label": torch.tensor(label, dtype=torch.float64)[:, None], "labelled": torch.tensor([True, False])}
    loss = DualTaskLoss(published=True, published_ramp=True)
    loss.iterations = 8
    for i in range(8):
        loss.iteration = i
        assert float(loss((sdf, logits), target)) == pytest.approx(float(found["loss"][i]), abs=1e-9)
        terms = loss.weighted
        assert terms["supervised"] == pytest.approx(float(found["supervised"]), abs=1e-9)
        assert terms["distance"] == pytest.approx(float(found["distance_dice"]), abs=1e-9)
        assert loss.pseudo_weight() == pytest.approx(float(found["pseudo_weight"][i]), abs=1e-12)
        assert loss.consistency_weight() == pytest.approx(float(found["consistency_weight"][i]), abs=1e-12)
        assert terms["consistency"] == pytest.approx(loss.consistency_weight() * float(found["consistency"]), abs=1e-9)


def test_the_learning_rate(golden):
    found = golden("learning_rate")
    for key, expected in found.items():
        if key.startswith("dan_discriminator"):
            continue
        base = 0.02 if "base_0.02" in key else 0.01
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
        rates = []
        engine = Engine(
            lambda engine, batch, optimizer=optimizer, rates=rates: rates.append(optimizer.param_groups[0]["lr"])
        )
        PolynomialDecay(optimizer, late=True).attach(engine)
        engine.run([0], max_epochs=1, epoch_length=len(expected))
        np.testing.assert_allclose(rates, expected, rtol=0, atol=1e-12, err_msg=key)


@pytest.mark.parametrize(
    ("templates", "pool", "a", "b"), [(1, 6, 1, 1), (1, 6, 1, 2), (3, 6, 1, 1), (3, 5, 2, 2), (2, 5, 1, 3)]
)
def test_the_sampler(golden, templates, pool, a, b):
    """It is random, so its statistics are compared: what is drawn how often, and again across the border of epochs."""
    name = f"templates_{templates}/pool_{pool}/batch_{a}+{b}"
    published, epoch = golden("sampler")[name], int(golden("sampler")[f"{name}/epoch"])
    torch.manual_seed(0)
    items = [{"labelled": True}] * templates + [{"labelled": False}] * pool
    batches = np.array(list(TwoStreamSampler(items, a, b, num_batches=6000, anew=True)))
    assert (batches[:, :a] < templates).all() and (batches[:, a:] >= templates).all()
    assert epoch == max(1, templates // a)

    def repeated(batches, border):
        """Share of a batch's pool scans that were in the batch before."""
        pairs = [
            (one, other) for i, (one, other) in enumerate(zip(batches, batches[1:])) if ((i + 1) % epoch == 0) == border
        ]
        return np.mean([np.isin(other[a:], one[a:]).mean() for one, other in pairs]) if pairs else 0.0

    assert repeated(batches, True) == pytest.approx(repeated(published, True), abs=0.06)
    if epoch * b <= pool:
        assert repeated(batches, False) == 0 == repeated(published, False)
    counts = np.bincount(batches[:, a:].ravel(), minlength=templates + pool)[templates:]
    np.testing.assert_allclose(counts / counts.sum(), 1 / pool, atol=0.02)


def test_the_ramps(golden):
    found = golden("ramps")
    for key, expected in found.items():
        parts = key.split("/")
        if parts[0].startswith("consistency_"):
            ramp = float(parts[1].removeprefix("rampup_"))
            loss = TwoStreamLoss(
                consistency=float(parts[0].split("_")[1]), consistency_rampup=ramp, published_ramp=True
            )
            weights = []
            for loss.iteration in found["iteration"].tolist():
                weights.append(loss.consistency_weight())
        elif key != "iteration":
            loss = TwoStreamLoss(consistency_rampup=3, published_ramp=True)
            loss.iterations, weights = 620, []
            weight = loss.consistency_weight if "consistency" in key else loss.pseudo_weight
            for loss.iteration in range(620):
                weights.append(weight())
        else:
            continue
        np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_threshold_of_ua_mt(golden, classes):
    found = {
        key.split("/", 1)[1]: value for key, value in golden("uamt_threshold").items() if key.startswith(f"c{classes}/")
    }
    loss = UncertaintyAwareLoss(threshold_classes=2)
    loss.iterations = 12
    for i in range(12):
        loss.iteration = i
        assert loss.threshold(classes) == pytest.approx(float(found["threshold"][i]), abs=1e-9)
    for i in (0, 6, 11):
        loss.iteration = i
        student, teacher = (torch.tensor(np.asarray(found[f"{who}/{i}"])) for who in ("student", "teacher"))
        student, teacher = (v[None] if v.ndim == 4 else v for v in (student, teacher))
        loss.teacher_logits, loss.teacher_entropy = teacher, torch.tensor(found[f"entropy/{i}"])
        labelled = torch.zeros(len(student), dtype=torch.bool)
        term = loss.consistency_term(student, labelled)
        assert float(term) == pytest.approx(float(found["consistency"][i]), abs=1e-9)
        mask = (loss.teacher_entropy < loss.threshold(classes)).numpy()
        np.testing.assert_array_equal(mask.squeeze(), found[f"mask/{i}"].squeeze())
