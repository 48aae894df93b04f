"""The mean teacher inside MONAI's unmodified trainer: its average, its noise, its term of the loss."""

import copy

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from torch import nn
from torch.utils.data import DataLoader

from semisam_o1.methods.mean_teacher import MeanTeacher, MeanTeacherLoss
from semisam_o1.methods.two_stream import LossProgress, TwoStreamSampler, prepare_batch

SIDES = (6, 5, 4)


class Network(nn.Module):
    """Small, with dropout and with running statistics, so that train mode shows; keeps what it last saw."""

    def __init__(self, num_classes, dropout=0.3):
        super().__init__()
        self.conv, self.norm = nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.dropout, self.head = nn.Dropout(dropout), nn.Conv3d(8, num_classes, 1)
        self.seen = None

    def forward(self, image):
        self.seen = image.detach().clone(), self.training, torch.is_grad_enabled()
        return self.head(self.dropout(torch.relu(self.norm(self.conv(image)))))


class Job:
    """A few iterations of training with a teacher; `watch` is called as each ends, the average updated."""

    def __init__(self, num_classes=2, iterations=6, marks=(True, False, False), length=3, watch=None, **settings):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        items = [
            {
                "image": torch.randn(1, *SIDES, generator=generator),
                "label": torch.randint(0, num_classes, (1, *SIDES), generator=generator).float(),
                "labelled": mark,
            }
            for mark in marks
        ]
        self.network, self.loss = Network(num_classes), MeanTeacherLoss(consistency=0.5)
        self.start = copy.deepcopy(self.network.state_dict())
        self.method = MeanTeacher(self.network, self.loss, **settings)
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=iterations // length,
            train_data_loader=DataLoader(items, batch_sampler=TwoStreamSampler(items, 1, 2, num_batches=length)),
            epoch_length=length,
            network=self.network,
            optimizer=torch.optim.SGD(self.network.parameters(), lr=0.1, momentum=0.9),
            loss_function=self.loss,
            prepare_batch=prepare_batch,
            train_handlers=[LossProgress(self.loss), self.method],
            decollate=False,
        )
        if watch:
            self.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: watch(self))

    def run(self):
        self.trainer.run()
        return self


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("alpha", [0.99, 0.6])
def test_the_teacher_is_the_published_average(num_classes, alpha):
    students, teachers = [], []

    def watch(job):
        students.append([p.detach().clone() for p in job.network.parameters()])
        teachers.append([p.detach().clone() for p in job.method.teacher.parameters()])

    job = Job(num_classes, watch=watch, alpha=alpha)
    expected = [job.start[name].double() for name, _ in job.network.named_parameters()]
    job.run()
    assert len(students) == 6
    for i, (student, teacher) in enumerate(zip(students, teachers)):
        share = min(1 - 1 / (i + 1), alpha)
        expected = [share * old + (1 - share) * new.double() for old, new in zip(expected, student)]
        for one, other in zip(teacher, expected):
            np.testing.assert_allclose(one, other, atol=1e-6)
    # the first step makes the teacher the student; later they part
    assert all(torch.equal(s, t) for s, t in zip(students[0], teachers[0]))
    assert not torch.equal(students[-1][0], teachers[-1][0])


def test_past_the_warm_up_alpha_is_what_was_given():
    """Six steps reach 1 - 1/6 at most: alpha 0.6 holds from the third on, as the recursion above saw."""
    shares = []
    Job(watch=lambda job: shares.append(job.trainer.state.ema_momentum), alpha=0.6).run()
    assert shares == pytest.approx([1, 1 / 2, 0.4, 0.4, 0.4, 0.4])


def test_a_horizon_shortens_the_average_by_the_length_of_training():
    """Half of six steps are three: the new weights' share is at least 1/3."""
    shares = []
    Job(watch=lambda job: shares.append(job.trainer.state.ema_momentum), alpha=0.99, horizon=0.5).run()
    assert shares == pytest.approx([1, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 1 / 3])


def test_the_teacher_is_in_train_mode_and_learns_nothing_itself():
    seen = []
    job = Job(watch=lambda job: seen.append(job.method.teacher.seen)).run()
    assert [training for _, training, _ in seen] == [True] * 6
    assert not any(graded for _, _, graded in seen)
    assert not any(p.requires_grad and p.grad is not None for p in job.method.teacher.parameters())
    assert not {id(p) for p in job.method.teacher.parameters()} & {id(p) for p in job.network.parameters()}
    twice = [job.method.teacher(seen[0][0]) for _ in range(2)]
    assert not torch.equal(*twice)  # its dropout acts


def test_the_teacher_sees_the_pool_with_clipped_noise():
    noises = []

    def watch(job):
        image, labelled = job.trainer.state.output["image"], job.trainer.state.output["label"]["labelled"]
        assert torch.equal(job.network.seen[0], image)  # the student sees none
        noises.append(job.method.teacher.seen[0] - image[~labelled])

    Job(iterations=12, watch=watch).run()
    assert all(noise.shape == (2, 1, *SIDES) for noise in noises)
    noise = torch.stack(noises).double()
    assert noise.abs().max() <= 0.2 + 1e-6
    # of a normal deviate 4.6% lie beyond two deviations, and clipping leaves a deviation of 0.0959
    at_the_clip = (noise.abs() > 0.2 - 1e-6).double().mean()
    assert at_the_clip == pytest.approx(0.0455, abs=0.015)
    assert noise.std() == pytest.approx(0.0959, abs=0.004)
    assert noise.mean() == pytest.approx(0, abs=0.006)
    assert not torch.equal(noises[0], noises[1])


def test_another_size_of_noise():
    noises = []

    def watch(job):
        image = job.trainer.state.output["image"]
        noises.append((job.method.teacher.seen[0] - image[1:]).abs().max())

    Job(watch=watch, noise=0.5).run()
    assert max(noises) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_consistency_term_by_hand(num_classes):
    loss = MeanTeacherLoss(consistency=0.1)
    loss.iteration, loss.iterations = 4, 10  # lambda = 0.1
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, num_classes, *SIDES, generator=generator, dtype=torch.float64)
    loss.teacher_logits = torch.randn(2, num_classes, *SIDES, generator=generator, dtype=torch.float64)
    student, teacher = (np.exp(x.numpy()) for x in (logits[[0, 2]], loss.teacher_logits))
    gap = student / student.sum(1, keepdims=True) - teacher / teacher.sum(1, keepdims=True)
    labelled = torch.tensor([False, True, False])
    assert float(loss.consistency_term(logits, labelled)) == pytest.approx((gap**2).mean())
    loss(logits, {"label": torch.zeros(3, 1, *SIDES), "labelled": labelled})
    assert loss.weighted["consistency"] == pytest.approx(0.1 * (gap**2).mean())


def test_two_opposite_voxels_by_hand():
    loss = MeanTeacherLoss()
    loss.teacher_logits = torch.tensor([[20.0, 0], [0, 20.0]]).reshape(1, 2, 1, 1, 2)  # class 0, then class 1
    logits = torch.tensor([[20.0, 20], [0, 0.0]]).reshape(1, 2, 1, 1, 2)  # class 0 twice
    assert float(loss.consistency_term(logits, torch.tensor([False]))) == pytest.approx(0.5, rel=1e-5)


def test_the_trainer_takes_the_teachers_logits_of_the_same_iteration():
    """Under the trainer the term of the log is that of the outputs of student and teacher."""
    found = []

    def watch(job):
        logits, labelled = job.trainer.state.output["pred"], job.trainer.state.output["label"]["labelled"]
        gap = logits[~labelled].detach().softmax(1) - job.loss.teacher_logits.softmax(1)
        expected = job.loss.consistency_weight() * float(gap.square().mean())
        found.append((job.loss.weighted["consistency"], expected))

    Job(3, watch=watch).run()
    assert len(found) == 6
    np.testing.assert_allclose(*zip(*found), rtol=1e-5)


def test_a_batch_without_pool_scans_has_no_term():
    terms = []
    job = Job(marks=(True, True), watch=lambda job: terms.append(list(job.loss.weighted))).run()
    assert terms == [["supervised"]] * 6
    assert job.method.teacher.seen is None and job.loss.teacher_logits is None


def test_the_students_gradient_passes_by_the_teacher():
    loss = MeanTeacherLoss(consistency=1.0)
    loss.iteration = loss.iterations = 1
    logits = torch.randn(2, 2, *SIDES, requires_grad=True)
    loss.teacher_logits = torch.randn(1, 2, *SIDES)
    loss.consistency_term(logits, torch.tensor([True, False])).backward()
    assert logits.grad[0].eq(0).all() and logits.grad[1].abs().sum() > 0


def test_training_is_reproducible():
    weights = [Job(3).run().method.teacher.state_dict() for _ in range(2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
