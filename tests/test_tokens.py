"""Where tokens lie, told by ramps."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from semisam_o1.data.phantoms import grid_affine
from semisam_o1.encoders.base import Encoder
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.features import TokenInferer

PATCH, WINDOW = 8, 32


class Window(nn.Module):
    """Average pooling that says what it was given: means of patches, in windows of one size alone."""

    def __init__(self, patch, window):
        super().__init__()
        self.patch, self.window, self.calls = patch, window, 0

    def forward(self, volume):
        self.calls += len(volume)
        if self.window is not None:
            assert volume.shape[2:] == (self.window,) * 3
        return nn.functional.avg_pool3d(volume, self.patch)


def stub(patch=PATCH, window=None):
    return Encoder(Window(patch, window), "stub", patch, window)


def ramps(shape, affine):
    """Three volumes (1, 1, H, W, D): R, A and S of each voxel, in mm."""
    index = np.moveaxis(np.indices(shape, dtype=float), 0, -1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    return [MetaTensor(torch.tensor(world[None, None, ..., n]), affine=affine) for n in range(3)]


def places(tokens):
    """Positions (H', W', D', 3) in mm that the tokens' affine claims."""
    affine = np.asarray(tokens.affine)
    index = np.moveaxis(np.indices(tokens.shape[2:], dtype=float), 0, -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def whole_tokens(tokens, shape, affine, patch):
    """Whether each token's patch lies inside the scan, by its claimed position: (H', W', D') bool."""
    voxel = (places(tokens) - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    reach = (patch - 1) / 2 - 1e-6
    return ((voxel - reach >= -1e-3) & (voxel + reach <= np.array(shape) - 1 + 1e-3)).all(-1)


@pytest.mark.parametrize(
    "shape, window, crop, expected",
    [
        ((40, 32, 24), None, None, (5, 4, 3)),
        ((37, 34, 29), None, None, (5, 5, 4)),  # no side a multiple of the patch
        ((24, 20, 31), WINDOW, None, (4, 4, 4)),  # smaller than the window
        ((48, 40, 56), WINDOW, None, (6, 5, 7)),  # larger
        ((51, 27, 45), WINDOW, None, (7, 4, 6)),  # larger, smaller and odd
        ((24, 21, 31), WINDOW, "center", (4, 4, 4)),
        ((48, 51, 43), WINDOW, "center", (4, 4, 4)),
        ((20, 51, 33), WINDOW, "center", (4, 4, 4)),
    ],
)
def test_tokens_lie_where_their_affine_says(shape, window, crop, expected):
    affine = grid_affine(shape, (1.5, 1.5, 1.5), "RAS", (8, -6, 15))
    affine[:3, 3] += (10, -20, 5)
    for axis, ramp in enumerate(ramps(shape, affine)):
        tokens = TokenInferer(crop=crop)(ramp, stub(window=window))
        assert tokens.shape == (1, 1, *expected)
        inside = whole_tokens(tokens, shape, affine, PATCH)
        assert inside.sum() >= 4
        found = tokens.as_tensor()[0, 0].numpy()
        np.testing.assert_allclose(found[inside], places(tokens)[inside][:, axis], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(np.asarray(tokens.affine)[:3, :3], axis=0), PATCH * 1.5)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("crop", [None, "center"])
@pytest.mark.parametrize("step", [2, 4])
def test_finer_tokens_lie_where_their_affine_says(step, crop, window):
    shape = (24, 21, 31) if window else (24, 16, 32)
    affine = grid_affine(shape, (1.5, 1.5, 1.5), "RAS", (8, -6, 15))
    for axis, ramp in enumerate(ramps(shape, affine)):
        coarse = TokenInferer(crop=crop)(ramp, stub(window=window))
        tokens = TokenInferer(crop=crop, step=step)(ramp, stub(window=window))
        assert tokens.shape[2:] == tuple(n * PATCH // step for n in coarse.shape[2:])
        inside = whole_tokens(tokens, shape, affine, PATCH)
        assert inside.sum() >= 30
        found = tokens.as_tensor()[0, 0].numpy()
        np.testing.assert_allclose(found[inside], places(tokens)[inside][:, axis], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(np.asarray(tokens.affine)[:3, :3], axis=0), step * 1.5)


def test_a_finer_step_than_the_patch_divides_it():
    with pytest.raises(ValueError, match="every 3 voxels: expected a divisor of the encoder's patch size 8"):
        TokenInferer(step=3)(torch.zeros(1, 1, 16, 16, 16), stub())


@pytest.mark.parametrize("overlap, windows", [(0.0, 8), (0.25, 8), (0.5, 27), (0.75, 125)])
def test_windows_overlap_as_told_and_start_on_whole_tokens(overlap, windows):
    encoder = stub(window=WINDOW)
    ramp = ramps((64, 64, 64), np.eye(4))[0] if overlap != 0.25 else ramps((56, 56, 56), np.eye(4))[0]
    tokens = TokenInferer(overlap, sw_batch_size=3)(ramp, encoder)
    assert encoder.network.calls == windows
    np.testing.assert_allclose(tokens.as_tensor()[0, 0].numpy(), places(tokens)[..., 0], atol=1e-3)


def test_the_middle_is_cropped_and_zeros_are_padded():
    volume = torch.rand(1, 1, 36, 20, 32, generator=torch.Generator().manual_seed(0)) + 1
    expected = np.pad(volume[0, 0, 2:34].numpy(), ((0, 0), (6, 6), (0, 0)))
    expected = expected.reshape(4, 8, 4, 8, 4, 8).mean((1, 3, 5))
    encoder = stub(window=WINDOW)
    found = TokenInferer(crop="center")(volume, encoder)
    assert encoder.network.calls == 1
    np.testing.assert_allclose(found.as_tensor()[0, 0], expected, atol=1e-5)


def test_the_border_is_continued_to_whole_patches():
    volume = torch.rand(1, 1, 14, 16, 9, generator=torch.Generator().manual_seed(1))
    expected = np.pad(volume[0, 0].numpy(), ((1, 1), (0, 0), (3, 4)), mode="edge")
    expected = expected.reshape(2, 8, 2, 8, 2, 8).mean((1, 3, 5))
    np.testing.assert_allclose(TokenInferer()(volume, stub()).as_tensor()[0, 0], expected, atol=1e-5)


def test_a_batched_affine_and_none():
    volume = ramps((16, 16, 16), np.eye(4))[0]
    volume.meta["affine"] = torch.as_tensor(np.diag([2.0, 3, 4, 1]))[None]
    batched, plain = TokenInferer()(volume, stub()), TokenInferer()(volume.as_tensor(), stub())
    np.testing.assert_allclose(
        batched.affine, np.diag([16, 24, 32, 1]) + np.array([[0, 0, 0, n] for n in (7, 10.5, 14, 0)])
    )
    np.testing.assert_allclose(plain.affine[:3, 3], 3.5)


def test_a_token_a_voxel_needs_no_padding():
    volume = MetaTensor(torch.rand(1, 1, 9, 10, 11), affine=np.diag([2.0, 2, 2, 1]))
    tokens = TokenInferer()(volume, mind(dilations=(1,), boxes=(3,)))
    assert tokens.shape == (1, 14, 9, 10, 11)
    np.testing.assert_allclose(tokens.affine, volume.affine)


def test_other_crops_are_refused():
    with pytest.raises(ValueError, match="crop 'middle': expected 'center' or None"):
        TokenInferer(crop="middle")


def test_windows_start_on_whole_tokens_whatever_the_sizes():
    """The share of a window is no exact fraction here, and MONAI cuts what the rounding leaves."""
    for patch, window, overlap in ((5, 55, 0.5), (2, 6, 0.6)):
        ramp = ramps((2 * window,) * 3, np.eye(4))[0]
        tokens = TokenInferer(overlap)(ramp, stub(patch, window))
        np.testing.assert_allclose(tokens.as_tensor()[0, 0].numpy(), places(tokens)[..., 0], atol=1e-3)
