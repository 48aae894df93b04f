"""A run that was killed goes on and ends as if it had not been: journal, lock, state of a training, real kills."""

import random
import re

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import CacheDataset, DataLoader
from monai.engines import Evaluator, SupervisedTrainer
from monai.handlers import CheckpointSaver, ValidationHandler
from monai.transforms import Compose, OneOf, RandAffined, RandFlipd, RandGaussianNoised
from torch import nn

from semisam_o1.cli import main
from semisam_o1.errors import of_the_machine
from semisam_o1.files import write_json
from semisam_o1.job.resume import Journal
from semisam_o1.methods.dan import AdversarialLoss, AdversarialNetwork, Discriminator
from semisam_o1.methods.state import TrainingState, randomizables
from semisam_o1.methods.two_stream import LossProgress, PolynomialDecay, TwoStreamSampler, prepare_batch
from semisam_o1.runfolder import LAYOUT, RunFolder
from semisam_o1.types import DatasetError
from tests.jobs import small

STEPS = ["features", "propagation/first", "propagation/fusion"]
STEPS += ["round_1/training", "round_1/prediction", "round_1/refinement"]


# The journal

MADE_OF = {  # which ids each step is made of
    "features": {"feature_voxels", "split"},
    "propagation/first": {"feature_voxels", "split", "seed"},
    "propagation/fusion": {"feature_voxels", "split"},
    "round_1/training": {"split", "max_iterations", "seed"},
    "round_1/prediction": {"split"},
    "round_1/refinement": {"split", "feature_voxels", "guard"},
}


def journal(folder, steps=(), **settings) -> Journal:
    settings = {"feature_voxels": 10, "seed": 1, "max_iterations": 5, "guard": True, "split": "pool"} | settings
    made = Journal(RunFolder(folder), settings, MADE_OF.__getitem__)
    if steps:
        made.begin()
        made.cleaned()
        for step in steps:
            made.add(step)
    return made


def test_steps_are_taken_up_again(tmp_path):
    assert not journal(tmp_path).open()
    journal(tmp_path, STEPS)
    again = journal(tmp_path, checkpoint_seconds=5, output_dir="elsewhere", preset="standard", threads=1)
    assert again.open() and again.done == STEPS and again.half_done_fits


def test_a_round_that_was_not_reached_cannot_be_restarted(tmp_path):
    journal(tmp_path, STEPS)
    with pytest.raises(DatasetError, match="has not reached round 7"):
        journal(tmp_path).open("round_7")


@pytest.mark.parametrize(
    ("changed", "step"),
    [
        ({"feature_voxels": 11}, "features"),
        ({"split": "test"}, "features"),  # scans without features yet
        ({"seed": 2}, "propagation"),
        ({"max_iterations": 6}, "round_1"),
        ({"guard": False}, "round_1/refinement"),
    ],
)
def test_changed_settings_that_make_steps_stale_are_said(tmp_path, changed, step):
    journal(tmp_path, STEPS)
    (name,) = changed
    with pytest.raises(ValueError, match=f"{name} was .*, is .*--restart-from {step}"):
        journal(tmp_path, **changed).open()
    again = journal(tmp_path, **changed)
    assert again.open(restart_from=step)
    kept = {"features": 0, "propagation": 1, "round_1": 3, "round_1/refinement": 5}[step]
    assert again.done == STEPS[:kept] and not again.half_done_fits
    journal(tmp_path, **changed).open()  # the new settings are on record


def test_a_start_that_is_killed_before_it_has_removed_what_does_not_fit_leaves_none_to_the_next(tmp_path):
    journal(tmp_path, STEPS)
    for restart_from in ("round_1", None):
        again = journal(tmp_path, max_iterations=6)
        assert again.open(restart_from) and again.done == STEPS[:3] and not again.half_done_fits
    again.cleaned()
    again = journal(tmp_path, max_iterations=6)
    assert again.open() and again.half_done_fits


def with_templates(folder, *templates, root=None, **settings) -> Journal:
    """A journal of a data set of scans a and b in which ``templates`` are templates."""
    root = root or folder / "data"
    root.mkdir(exist_ok=True)
    for name in "ab":
        (root / name).write_text(name)
    files = {f"cohort#{'template' if name in templates else 'pool'} {name}": root / name for name in "ab"}
    files |= {f"cohort#label {name}": root / name for name in templates}
    settings = {"template": None, "dataset_dir": str(root)} | settings
    return Journal(RunFolder(folder), settings, lambda step: {"cohort", "template"}, files)


def begun_with_a(folder, **settings) -> Journal:
    made = with_templates(folder, "a", **settings)
    made.begin()
    made.cleaned()
    made.add("features")
    return made


def test_a_scan_that_got_a_label_is_named_and_how_to_keep_the_earlier_template(tmp_path):
    begun_with_a(tmp_path)
    said = "(b is a template now: it has a label, and without train.txt every labelled scan is one), so its results"
    with pytest.raises(DatasetError, match=re.escape(said)) as refusal:
        with_templates(tmp_path, "a", "b").open()
    assert (
        "use the old settings (--template a learns from these alone, as before), or add --restart-from features."
        in (str(refusal.value))
    )
    assert with_templates(tmp_path, "a", **{"template#0": "a"}).open()


def test_another_template_of_a_list_is_named_and_names_stay_pseudonyms(tmp_path):
    begun_with_a(tmp_path)
    (tmp_path / "data" / "train.txt").write_text("b")
    with pytest.raises(
        DatasetError, match=r"\(a is no template any more; b is a template now\).*--template and the real"
    ):
        with_templates(tmp_path, "b", pseudonyms="key.csv").open()


def test_naming_the_template_in_use_is_no_change(tmp_path):
    kept = begun_with_a(tmp_path)
    again = with_templates(tmp_path, "a", template=["a"])
    assert again.open() and again.half_done_fits
    settings = kept.settings | {"template": ["a"]}  # as journals of earlier versions hold it
    write_json(kept.run.journal, {"layout": LAYOUT, "done": ["features"], "settings": settings, "files": kept.files})
    assert with_templates(tmp_path, "a").open()


def test_a_restart_after_the_stale_step_is_refused(tmp_path):
    journal(tmp_path, STEPS)
    with pytest.raises(ValueError, match="--restart-from features"):
        journal(tmp_path, feature_voxels=11).open(restart_from="round_1")


def test_a_change_that_touches_no_finished_step_goes_through_but_nothing_half_done_is_used(tmp_path):
    journal(tmp_path, STEPS[:2])
    again = journal(tmp_path, max_iterations=6)
    assert again.open() and again.done == STEPS[:2] and not again.half_done_fits


def test_unknown_steps_are_refused(tmp_path):
    journal(tmp_path, STEPS)
    with pytest.raises(ValueError, match="restart_from 'training': expected features, propagation, round_1"):
        journal(tmp_path).open(restart_from="training")


# A training


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Dropout(0.3)
        self.head = nn.Conv3d(4, 2, 1)

    def forward(self, image):
        return self.head(self.drop(torch.relu(self.norm(self.conv(image)))))


class Validator(Evaluator):
    """Finds after an epoch what ``scores`` says of it."""

    def __init__(self, scores, saver):
        super().__init__(torch.device("cpu"), [0], val_handlers=[saver])
        self.scores, self.state.key_metric_name = scores, "dice"

    def _iteration(self, engine, batch):
        self.state.metrics["dice"] = self.scores[self.state.epoch - 1]
        return {}


def trainer(folder, seconds=0.0, scores=None):
    """A trainer with all that holds state: two networks, two optimisers, an average, a sampler, random transforms."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    items = [
        {"image": torch.randn(1, 16, 16, 16, generator=draw), "label": torch.ones(1, 16, 16, 16), "labelled": n == 0}
        for n in range(4)
    ]
    keys = ["image", "label"]
    transform = Compose(
        [
            OneOf([RandFlipd(keys, prob=0.5, spatial_axis=0), RandFlipd(keys, prob=0.5, spatial_axis=1)]),
            RandAffined(keys, prob=0.8, rotate_range=0.3, mode=["bilinear", "nearest"]),
            RandGaussianNoised("image", prob=0.5, std=0.3),
        ]
    )
    network, loss = Network(), AdversarialLoss()
    sampler = TwoStreamSampler(items, 1, 2, num_batches=4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    method = AdversarialNetwork(network, loss, num_classes=2)
    method.discriminator = Discriminator(2, width=4)  # the published one is large beside all else here
    method.optimizer = torch.optim.Adam(method.discriminator.parameters(), lr=1e-4)
    dataset = CacheDataset(items, transform, progress=False)
    objects = {"network": network, "optimizer": optimizer}
    validations = []
    if scores:
        saver = CheckpointSaver(str(folder), {"model": network}, save_key_metric=True, key_metric_filename="best.pth")
        objects["best"] = saver._key_metric_checkpoint
        validations = [ValidationHandler(1, Validator(scores, saver))]
    state = TrainingState(folder, 1, method, objects, sampler, dataset.transform, seconds)
    loader = DataLoader(dataset, batch_sampler=sampler, generator=torch.Generator().manual_seed(5), num_workers=0)
    engine = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=3, epoch_length=4, train_data_loader=loader, network=network,
        optimizer=optimizer, loss_function=loss, prepare_batch=prepare_batch, decollate=False,
        train_handlers=[LossProgress(loss), PolynomialDecay(optimizer), method, *validations, state],
    )  # fmt: skip
    return engine, state, method


class Killed(BaseException):
    pass


def kill_at(event, number):
    """A handler's event and itself, which ends the process as it were."""

    def kill(engine):
        if engine.state.get_event_attrib_value(event) == number:
            raise Killed

    return event, kill


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The states that a training which was not killed ends with."""
    engine, _, method = trainer(tmp_path_factory.mktemp("whole"), seconds=1e9)
    engine.run()
    return {name: thing.state_dict() for name, thing in method.objects.items()}


@pytest.mark.parametrize("killed_after", [1, 3, 4, 5, 8, 11, 12])
def test_a_training_goes_on_to_the_bit(tmp_path, expected, killed_after):
    """An epoch's last iteration is done again, since what follows the epoch was not done."""
    engine, state, method = trainer(tmp_path)

    engine.add_event_handler(*kill_at(Events.ITERATION_COMPLETED, killed_after))
    with pytest.raises(Killed):
        engine.run()
    torch.rand(7), np.random.rand(3), random.random()  # whatever happens in between
    engine, state, method = trainer(tmp_path)
    kept = killed_after if killed_after % 4 else killed_after - 1
    assert state.resume(engine) == kept
    seen = []
    engine.add_event_handler(Events.ITERATION_STARTED, lambda engine: seen.append(engine.state.iteration))
    engine.run()
    assert seen == list(range(kept + 1, 13))
    for name, thing in method.objects.items():
        torch.testing.assert_close(thing.state_dict(), expected[name], rtol=0, atol=0)
    assert not (tmp_path / "round_1" / "training.pt").exists()


@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED])
def test_the_state_that_validation_chose_is_not_lost_in_a_kill(tmp_path, event):
    """The second epoch is the best of three, and the kill comes at its end: before its validation, or after."""
    scores, number = (0.1, 0.3, 0.2), 8 if event is Events.ITERATION_COMPLETED else 2
    trainer(tmp_path / "whole", 1e9, scores)[0].run()
    engine, *_ = trainer(tmp_path, 0, scores)
    engine.add_event_handler(*kill_at(event, number))
    with pytest.raises(Killed):
        engine.run()
    engine, state, _ = trainer(tmp_path, 0, scores)
    assert state.resume(engine) == (7 if number == 8 else 8)
    engine.run()
    expected, found = (torch.load(f / "best.pth", weights_only=True) for f in (tmp_path / "whole", tmp_path))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(found["head.weight"], engine.network.state_dict()["head.weight"])


def test_every_random_state_is_found():
    inner = RandAffined("image", prob=1)
    found = list(randomizables(Compose([OneOf([inner]), RandGaussianNoised("image")])))
    assert inner in found and inner.rand_affine in found and len({id(thing) for thing in found}) == len(found)


@pytest.mark.parametrize("text", ["file write failed: errno = 28, error message = 'No space left on device'"])
def test_a_full_disk_is_known_by_what_hdf5_says(text):
    assert of_the_machine(RuntimeError(text)) and not of_the_machine(RuntimeError("errno = 2, no such file"))


def test_other_settings_in_a_folder_in_use_are_refused(begun, phantom_dir, capsys):
    arguments = ["run", str(phantom_dir), "--output", str(begun), "--device", "cpu", "--seed", "5"]
    assert main([*arguments, *small()]) == 2
    assert "seed was 1337, is 5" in capsys.readouterr().err
    one_pass = small(num_rounds=0, label_fusion=False, quality_estimate=False)
    assert main([*arguments, "--restart-from", "propagation", *one_pass]) == 0
