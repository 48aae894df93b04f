"""The uncertainty-aware mean teacher: its threshold, its mask, its passes."""

import math

import numpy as np
import pytest
import torch
from monai.engines import SupervisedTrainer
from torch import nn
from torch.utils.data import DataLoader

from semisam_o1.methods.two_stream import LossProgress, TwoStreamSampler, prepare_batch
from semisam_o1.methods.ua_mt import UncertaintyAwareLoss, UncertaintyAwareTeacher

SIDES = (6, 5, 4)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_the_threshold_rises_to_the_largest_entropy(num_classes):
    loss = UncertaintyAwareLoss()
    loss.iterations = 10
    for iteration, share in ((0, 0.75 + 0.25 * math.exp(-5)), (5, 0.75 + 0.25 * math.exp(-1.25)), (10, 1.0)):
        loss.iteration = iteration
        assert loss.threshold(num_classes) == pytest.approx(share * math.log(num_classes))


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_term_by_hand(num_classes):
    loss = UncertaintyAwareLoss()
    loss.iteration, loss.iterations = 3, 10
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, num_classes, *SIDES, generator=generator, dtype=torch.float64)
    loss.teacher_logits = torch.randn(2, num_classes, *SIDES, generator=generator, dtype=torch.float64)
    loss.teacher_entropy = torch.rand(2, *SIDES, generator=generator) * math.log(num_classes)
    student, teacher = (np.exp(x.numpy()) for x in (logits[1:], loss.teacher_logits))
    gap = (student / student.sum(1, keepdims=True) - teacher / teacher.sum(1, keepdims=True)) ** 2
    limit = (0.75 + 0.25 * math.exp(-5 * 0.7**2)) * math.log(num_classes)
    mask = loss.teacher_entropy.numpy() < limit
    assert 0 < mask.sum() < mask.size
    expected = gap.sum(1)[mask].sum() / (2 * mask.sum())
    found = loss.consistency_term(logits, torch.tensor([True, False, False]))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_a_teacher_unsure_of_everything_teaches_nothing():
    loss = UncertaintyAwareLoss()
    loss.teacher_logits, loss.teacher_entropy = torch.randn(1, 2, *SIDES), torch.full((1, *SIDES), 5.0)
    assert float(loss.consistency_term(torch.randn(1, 2, *SIDES), torch.tensor([False]))) == 0


class Counting(nn.Module):
    """Says one class on even looks and the other on odd ones: the mean of an even number of looks is a coin's."""

    def __init__(self):
        super().__init__()
        self.head, self.looks = nn.Conv3d(1, 2, 1), 0

    def forward(self, image):
        self.looks += 1
        if self.training and not torch.is_grad_enabled():
            logits = torch.zeros(len(image), 2, *image.shape[2:])
            logits[:, self.looks % 2] = 20
            return logits
        return self.head(image)


def test_entropy_is_of_the_mean_of_noisy_passes():
    items = [{"image": torch.randn(1, *SIDES), "label": torch.zeros(1, *SIDES), "labelled": n == 0} for n in range(2)]
    network, loss = Counting(), UncertaintyAwareLoss()
    method = UncertaintyAwareTeacher(network, loss, passes=8)
    SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=1, epoch_length=1, network=network, loss_function=loss,
        train_data_loader=DataLoader(items, batch_sampler=TwoStreamSampler(items, 1, 1, num_batches=1)),
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1), prepare_batch=prepare_batch,
        train_handlers=[LossProgress(loss), method], decollate=False,
    ).run()  # fmt: skip
    assert method.teacher.looks == 9  # one is followed, eight say how sure it is
    torch.testing.assert_close(loss.teacher_entropy, torch.full((1, *SIDES), math.log(2)), rtol=0, atol=1e-4)
