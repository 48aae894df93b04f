"""Dual-task consistency: signed distances by hand, the published loss in numpy, ours for any number of classes."""

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from skimage.segmentation import find_boundaries

from semisam_o1.methods.dtc import DualTaskLoss, signed_distance
from semisam_o1.networks.unet3d import LogitsAlone, UNet3DSDF

SIDES = (6, 5, 4)


def test_signed_distance_of_a_row_by_hand():
    row = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0.0])
    found = signed_distance(row.reshape(1, 1, -1, 1, 1)).flatten()
    np.testing.assert_allclose(found, [2 / 3, 1 / 3, 0, -1, 0, 1 / 3, 2 / 3, 1], atol=1e-6)


def test_signed_distance_is_the_published_one():
    mask = np.random.default_rng(0).random((9, 8, 7)) > 0.6
    inside, outside = distance_transform_edt(mask), distance_transform_edt(~mask)
    expected = outside / outside.max() - inside / inside.max()
    expected[find_boundaries(mask, mode="inner")] = 0
    found = signed_distance(torch.tensor(mask)[None, None].float())[0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_signed_distance_of_nothing_and_of_everything(value):
    assert signed_distance(torch.full((1, 1, 4, 4, 4), value)).eq(0).all()


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))


def dice(p, t):
    return 1 - (2 * (p * t).sum() + 1e-5) / ((p**2).sum() + (t**2).sum() + 1e-5)


def batch(num_classes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sdf = torch.randn(3, num_classes, *SIDES, generator=draw, dtype=torch.float64) * 1e-3
    logits = torch.randn(3, num_classes, *SIDES, generator=draw, dtype=torch.float64)
    label = torch.randint(0, num_classes, (3, 1, *SIDES), generator=draw).double()
    return sdf, logits, {"label": label, "labelled": torch.tensor([True, False, False])}


def test_the_published_loss_in_numpy():
    sdf, logits, target = batch(2)
    loss = DualTaskLoss(published=True, published_ramp=True)
    loss.iteration, loss.iterations = 300, 1000
    found = float(loss((sdf, logits), target))
    s, z, y = sdf.numpy(), logits.numpy(), target["label"].numpy()[:, 0].astype(int)
    mask = (y == 1)[:, None]  # one for both channels: its square counts once
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    cross = -np.take_along_axis(log_p, y[:, None], 1)
    halves = (slice(0, 1), slice(1, 3))
    parts = [(0.01 * cross[half].mean() + dice(sigmoid(z[half]), mask[half])) / 2 for half in halves]
    gap = ((sigmoid(-1500 * s) - sigmoid(z)) ** 2).mean()
    weight = 0.1 * np.exp(-5 * (1 - 2 / 200) ** 2)
    expected = parts[0] + 1.0 * parts[1] + weight * gap + dice(sigmoid(-1500 * s[:1]), mask[:1])
    assert loss.pseudo_weight() == pytest.approx(1.0)
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_perfect_answer_costs_next_to_nothing_and_each_class_counts():
    label = torch.zeros(2, 1, 8, 8, 8)
    label[:, :, 1:4], label[:, :, 5:7] = 1, 2
    masks = torch.cat([(label == number).float() for number in range(3)], 1)
    sdf, logits = signed_distance(masks) - 1e-2 * masks, 40 * masks - 20
    target = {"label": label, "labelled": torch.tensor([True, False])}
    loss = DualTaskLoss()
    loss.iteration = loss.iterations = 1
    perfect = float(loss((sdf, logits), target))
    assert perfect < 0.05
    for number in range(3):  # one class's distance is turned inside out
        wrong = sdf.clone()
        wrong[:, number] *= -1
        assert float(loss((wrong, logits), target)) > perfect + 0.2


def test_both_heads_learn():
    torch.manual_seed(0)
    network = UNet3DSDF(1, 3, features=(2, 2, 2, 2, 2))
    image, label = torch.randn(2, 1, 32, 16, 16), torch.randint(0, 3, (2, 1, 32, 16, 16)).float()
    loss = DualTaskLoss()
    loss.iteration = loss.iterations = 1
    loss(network(image), {"label": label, "labelled": torch.tensor([True, False])}).backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in (network.final, network.final2))
    assert set(loss.weighted) == {"supervised", "pseudo", "consistency", "distance"}


def test_logits_alone_under_the_networks_own_names():
    network = UNet3DSDF(1, 2, features=(2, 2, 2, 2, 2)).eval()
    alone, image = LogitsAlone(network), torch.randn(1, 1, 32, 16, 16)
    assert torch.equal(alone(image), network(image)[1])
    assert alone.state_dict().keys() == network.state_dict().keys()
    alone.load_state_dict({key: torch.zeros_like(value) for key, value in network.state_dict().items()})
    assert network.final.weight.eq(0).all()
