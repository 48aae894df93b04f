"""The SAM-Med3D encoder against published numbers and the plain formula; what its loader takes."""

import argparse
import copy
import importlib.util
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from semisam_o1.data.intensities import normalise_foreground
from semisam_o1.encoders.sam_med3d_encoder import SAMMed3DEncoder, load_sam_med3d, sam_med3d

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden files in {GOLDEN}")
# A grid of 3 in windows of 5; block 0 is windowed, block 1 global.
SMALL = dict(image_size=12, patch_size=4, depth=2, width=16, heads=2, window=5, global_blocks=(1,), out_channels=6)


class Model(nn.Module):
    """The encoder under the name that it has in a checkpoint."""

    def __init__(self, **architecture):
        super().__init__()
        self.image_encoder = SAMMed3DEncoder(**architecture)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    small = SAMMed3DEncoder(**SMALL).eval()
    for parameter in small.parameters():
        nn.init.normal_(parameter)
    return small


# Numbers


@pytest.mark.slow
@needs_golden
def test_published_features():
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    model = Model().eval()
    weights.fill(model)
    with torch.inference_mode():
        features = model.image_encoder(weights.sam_med3d_input())
    with np.load(GOLDEN / "sam_med3d_features.npz") as expected:
        np.testing.assert_allclose(features[0].numpy(), expected["features"], rtol=0, atol=2e-5)


@needs_golden
def test_names_and_shapes_are_the_checkpoints():
    expected = json.loads((GOLDEN / "sam_med3d_vit_b_ori.state_dict.json").read_text())
    expected = {key: shape for key, shape in expected.items() if key.startswith("image_encoder.")}
    with torch.device("meta"):
        model = Model()
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == expected


def plain_attention(attn, x):
    """Every token of the padded window on every other, the bias written out place by place."""
    batch, side, window, heads = x.shape[0], x.shape[1], attn.window, attn.heads
    x = nn.functional.pad(x, (0, 0) + (0, window - side) * 3)
    query, key, value = attn.qkv(x).reshape(batch, window**3, 3, heads, -1).permute(2, 0, 3, 1, 4)
    grid = query.unflatten(2, (window, window, window))
    places = torch.cartesian_prod(*[torch.arange(window)] * 3)
    (d, h, w), (dk, hk, wk) = places[:, None].unbind(-1), places[None].unbind(-1)

    def dot(i, j, k, table, row):
        i, j, k, row = torch.broadcast_tensors(i, j, k, row + window - 1)
        return (grid[:, :, i, j, k] * table[row]).sum(-1)

    bias = dot(d, h, w, attn.rel_pos_d, d - wk)
    bias = bias + dot(d, h, dk, attn.rel_pos_h, h - wk)
    bias = bias + dot(d, h, hk, attn.rel_pos_w, hk - wk)
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias).softmax(-1)
    out = (weights @ value).transpose(1, 2).reshape(batch, window, window, window, -1)
    return attn.proj(out[:, :side, :side, :side])


@pytest.mark.parametrize("block", [0, 1], ids=["windowed", "global"])
def test_attention_is_the_plain_formula(encoder, block):
    attn = encoder.blocks[block].attn.double()
    x = torch.randn(3, 3, 3, 3, 16, dtype=torch.float64)
    torch.testing.assert_close(attn(x), plain_attention(attn, x), rtol=0, atol=1e-9)


def test_encoder_is_the_plain_formula(encoder):
    volume = torch.randn(2, 1, 12, 12, 12, dtype=torch.float64)
    plain = copy.deepcopy(encoder.double())
    for block in plain.blocks:
        block.attn.forward = partial(plain_attention, block.attn)
    features = encoder(volume)
    assert features.shape == (2, 6, 3, 3, 3)
    torch.testing.assert_close(features, plain(volume), rtol=0, atol=1e-9)
    torch.testing.assert_close(features[1:], encoder(volume[1:]), rtol=0, atol=1e-9)  # none sees another


def test_strong_positions_do_not_overflow(encoder):
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name:
            parameter.data *= 1000
    assert encoder(torch.randn(1, 1, 12, 12, 12)).isfinite().all()


def test_sizes(encoder):
    assert (SAMMed3DEncoder.input_size, SAMMed3DEncoder.patch_size) == (128, 16)
    assert (encoder.input_size, encoder.patch_size) == (12, 4)


@pytest.mark.parametrize("shape", [(1, 1, 12, 12, 16), (1, 2, 12, 12, 12), (1, 12, 12, 12)])
def test_other_volumes_are_refused(encoder, shape):
    with pytest.raises(ValueError, match=r"expected a volume \(B, 1, 12, 12, 12\), got"):
        encoder(torch.zeros(shape))


@pytest.mark.parametrize("setting", [{"image_size": 13}, {"heads": 3}, {"window": 2}])
def test_sizes_must_fit(setting):
    with pytest.raises(ValueError, match="must"):
        SAMMed3DEncoder(**{**SMALL, **setting})


def test_normalise_foreground():
    volume = torch.zeros(3, 1, 2, 2, 2)
    volume[0, 0, 0] = torch.tensor([[2.0, 4.0], [6.0, -1.0]])  # above zero: mean 4, deviation 2
    volume[1, 0, 0] = 5.0  # constant above zero
    found = normalise_foreground(volume)
    assert found.shape == volume.shape
    assert found[0, 0].flatten().tolist() == [-1, 0, 1, -2.5, -2, -2, -2, -2]
    assert found[1, 0].flatten().tolist() == [0] * 4 + [-5] * 4
    assert found[2].eq(0).all()  # nothing above zero
    constant = torch.full((1, 1, 40, 40, 40), 0.1)
    assert normalise_foreground(constant).abs().max() < 1e-5  # rounding is no spread
    assert normalise_foreground(volume.to(torch.int16)).dtype == torch.float32


# Loading


def whole_checkpoint(state):
    """What the original training loop saves, as far as it matters to a reader."""
    return {
        "epoch": 3,
        "model_state_dict": {**state, "mask_decoder.weight": torch.ones(2)},
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "dices": [np.float64(0.5), np.float32(0.5), np.int64(1)],
        "args": argparse.Namespace(task_name="union_train", gpu_ids=[0, 1]),
    }


def prefixed(encoder, prefix):
    return {prefix + key: tensor for key, tensor in encoder.state_dict().items()}


def assert_same(loaded, encoder):
    volume = torch.randn(1, 1, 12, 12, 12)
    assert not loaded.training
    assert torch.equal(loaded(volume), encoder(volume))


@pytest.mark.parametrize("prefix", ["", "module.", "image_encoder.", "module.image_encoder."])
def test_loads_a_bare_state_dict(encoder, tmp_path, prefix):
    torch.save(prefixed(encoder, prefix), tmp_path / "weights.pth")
    assert_same(load_sam_med3d(str(tmp_path / "weights.pth"), **SMALL), encoder)


@pytest.mark.parametrize("prefix", ["image_encoder.", "module.image_encoder."])
def test_loads_a_whole_checkpoint(encoder, tmp_path, prefix):
    torch.save(whole_checkpoint(prefixed(encoder, prefix)), tmp_path / "weights.pth")
    assert_same(load_sam_med3d(tmp_path / "weights.pth", **SMALL), encoder)


def test_loads_numbers_of_the_older_numpy(encoder, tmp_path):
    """NumPy 1 calls the maker of its numbers numpy.core..., NumPy 2 numpy._core..."""
    path = tmp_path / "weights.pth"
    checkpoint = whole_checkpoint(prefixed(encoder, "image_encoder."))
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    newer, older = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    path.write_bytes(content.replace(newer, older) if newer in content else content.replace(older, newer))
    assert_same(load_sam_med3d(path, **SMALL), encoder)


def test_half_precision_becomes_float32(encoder, tmp_path):
    torch.save(encoder.half().state_dict(), tmp_path / "weights.pth")
    loaded = load_sam_med3d(tmp_path / "weights.pth", **SMALL)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_safetensors(encoder, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(prefixed(encoder, "image_encoder."), path)
    assert_same(load_sam_med3d(path, **SMALL), encoder)


def test_wrapped_as_an_encoder(encoder, tmp_path):
    torch.save(encoder.state_dict(), tmp_path / "weights.pth")
    volume = torch.rand(1, 1, 12, 12, 12)
    wrapped = sam_med3d(tmp_path / "weights.pth", **SMALL)
    assert (wrapped.name, wrapped.patch_size, wrapped.input_size) == ("sam_med3d", 4, 12)
    torch.testing.assert_close(wrapped(volume), encoder(normalise_foreground(volume)))
    wrapped = sam_med3d(tmp_path / "weights.pth", normalise=False, **SMALL)
    torch.testing.assert_close(wrapped(volume), encoder(volume))


def test_missing_file_says_what_to_get_and_where(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_sam_med3d(tmp_path / "absent.pth")
    for words in ("absent.pth", "pretrained_ckpt/sam_med3d_turbo.pth", "SAM-Med3D authors", "`mind`"):
        assert words in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "image_encoder."])
def test_weights_that_do_not_fit_are_listed(encoder, tmp_path, prefix):
    state = prefixed(encoder, prefix)
    del state[prefix + "neck.1.bias"]
    state[prefix + "neck.9.bias"] = torch.zeros(1)
    state[prefix + "pos_embed"] = torch.zeros(1, 2, 2, 2, 16)
    state[prefix + "neck.3.bias"] = "text"
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError) as caught:
        load_sam_med3d(tmp_path / "weights.pth", **SMALL)
    for words in (
        "weights.pth",
        "1 missing: neck.1.bias",
        "1 not expected: neck.9.bias",
        "2 of another shape: pos_embed: (1, 2, 2, 2, 16) instead of (1, 3, 3, 3, 16)",
        "neck.3.bias: str instead of (6,)",
    ):
        assert words in str(caught.value)


def test_long_lists_are_cut(tmp_path):
    torch.save({}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"189 missing: pos_embed.* and more"):
        load_sam_med3d(tmp_path / "weights.pth")


class Intruder:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_executed(encoder, tmp_path, zipped):
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    stored = {"model_state_dict": encoder.state_dict(), "args": Intruder(trace)}
    torch.save(stored, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="weights.pth asks for more than weights.*getattr.*convert-weights"):
        load_sam_med3d(path, **SMALL)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # so the file would have done it


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"<html>not found</html>"])
def test_unreadable_files(tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights.pth.*get the file again"):
        load_sam_med3d(tmp_path / "weights.pth", **SMALL)


def test_not_a_state_dict(tmp_path):
    torch.save([1, 2], tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="holds a list; expected a state dict"):
        load_sam_med3d(tmp_path / "weights.pth", **SMALL)
