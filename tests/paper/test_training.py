"""When the published code validates, what it keeps (13, 14), the first teacher (11), ten steps of each method."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from torch import nn

from semisam_o1.handlers import CopySaver, PublishedValidation, WeightsSaver
from semisam_o1.methods import (
    AdversarialLoss,
    AdversarialNetwork,
    DualTaskLoss,
    LossProgress,
    MeanTeacher,
    MeanTeacherLoss,
    PolynomialDecay,
    UncertaintyAwareLoss,
    UncertaintyAwareTeacher,
    WeightAverage,
    prepare_batch,
)
from semisam_o1.networks import UNet3D, UNet3DSDF


class Counter(nn.Module):
    """Its weight is the iteration that left it so."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)


def training(folder, iterations, scores=()):
    """A run of ``iterations`` whose validations find ``scores``: when it validated, and the state it ends with."""
    network, validated, found = Counter(), [], iter(scores)

    def step(engine, batch):
        network.weight.fill_(engine.state.iteration)

    engine = Engine(step)
    state = SimpleNamespace(metrics={}, key_metric_name="dice")

    def run():
        validated.append(engine.state.iteration)
        state.metrics["dice"] = next(found, 0.0)

    validator = SimpleNamespace(run=run, state=state)
    validation = PublishedValidation(validator, network, folder, 1)
    saver = WeightsSaver(network, folder, 1, best="round1_best.pth")
    for handler in (validation, CopySaver(network, folder, 1), saver):
        handler.attach(engine)
    engine.run([0], max_epochs=1, epoch_length=iterations)
    kept = torch.load(saver.path, weights_only=True)["weight"]
    return validated, int(kept), validation.best


@pytest.mark.parametrize("iterations", [150, 199, 200, 310, 450, 1000])
def test_when_it_is_validated(golden, tmp_path, iterations):
    found = golden("schedule")
    for method in ("mt", "uamt", "dan", "dtc"):
        assert training(tmp_path / method, iterations)[0] == found[f"validated/{method}/{iterations}"].tolist()


def test_the_state_that_is_kept(golden, tmp_path):
    found = golden("schedule")
    for i, (scores, iterations) in enumerate(zip(found["scores"], found["iterations"].tolist())):
        scores = [float(score) for score in scores if score != -1]
        _, kept, best = training(tmp_path / str(i), iterations, scores)
        assert (kept, best) == (found["kept/mt"][i], pytest.approx(found["best/mt"][i])), scores


@pytest.mark.parametrize(
    ("iterations", "scores"), [(1000, [0.1, 0.2, 0.3, 0.4, 0.5]), (6400, [0.1, 0.25, 0.25, 0.2] + [0.3] * 40)]
)
def test_the_files_that_are_saved(golden, tmp_path, iterations, scores):
    expected = golden("schedule")[f"saved/mt/{iterations}"].tolist()
    training(tmp_path, iterations, scores)
    found = {path.name for path in (tmp_path / "round_1").glob("*.pth")}
    assert found == set(expected)


def test_the_first_teacher_is_another_network_and_the_student_after_one_step(golden):
    torch.manual_seed(0)
    student, other = (UNet3D(1, 2, features=(2, 4, 8, 16, 32)) for _ in range(2))
    method = MeanTeacher(student, MeanTeacherLoss(), start=other)
    assert set(golden("first_teacher")["mt/keys"]) == set(student.state_dict())
    for key, value in method.teacher.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    engine = Engine(lambda engine, batch: None)
    engine.state.max_epochs = 1
    super(MeanTeacher, method).attach(engine)
    engine.run([0], max_epochs=1, epoch_length=1)
    for key, value in method.teacher.state_dict().items():
        torch.testing.assert_close(value, student.state_dict()[key], rtol=0, atol=1e-7)


WIDTHS = (2, 4, 8, 16, 32)
TOLERANCE = {"mt": 1e-7, "uamt": 1e-7, "dan": 1e-7, "dtc": 1e-6}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def started(inputs, name: str, method: str) -> nn.Module:
    network = (UNet3DSDF if method == "dtc" else UNet3D)(1, 2, features=WIDTHS, dropout=0.0)
    inputs.fill_as(name, network)
    with torch.no_grad():
        for key, weight in network.named_parameters():
            if weight.ndim == 5:
                weight *= {"final.weight": 50, "final2.weight": 0.001}.get(key, 5)
    return network


def parts(network: nn.Module) -> dict[str, np.ndarray]:
    return {key: value.detach().numpy().copy() for key, value in network.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mt", "uamt", "dan", "dtc"])
def test_ten_steps(golden, inputs, double, monkeypatch, name):
    found = golden(f"trajectory_{name}")
    student, teacher = started(inputs, "student", name), started(inputs, "teacher", name)
    loss = {
        "mt": lambda: MeanTeacherLoss(published_ramp=True),
        "uamt": lambda: UncertaintyAwareLoss(published_ramp=True, threshold_classes=2),
        "dan": lambda: AdversarialLoss(published_ramp=True),
        "dtc": lambda: DualTaskLoss(published=True, published_ramp=True),
    }[name]()
    method = {
        "mt": lambda: MeanTeacher(student, loss, start=teacher),
        "uamt": lambda: UncertaintyAwareTeacher(student, loss, start=teacher),
        "dan": lambda: AdversarialNetwork(student, loss, num_classes=2, pool=2),
        "dtc": lambda: WeightAverage(student),
    }[name]()
    if name == "dan":
        inputs.fill_as("discriminator", method.discriminator)
        method.discriminator.dropout = nn.Identity()
    random = np.random.RandomState(1290)

    def noise(pool):
        return torch.as_tensor(random.standard_normal((1, 32, 32, 32)))[None]

    monkeypatch.setattr("semisam_o1.methods.mean_teacher.torch.randn_like", noise)
    template = inputs.blob(1200, (32, 32, 32))
    batches = []
    for i in range(10):
        pair = [template, inputs.blob(1210 + i, (32, 32, 32))]
        image, label = (torch.as_tensor(np.stack([p[k] for p in pair]).astype(np.float64))[:, None] for k in (0, 1))
        batches.append({"image": image, "label": label, "labelled": torch.tensor([True, False])})
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    before, teacher_before = parts(student), parts(method.teacher)
    discriminator_before = parts(method.discriminator) if name == "dan" else {}
    rows, weights = [], {}

    class Record:
        def attach(self, engine):
            engine.add_event_handler(Events.ITERATION_COMPLETED, self)

        def __call__(self, engine):
            terms = loss.weighted
            rate = optimizer.param_groups[0]["lr"]
            rows.append((float(engine.state.output["loss"]), terms["supervised"], rate, terms.get("distance")))
            if engine.state.iteration in (3, 10):
                weights[engine.state.iteration] = parts(student)

    trainer = SupervisedTrainer(
        device="cpu", max_epochs=1, epoch_length=10, train_data_loader=batches, network=student, optimizer=optimizer,
        loss_function=loss, prepare_batch=prepare_batch, decollate=False,
        train_handlers=[LossProgress(loss), PolynomialDecay(optimizer, late=True), method, Record()],
    )  # fmt: skip
    trainer.run()
    tolerance = TOLERANCE[name]
    np.testing.assert_allclose([row[0] for row in rows], found["loss"], rtol=0, atol=tolerance)
    np.testing.assert_allclose([row[1] for row in rows], found["supervised"], rtol=0, atol=tolerance)
    np.testing.assert_allclose([row[2] for row in rows], found["learning_rate"], rtol=0, atol=1e-12)
    if name == "dtc":
        np.testing.assert_allclose([row[3] for row in rows], found["distance_dice"], rtol=0, atol=tolerance)
    moved = [(f"student_{n}", before, weights[n]) for n in (3, 10)]
    if name in ("mt", "uamt"):
        moved.append(("teacher_10", teacher_before, parts(method.teacher)))
    for prefix, start, end in moved:
        for key, value in end.items():
            added = (value - start[key]).ravel()
            expected = found[f"{prefix}/{key}"]
            added = added[::7] if added.size > 2000 else added
            np.testing.assert_allclose(added, expected, rtol=0, atol=2 * tolerance, err_msg=f"{prefix} {key}")
    for key, start in discriminator_before.items():
        added = (parts(method.discriminator)[key] - start).ravel()
        some = added[:: max(1, added.size // 50)][:50]
        summed = [added.sum(), np.linalg.norm(added)]
        expected = found[f"discriminator_10/{key}"]
        np.testing.assert_allclose([*summed, *some], expected, rtol=1e-6, atol=2 * tolerance, err_msg=key)
