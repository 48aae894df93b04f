"""Shared parts of all methods: batches of templates and pool scans, the loss terms, and their schedules."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from monai.losses import DiceCELoss, DiceLoss
from monai.utils import CommonKeys as Keys
from torch import nn
from torch.utils.data import Sampler

log = logging.getLogger("semisam_o1")


class TwoStreamSampler(Sampler):
    """Batches of indices: ``labelled`` templates, then ``pool`` scans. Each stream is shuffled again when it runs out.

    If one stream is empty, the other fills the batch. The pool's order uses torch's global random state, the templates'
    order its own generator, so the number of templates does not change the pool's order.

    Args:
        items: the dataset's dictionaries; templates have a true ``labelled`` or no such key.
        labelled, pool: number of each in a batch.
        num_batches: batches per epoch.
        seed: of the templates' order.
        anew: as published, shuffle both streams again after every pass over the templates.
    """

    def __init__(
        self, items: Sequence[dict], labelled: int, pool: int, num_batches: int, seed: int = 0, anew: bool = False
    ):
        marks = [item.get("labelled", True) for item in items]
        self.streams = [[i for i, mark in enumerate(marks) if mark], [i for i, mark in enumerate(marks) if not mark]]
        sizes = [labelled, pool]
        for one, other in ((0, 1), (1, 0)):
            if not self.streams[one]:
                sizes[other], sizes[one] = labelled + pool, 0
        self.sizes, self.num_batches = sizes, num_batches
        self._waiting: list[list[int]] = [[], []]
        self._pass = max(1, len(self.streams[0]) // max(1, sizes[0])) if anew else None
        self._batches = 0
        self._draws = [torch.Generator().manual_seed(seed), None]  # None: torch's global random state

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.num_batches):
            if self._pass and self._batches % self._pass == 0:
                self._waiting = [[], []]
            self._batches += 1
            yield [self._next(stream) for stream in (0, 1) for _ in range(self.sizes[stream])]

    def state(self) -> dict:
        """The remaining indices of each stream, and the state of the templates' generator."""
        waiting = [list(waiting) for waiting in self._waiting]
        return {"waiting": waiting, "batches": self._batches, "random": self._draws[0].get_state()}

    def set_state(self, state: dict) -> None:
        self._waiting = [list(waiting) for waiting in state["waiting"]]
        self._batches = state["batches"]
        self._draws[0].set_state(state["random"])

    def _next(self, stream: int) -> int:
        if not self._waiting[stream]:
            order = torch.randperm(len(self.streams[stream]), generator=self._draws[stream]).tolist()
            self._waiting[stream] = [self.streams[stream][i] for i in order]
        return self._waiting[stream].pop()


def prepare_batch(batch: dict, device=None, non_blocking: bool = False, **kwargs) -> tuple[torch.Tensor, dict]:
    """For the trainer: image (B, 1, H, W, D), and a target of ``label`` (B, 1, H, W, D) and ``labelled`` (B,) bool."""
    image = batch[Keys.IMAGE].to(device, non_blocking=non_blocking, **kwargs)
    label = batch[Keys.LABEL].to(device, non_blocking=non_blocking, **kwargs)
    labelled = torch.as_tensor(batch.get("labelled", [True] * len(image)), device=image.device)
    return image, {"label": label, "labelled": labelled}


def published_loss() -> DiceCELoss:
    """(CE + Dice)/2 of logits (B, C, H, W, D) and labels (B, 1, H, W, D); squared Dice with background."""
    return DiceCELoss(
        to_onehot_y=True, softmax=True, squared_pred=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5,
        lambda_dice=0.5, lambda_ce=0.5,
    )  # fmt: skip


class PresentDiceCE(nn.Module):
    """`published_loss`, but with the mean Dice over the classes that the labels (B, 1, H, W, D) hold.

    The Dice loss of a class that they lack is near 1 whatever the network says of it, and pushes its probability down
    without limit once that is small. The cross-entropy already accounts for voxels called such a class.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dice_a_class = DiceLoss(
            to_onehot_y=True, softmax=True, squared_pred=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5,
            reduction="none",
        )  # fmt: skip

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        numbers = label[:, 0].long()
        present = numbers.flatten().bincount(minlength=logits.shape[1]) > 0
        dice = self.dice_a_class(logits, label).flatten()[present].mean()
        return 0.5 * dice + 0.5 * F.cross_entropy(logits, numbers)


def gaussian_ramp(fraction: float) -> float:
    """exp(-5 (1 - t)^2), t = ``fraction`` clipped to [0, 1] (Laine and Aila, ICLR 2017)."""
    return math.exp(-5 * (1 - min(max(fraction, 0.0), 1.0)) ** 2)


class TwoStreamLoss(nn.Module):
    """L_sup + mu(i) L_pseudo + lambda(i) L_cons on a batch of two streams, at iteration i of I.

    L_sup is `segmentation` on the labelled half, L_pseudo is `segmentation` on the rest against the pseudo-labels.
    mu(i) = min(1, i / (pseudo_rampup I)); lambda(i) = consistency x gaussian_ramp(i / (consistency_rampup I)).
    With ``published_ramp``, lambda depends only on i, as published: consistency x gaussian_ramp(min(i div 150, r) / r)
    with r = consistency_rampup. ``absent_classes``: the default `segmentation` is `published_loss`, else
    `PresentDiceCE`. A ramp of length 0 gives full weight from the start. A method defines L_cons in
    `consistency_term`.

    ``weighted`` has the last weighted value of each term, for the log.
    """

    def __init__(
        self,
        segmentation: nn.Module | None = None,
        consistency: float = 0.1,
        consistency_rampup: float | None = None,
        pseudo_rampup: float = 0.3,
        published_ramp: bool = False,
        absent_classes: bool = True,
    ):
        super().__init__()
        self.segmentation = segmentation or (published_loss() if absent_classes else PresentDiceCE())
        self.consistency = consistency
        self.consistency_rampup = (200 if published_ramp else 0.4) if consistency_rampup is None else consistency_rampup
        self.pseudo_rampup, self.published_ramp = pseudo_rampup, published_ramp
        self.iteration, self.iterations = 0, 1
        self.weighted: dict[str, float] = {}

    def consistency_weight(self) -> float:
        """lambda at the current iteration."""
        if self.published_ramp:
            ramp = self.consistency_rampup
            return self.consistency * (gaussian_ramp(min(self.iteration // 150, ramp) / ramp) if ramp else 1.0)
        return self.consistency * gaussian_ramp(self._share_of(self.consistency_rampup))

    def pseudo_weight(self) -> float:
        """mu at the current iteration."""
        return min(1.0, self._share_of(self.pseudo_rampup))

    def _share_of(self, rampup: float) -> float:
        """Progress of a ramp over the share ``rampup`` of all iterations; 1 for a ramp of length 0."""
        return self.iteration / (rampup * self.iterations) if rampup else 1.0

    def consistency_term(self, logits: torch.Tensor, labelled: torch.Tensor) -> torch.Tensor | None:
        """L_cons, the loss term that a method adds; None if there is none."""
        return None

    def forward(self, logits: torch.Tensor, target: dict) -> torch.Tensor:
        """logits (B, C, H, W, D); target: see `prepare_batch`."""
        labelled, terms = target["labelled"], {}
        if labelled.any():
            terms["supervised"] = self.segmentation(logits[labelled], target["label"][labelled])
        if not labelled.all():
            pseudo = self.segmentation(logits[~labelled], target["label"][~labelled])
            terms["pseudo"] = self.pseudo_weight() * pseudo
        if (extra := self.consistency_term(logits, labelled)) is not None:
            terms["consistency"] = self.consistency_weight() * extra
        self.weighted = {name: float(value.detach()) for name, value in terms.items()}
        return sum(terms.values())


class LossProgress:
    """Handler: sets the iteration of a `TwoStreamLoss`, and logs the weighted value of each term once per epoch."""

    def __init__(self, loss: TwoStreamLoss):
        self.loss = loss

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self.iteration_started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def iteration_started(self, engine: Engine) -> None:
        self.loss.iteration = engine.state.iteration - 1
        self.loss.iterations = engine.state.max_epochs * engine.state.epoch_length

    def epoch_completed(self, engine: Engine) -> None:
        sizes = ", ".join(f"{name} {size:.3g}" for name, size in self.loss.weighted.items())
        log.info("iteration %d of %d: %s", engine.state.iteration, self.loss.iterations, sizes)


class PolynomialDecay:
    """Handler: learning rate = base x (1 - i/I)^power before iteration i of I.

    ``late``: as published, the rate is set after a step, so from the second iteration on it is one iteration late.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, power: float = 0.9, late: bool = False):
        self.optimizer, self.power, self.late = optimizer, power, late
        self.base = [group["lr"] for group in optimizer.param_groups]

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        total = engine.state.max_epochs * engine.state.epoch_length
        iteration = max(engine.state.iteration - 1 - self.late, 0)
        factor = (1 - iteration / total) ** self.power
        for group, base in zip(self.optimizer.param_groups, self.base):
            group["lr"] = base * factor
