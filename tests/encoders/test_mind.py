"""MIND descriptors against scipy and a voxel-by-voxel formula."""

import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter

from semisam_o1.encoders.mind_descriptors import MIND, box_mean, mind, mind_ssc


def volume(seed=0, shape=(7, 6, 8), batch=1):
    return torch.randn(batch, 1, *shape, generator=torch.Generator().manual_seed(seed))


def plain_ssc(image, dilation):
    """The twelve values at every voxel, (12, H, W, D), one voxel at a time."""
    shape = image.shape

    def value(place):
        return image[tuple(np.clip(place, 0, np.array(shape) - 1))]

    steps = [np.array(s) * dilation for s in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))]
    pairs = [(i, j) for i, j in itertools.combinations(range(6), 2) if (steps[i] + steps[j]).any()]
    squared = np.zeros((len(pairs), *shape))
    for place in np.ndindex(shape):
        for n, (i, j) in enumerate(pairs):
            squared[(n, *place)] = (value(place + steps[i]) - value(place + steps[j])) ** 2
    distance = np.stack([uniform_filter(channel, 3, mode="nearest") for channel in squared])
    distance -= distance.min(0)
    variance = distance.mean(0)
    return np.exp(-distance / np.clip(variance, 0.1 * variance.mean(), 10 * variance.mean()))


@pytest.mark.parametrize("size", [1, 3, 7])
def test_box_mean_is_scipys(size):
    batch = torch.randn(2, 3, 6, 9, 5, generator=torch.Generator().manual_seed(1))
    expected = uniform_filter(batch.double().numpy(), (1, 1, size, size, size), mode="nearest")
    np.testing.assert_allclose(box_mean(batch, size), expected, atol=1e-5)


@pytest.mark.parametrize("dilation", [1, 2])
def test_mind_ssc_is_the_plain_formula(dilation):
    image = volume()
    found = mind_ssc(image.double(), dilation)[0].numpy()
    expected = plain_ssc(image[0, 0].double().numpy(), dilation)
    assert found.shape == expected.shape == (12, 7, 6, 8)
    # the order of the pairs is no part of the definition, but it is one and the same at every voxel
    order = [int(np.abs(expected - channel).reshape(12, -1).max(1).argmin()) for channel in found]
    assert sorted(order) == list(range(12))
    np.testing.assert_allclose(found, expected[order], atol=1e-9)


def test_mind_ssc_of_a_ramp_by_hand():
    """Intensities rise by 1 a voxel along x: pairs of two neighbours off that axis see no difference."""
    ramp = torch.arange(12.0).reshape(1, 1, 12, 1, 1).expand(1, 1, 12, 9, 9).contiguous()
    found = mind_ssc(ramp, 1)[0, :, 6, 4, 4]
    # differences: 1 where one of the two lies on the axis (8 of 12), 0 elsewhere; their mean is 2/3
    assert sorted(found.tolist()) == pytest.approx([np.exp(-1.5)] * 8 + [1] * 4, rel=1e-4)


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_values_lie_above_zero_and_the_largest_is_one(dilation):
    found = mind_ssc(volume(2, (12, 10, 11)), dilation)
    assert found.min() > 0
    np.testing.assert_allclose(found.amax(1), 1)


@pytest.mark.parametrize("factor, shift", [(3.0, 0), (-0.5, 0), (1, 7.0), (20.0, -4.0)])
def test_neither_scale_nor_shift_of_the_intensities_matters(factor, shift):
    image = volume(3).double()
    np.testing.assert_allclose(mind_ssc(factor * image + shift, 2), mind_ssc(image, 2), atol=1e-9)


def test_a_uniform_volume_has_descriptors():
    found = MIND()(torch.full((1, 1, 6, 6, 6), 2.0))
    assert found.isfinite().all()
    np.testing.assert_allclose(found[:, :36], 1)


def test_local_statistics_are_mean_and_deviation():
    image = volume(4)
    found = MIND(dilations=(), boxes=(3, 5), statistics_weight=0.5)(image)[0]
    plain = image[0, 0].double().numpy()
    for n, size in enumerate((3, 5)):
        mean = uniform_filter(plain, size, mode="nearest")
        deviation = np.sqrt(uniform_filter((plain**2), size, mode="nearest") - mean**2)
        np.testing.assert_allclose(found[2 * n], 0.5 * mean, atol=1e-5)
        np.testing.assert_allclose(found[2 * n + 1], 0.5 * deviation, atol=1e-4)


def test_a_token_a_voxel():
    encoder = mind()
    assert (encoder.name, encoder.patch_size, encoder.input_size) == ("mind", 1, None)
    assert encoder(volume(5, (9, 8, 10))).shape == (1, 3 * 12 + 3 * 2, 9, 8, 10)
    assert mind(dilations=(1,), boxes=(3,))(volume(5)).shape == (1, 14, 7, 6, 8)
    assert not encoder.state_dict()


def test_tokens_lie_where_their_voxels_lie():
    """A volume moved by whole voxels has descriptors moved by as many, away from the border."""
    image = volume(6, (16, 14, 15))
    moved = torch.roll(image, (2, -1, 1), (2, 3, 4))
    # the one-dilation contexts alone: their scale is a mean over the volume, which barely changes
    found = [mind_ssc(x, 1) for x in (image, moved)]
    difference = torch.roll(found[0], (2, -1, 1), (2, 3, 4)) - found[1]
    assert difference[:, :, 5:-5, 5:-5, 5:-5].abs().max() < 1e-3


def test_a_batch_is_its_single_volumes():
    batch = volume(7, batch=3) * torch.tensor([1.0, 5, 0.2]).reshape(3, 1, 1, 1, 1)
    encoder = mind()
    for n in range(3):
        np.testing.assert_allclose(encoder(batch)[n : n + 1], encoder(batch[n : n + 1]), atol=1e-6)
