"""What the store of features keeps, and when it holds its files stale."""

import hashlib
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from semisam_o1.data.grids import Grid
from semisam_o1.data.intensities import normalise_foreground
from semisam_o1.data.phantoms import grid_affine
from semisam_o1.encoders.base import Encoder
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.features import FeatureStore, encoder_key
from semisam_o1.types import Case


def stub():
    return Encoder(nn.AvgPool3d(8), "stub", 8, None)


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
from semisam_o1.encoders.mind_descriptors import mind
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
