"""Where tokens lie, told by ramps; what the store keeps, and when it holds its files stale."""

import hashlib
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from semisam_o1.data.grids import Grid
from semisam_o1.data.intensities import normalise_foreground
from semisam_o1.data.phantoms import grid_affine
from semisam_o1.encoders.base import Encoder
from semisam_o1.encoders.mind import mind
from semisam_o1.features import FeatureStore, TokenInferer, encoder_key
from semisam_o1.types import Case

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


# Where tokens lie


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


# The store


@pytest.fixture
def case(tmp_path):
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes(b"bytes of a scan")
    return Case("case.01", scan, None, "pool")


GRID = Grid(grid_affine((20, 22, 24), (1, 2, 3), "LPS", (5, 0, 9)), (20, 22, 24))


def tokens_and_affine():
    tokens = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(3)) + torch.arange(6.0).reshape(6, 1, 1, 1)
    return tokens, grid_affine((3, 4, 5), 2.5)


def filled(tmp_path, case, encoder=None, spacing=1.5, **settings):
    store = FeatureStore(tmp_path / "features", encoder or stub(), spacing, **settings)
    store.save(case, *tokens_and_affine(), GRID)
    return store


@pytest.mark.parametrize("dtype, tolerance", [("float16", 2e-3), ("float32", 0)])
def test_what_is_saved_is_loaded(tmp_path, case, dtype, tolerance):
    store = filled(tmp_path, case, dtype=dtype)
    tokens, affine = tokens_and_affine()
    found = store.load("case.01")
    assert found.tokens.dtype == torch.float32
    np.testing.assert_allclose(found.tokens, tokens, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(found.affine, affine)
    np.testing.assert_array_equal(found.scan.affine, GRID.affine)
    assert found.scan.shape == GRID.shape
    assert found.step_mm == pytest.approx(2.5)
    with h5py.File(store.path("case.01")) as file:
        assert file["tokens"].dtype == dtype
        assert file.attrs["encoder"] == "stub" and file.attrs["spacing_mm"] == 1.5
    assert [p.name for p in (tmp_path / "features").iterdir()] == ["case.01.h5"]  # and nothing written aside


def test_half_precision_halves_the_tokens_alone(tmp_path, case):
    tokens, _ = tokens_and_affine()
    found = filled(tmp_path, case).load("case.01")
    np.testing.assert_array_equal(found.tokens, tokens.half().float())
    assert not torch.equal(found.tokens, tokens)


def test_the_descriptor_is_the_mean_of_unit_length(tmp_path, case):
    store = filled(tmp_path, case)
    mean = tokens_and_affine()[0].mean((1, 2, 3)).numpy()
    expected = mean / np.linalg.norm(mean)
    np.testing.assert_allclose(store.load("case.01").descriptor, expected, atol=1e-6)
    np.testing.assert_allclose(store.descriptors(["case.01"] * 2), [expected] * 2, atol=1e-6)


def test_a_case_without_features_says_what_to_do(tmp_path, case):
    store = FeatureStore(tmp_path / "features", stub(), 1.5)
    assert store.missing([case]) == [case]
    with pytest.raises(
        FileNotFoundError, match="case case.01: no features in .*features; run the stage 'features' first"
    ):
        store.load("case.01")


def test_fresh_features_are_not_missing(tmp_path, case):
    other = Case("other", case.image, None, "pool")
    store = filled(tmp_path, case)
    assert store.missing([case, other]) == [other]
    assert FeatureStore(tmp_path / "features", stub(), 1.5).missing([case]) == []  # nor in another session
    store.save(other, *tokens_and_affine(), GRID)
    assert store.missing([case, other]) == []


def test_other_bytes_of_the_scan_make_features_stale(tmp_path, case):
    store = filled(tmp_path, case)
    case.image.write_bytes(b"Bytes of a scan")
    assert store.missing([case]) == [case]
    store.save(case, *tokens_and_affine(), GRID)
    assert store.missing([case]) == []


class Weighted(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.conv = nn.Conv3d(1, 2, width)
        nn.init.constant_(self.conv.weight, 0.5)
        nn.init.zeros_(self.conv.bias)


@pytest.mark.parametrize(
    "change",
    [
        dict(spacing=1.6),
        dict(spacing=None),
        dict(dtype="float32"),
        dict(settings="t2"),
        dict(name="another"),
        dict(patch=2),
        dict(window=16),
        dict(normalise=torch.sigmoid),
        dict(weight=0.25),
        dict(width=5),
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_or_weights_make_features_stale(tmp_path, case, change):
    def store(
        spacing=1.5,
        dtype="float16",
        settings="",
        name="e",
        patch=1,
        window=None,
        normalise=None,
        weight=0.5,
        width=3,
    ):
        network = Weighted(width)
        network.conv.weight.data[0, 0, 0, 0, 0] = weight
        encoder = Encoder(network, name, patch, window, normalise)
        return FeatureStore(tmp_path / "features", encoder, spacing, dtype, settings)

    store().save(case, *tokens_and_affine(), GRID)
    assert store().missing([case]) == []
    assert store(**change).missing([case]) == [case]


def test_settings_of_an_encoder_without_weights_count():
    keys = [encoder_key(mind(**s)) for s in ({}, {"dilations": (1, 2)}, {"boxes": (3, 7)}, {"statistics_weight": 1.0})]
    assert len(set(keys)) == 4
    assert encoder_key(mind()) == keys[0]


PROGRAM = """
from torch import nn
from semisam_o1 import features
from semisam_o1.encoders.base import Encoder
from semisam_o1.encoders.mind import mind
from semisam_o1.data.intensities import normalise_foreground
from semisam_o1.features import encoder_key
print(encoder_key(mind()), encoder_key(Encoder(nn.AvgPool3d(2), "s", 2, 4, normalise_foreground)))
"""


@pytest.fixture(scope="module")
def keys_elsewhere():
    """The keys of two encoders as another process works them out."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_the_key_is_the_same_in_another_process(keys_elsewhere):
    assert keys_elsewhere[0] == encoder_key(mind())


def test_the_key_of_an_encoder_that_normalises_is_the_same_in_another_process(keys_elsewhere):
    assert keys_elsewhere[1] == encoder_key(Encoder(nn.AvgPool3d(2), "s", 2, 4, normalise_foreground))


def test_the_file_says_what_it_was_made_from(tmp_path, case):
    store = FeatureStore(tmp_path, stub(), 1.5, settings="('image', 'foreground')")
    store.save(case, *tokens_and_affine(), GRID)
    with h5py.File(store.path("case.01"), "r") as file:
        found = dict(file.attrs)
    assert found["scan_sha256"] == hashlib.sha256(b"bytes of a scan").hexdigest()
    assert found["encoder_sha256"] == encoder_key(stub())
    assert (found["encoder"], found["spacing_mm"], found["scan_bytes"]) == ("stub", 1.5, 15)
    assert "foreground" in found["settings"] and "float16" in found["settings"]


def set_time(path, ns):
    os.utime(path, ns=(ns, ns))


def test_a_scan_of_the_same_size_and_time_is_not_read_again(tmp_path, case):
    long_ago = case.image.stat().st_mtime_ns - 60 * 10**9
    set_time(case.image, long_ago)
    store = filled(tmp_path, case)
    case.image.write_bytes(case.image.read_bytes()[::-1])  # which reading it would tell
    set_time(case.image, long_ago)
    assert store.missing([case]) == []
    set_time(case.image, long_ago + 1)
    assert store.missing([case]) == [case]


def test_a_touched_scan_of_the_same_bytes_is_fresh(tmp_path, case):
    store = filled(tmp_path, case)
    set_time(case.image, case.image.stat().st_mtime_ns - 60 * 10**9)
    assert store.missing([case]) == []


def test_a_change_right_after_the_features_is_seen_though_clocks_are_coarse(tmp_path, case):
    store = filled(tmp_path, case)
    then = case.image.stat().st_mtime_ns
    case.image.write_bytes(b"Bytes of a scan")
    set_time(case.image, then)
    assert store.missing([case]) == [case]


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_counts_as_missing(tmp_path, case, share):
    store = filled(tmp_path, case)
    content = store.path("case.01").read_bytes()
    store.path("case.01").write_bytes(content[: int(share * len(content))])
    assert store.missing([case]) == [case]


@pytest.mark.parametrize("foreign", [b"not HDF5", None])
def test_a_foreign_file_counts_as_missing(tmp_path, case, foreign):
    store = filled(tmp_path, case)
    if foreign:
        store.path("case.01").write_bytes(foreign)
    else:
        with h5py.File(store.path("case.01"), "w") as file:
            file["tokens"] = np.zeros(3)
    assert store.missing([case]) == [case]


def test_a_save_that_fails_leaves_the_last_whole_file(tmp_path, case):
    store = filled(tmp_path, case)
    before = store.path("case.01").read_bytes()
    with pytest.raises(FileNotFoundError):
        store.save(Case("case.01", tmp_path / "gone.nii", None, "pool"), *tokens_and_affine(), GRID)
    assert store.path("case.01").read_bytes() == before
    assert store.missing([case]) == []


def test_a_save_that_fails_leaves_nothing_aside(tmp_path, case):
    store = filled(tmp_path, case)
    with pytest.raises(FileNotFoundError):
        store.save(Case("new", tmp_path / "gone.nii", None, "pool"), *tokens_and_affine(), GRID)
    assert [p.name for p in (tmp_path / "features").iterdir()] == ["case.01.h5"]
