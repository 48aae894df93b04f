"""Predictions over several views of a scan."""

import math

import pytest
import torch
from monai.inferers import SimpleInferer

from semisam_o1.networks.views import Views


class Brightness(torch.nn.Module):
    """Two classes; the second's score is the image, place by place: turns and mirrors with the scan."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return torch.cat([torch.zeros_like(x), x], 1)


class Lopsided(Brightness):
    """Scores the upper half of the first axis alone: what it says depends on how the scan lies."""

    def forward(self, x):
        weight = (torch.arange(x.shape[2]) >= x.shape[2] // 2).float()[:, None, None]
        return super().forward(x * weight)


def ball(side=24, radius=6.0):
    axes = torch.meshgrid(*[torch.arange(side) - (side - 1) / 2] * 3, indexing="ij")
    return torch.sigmoid(radius - torch.stack(axes).square().sum(0).sqrt())[None, None]


def test_each_view_comes_back_to_where_it_was():
    """A ball off the middle: turned there and back, mirrored there and back, the mean is the plain prediction."""
    image = ball().roll((4, -3, 2), (2, 3, 4)) * 4
    plain = Brightness()(image).softmax(1)
    network = Brightness()
    found = Views(SimpleInferer(), turn=0.3, flips=[0, 2])(image, network).softmax(1)
    assert len(network.seen) == 9
    assert (found - plain).abs().max() < 0.05  # what two interpolations blur
    moved = [float((view - image).abs().max()) for view in network.seen]
    assert moved[0] == 0 and min(moved[1:]) > 1


def test_flips_alone_are_exact():
    """By hand: the mean of the plain half and the mirrored half."""
    image = torch.randn(1, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    found = Views(SimpleInferer(), flips=[0])(image, Lopsided()).softmax(1)
    expected = (image.sigmoid() + 0.5) / 2  # either view scores a place or gives it even odds
    assert torch.allclose(found[:, 1:], expected, atol=1e-5)


def test_turns_are_of_the_angle_that_was_said():
    """A rod along the first axis, turned about the third: a place 15 voxels out moves by 15 tan(angle)."""
    image = torch.zeros(1, 1, 41, 41, 5)
    image[..., :, 20, 2] = 1.0
    network = Brightness()
    Views(SimpleInferer(), turn=0.2)(image, network)
    ends = [view[0, 0, 35, :, 2] for view in network.seen]
    middles = [float((end * torch.arange(41)).sum() / end.sum()) - 20 for end in ends if end.sum() > 0.3]
    assert sorted({round(middle) for middle in middles}) == [-3, 0, 3]
    assert max(middles) == pytest.approx(15 * math.tan(0.2), abs=0.2)


def test_thick_slices_are_turned_in_the_plane_alone():
    """Each slice has one value: no view changes it. The plain view and two turns are left."""
    image, network = torch.arange(6.0).expand(1, 1, 20, 20, 6), Brightness()
    Views(SimpleInferer(), turn=0.3, spacing=[1.0, 1.0, 4.0])(image, network)
    assert len(network.seen) == 3
    for view in network.seen:
        torch.testing.assert_close(view, image, rtol=0, atol=1e-4)
    even = Brightness()
    Views(SimpleInferer(), turn=0.3, spacing=1.0)(image, even)
    assert len(even.seen) == 7


def test_without_views_the_logits_are_left_alone():
    image = torch.randn(1, 1, 4, 4, 4)
    assert torch.equal(Views(SimpleInferer())(image, Brightness()), Brightness()(image))
