"""The deep adversarial network: the discriminator's shape, its term of the loss, who learns when."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from torch import nn
from torch.utils.data import DataLoader

from semisam_o1.methods.dan import AdversarialLoss, AdversarialNetwork, Discriminator
from semisam_o1.methods.two_stream import LossProgress, TwoStreamSampler, prepare_batch

SIDES = (16, 18, 20)


def test_the_published_sizes():
    shapes = {name: tuple(p.shape) for name, p in Discriminator(2).named_parameters() if name.endswith("weight")}
    assert shapes == {
        "conv0.weight": (64, 2, 4, 4, 4),
        "conv1.weight": (64, 1, 4, 4, 4),
        "conv2.weight": (128, 64, 4, 4, 4),
        "conv3.weight": (256, 128, 4, 4, 4),
        "conv4.weight": (512, 256, 4, 4, 4),
        "classifier.weight": (2, 512),
    }


def test_published_pooling_keeps_a_corner():
    torch.manual_seed(0)
    one = Discriminator(2, width=2, pool=6).eval()
    whole = Discriminator(2, width=2).eval()
    whole.load_state_dict(one.state_dict())
    share, image = torch.rand(1, 2, 128, 128, 128), torch.rand(1, 1, 128, 128, 128)
    changed = share.clone()
    changed[..., 120:] = 0  # seen by the last of eight places alone
    with torch.no_grad():
        assert torch.equal(one(share, image), one(changed, image))
        assert not torch.equal(whole(share, image), whole(changed, image))


def test_thin_patches_end_in_zeros():
    torch.manual_seed(0)
    made = Discriminator(3, width=2).eval()
    share, image = torch.rand(1, 3, 16, 18, 10), torch.rand(1, 1, 16, 18, 10)
    ended = [torch.cat([volume, torch.zeros(*volume.shape[:-1], 6)], -1) for volume in (share, image)]
    with torch.no_grad():
        assert torch.equal(made(share, image), made(*ended))


def test_the_formula_written_out():
    torch.manual_seed(0)
    made = Discriminator(3, width=4).eval()
    share, image = torch.rand(2, 3, *SIDES), torch.rand(2, 1, *SIDES)

    def conv(layer, x):
        return F.conv3d(x, layer.weight, layer.bias, stride=2, padding=1)

    def leaky(x):
        return torch.where(x > 0, x, 0.2 * x)

    x = leaky(conv(made.conv0, share) + conv(made.conv1, image))
    for layer in (made.conv2, made.conv3, made.conv4):
        x = leaky(conv(layer, x))
    expected = x.flatten(2).mean(2) @ made.classifier.weight.T + made.classifier.bias
    torch.testing.assert_close(made(share, image), expected)


def test_the_term_is_the_wish_to_be_called_labelled():
    torch.manual_seed(0)
    loss = AdversarialLoss()
    loss.asked = made, image = Discriminator(2, width=4).eval(), torch.rand(3, 1, *SIDES)
    logits, labelled = torch.randn(3, 2, *SIDES, requires_grad=True), torch.tensor([True, False, False])
    term = loss.consistency_term(logits, labelled)
    called = made(logits[1:].softmax(1), image[1:]).softmax(1)
    assert float(term) == pytest.approx(float(-called[:, 1].log().mean()), rel=1e-5)
    term.backward()
    assert logits.grad[0].eq(0).all() and logits.grad[1:].abs().sum() > 0
    assert loss.consistency_term(logits, torch.tensor([True] * 3)) is None


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.modes = nn.Conv3d(1, 2, 1), []

    def forward(self, image):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.head(image)


def test_both_learn_in_turn_and_the_discriminator_tells_the_halves():
    torch.manual_seed(0)
    items = [
        {"image": torch.full((1, *SIDES), float(mark)), "label": torch.zeros(1, *SIDES), "labelled": mark}
        for mark in (True, False)
    ]
    network, loss = Network(), AdversarialLoss()
    method = AdversarialNetwork(network, loss, num_classes=2, learning_rate=1e-3)
    first = copy.deepcopy(method.discriminator.state_dict())
    trainer = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=1, epoch_length=15, network=network, loss_function=loss,
        train_data_loader=DataLoader(items, batch_sampler=TwoStreamSampler(items, 1, 1, num_batches=15)),
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0), prepare_batch=prepare_batch,
        train_handlers=[LossProgress(loss), method], decollate=False,
    )  # fmt: skip
    start = copy.deepcopy(network.state_dict())
    ready = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: ready.append(network.training))
    trainer.run()
    assert all(torch.equal(start[name], value) for name, value in network.state_dict().items())
    assert not torch.equal(first["conv0.weight"], method.discriminator.state_dict()["conv0.weight"])
    assert network.modes[:2] == [(True, True), (False, False)] and all(ready)
    image, label = trainer.state.batch["image"], trainer.state.batch["labelled"]
    with torch.no_grad():
        called = method.discriminator.eval()(network(image).softmax(1), image).argmax(1)
    assert called.tolist() == label.long().tolist()
    assert "consistency" in loss.weighted
