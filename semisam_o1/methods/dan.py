"""Deep adversarial network (Zhang et al., MICCAI 2017): a discriminator tells labelled from unlabelled predictions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys
from torch import nn

from semisam_o1 import processes
from semisam_o1.methods.average import WeightAverage
from semisam_o1.methods.two_stream import TwoStreamLoss

UNLABELLED, LABELLED = 0, 1
LEAST_SIDE = 16  # voxels, of the discriminator's input


class Discriminator(nn.Module):
    """Probabilities (B, C, H, W, D) and image (B, 1, H, W, D) -> logits (B, 2): whether the scan is labelled.

    4x4x4 convolutions with stride 2: one from each input to ``width`` channels, summed, then three to 2, 4 and 8 times
    ``width``; LeakyReLU 0.2 after each, Dropout3d 0.5 after the first three. Then the mean over the first ``pool``
    positions of each axis (as published; of a patch of 128 this keeps one corner of 8), or over all if ``pool`` is
    None, and a linear layer. Zeros follow a side below `LEAST_SIDE` voxels, up to this number.
    """

    def __init__(self, num_classes: int, width: int = 64, pool: int | None = None):
        super().__init__()
        self.conv0 = nn.Conv3d(num_classes, width, 4, 2, 1)
        self.conv1 = nn.Conv3d(1, width, 4, 2, 1)
        self.conv2 = nn.Conv3d(width, 2 * width, 4, 2, 1)
        self.conv3 = nn.Conv3d(2 * width, 4 * width, 4, 2, 1)
        self.conv4 = nn.Conv3d(4 * width, 8 * width, 4, 2, 1)
        self.classifier = nn.Linear(8 * width, 2)
        self.pool, self.dropout = pool, nn.Dropout3d(0.5)

    def forward(self, probabilities: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        lacks = [max(LEAST_SIDE - side, 0) for side in image.shape[2:]]
        if any(lacks):
            pads = [0, lacks[2], 0, lacks[1], 0, lacks[0]]
            probabilities, image = F.pad(probabilities, pads), F.pad(image, pads)
        x = self.conv0(probabilities) + self.conv1(image)
        for following in (self.conv2, self.conv3, self.conv4):
            x = following(self.dropout(F.leaky_relu(x, 0.2)))
        x = F.leaky_relu(x, 0.2)
        if self.pool is not None and min(x.shape[2:]) >= self.pool:
            x = x[:, :, : self.pool, : self.pool, : self.pool]
        return self.classifier(x.mean((2, 3, 4)))


class AdversarialLoss(TwoStreamLoss):
    """`TwoStreamLoss` plus the cross-entropy between the discriminator's output for pool predictions and "labelled"."""

    asked: tuple[Discriminator, torch.Tensor] | None = None  # and the image (B, 1, H, W, D); see `ask`

    def consistency_term(self, logits: torch.Tensor, labelled: torch.Tensor) -> torch.Tensor | None:
        if self.asked is None or labelled.all():
            return None
        discriminator, image = self.asked
        output = discriminator(logits[~labelled].softmax(1), image[~labelled])
        return F.cross_entropy(output, torch.full((len(output),), LABELLED, device=output.device))


class AdversarialNetwork(WeightAverage):
    """Handler: trains a discriminator after the network's step in each iteration.

    It trains on the whole batch, with the network in eval mode, using Adam (rate 1e-4, betas 0.9 and 0.99). ``alpha``,
    ``horizon``, ``start``: see `WeightAverage`.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: AdversarialLoss,
        num_classes: int,
        pool: int | None = None,
        learning_rate: float = 1e-4,
        alpha: float = 0.99,
        horizon: float | None = None,
        start: nn.Module | None = None,
    ):
        super().__init__(network, alpha, horizon, start)
        device = next(network.parameters()).device
        self.network, self.loss = network, loss
        self.discriminator = Discriminator(num_classes, pool=pool).to(device)
        self.trained = processes.shared(self.discriminator)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=learning_rate, betas=(0.9, 0.99))

    @property
    def objects(self) -> dict:
        return super().objects | {"discriminator": self.discriminator, "its_optimizer": self.optimizer}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.ask)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.train_discriminator)
        super().attach(engine)

    def ask(self, engine: Engine) -> None:
        """Pass the discriminator, in eval mode, and the batch's image to the loss."""
        self.loss.asked = self.discriminator.eval().requires_grad_(False), engine.state.output[Keys.IMAGE]

    def train_discriminator(self, engine: Engine) -> None:
        image, target = engine.state.output[Keys.IMAGE], engine.state.output[Keys.LABEL]["labelled"].long()
        self.network.eval()
        with torch.no_grad():
            probabilities = engine.inferer(image, self.network).softmax(1)
        self.network.train()
        self.discriminator.train().requires_grad_(True)
        self.optimizer.zero_grad()
        F.cross_entropy(self.trained(probabilities, image), target).backward()
        self.optimizer.step()
