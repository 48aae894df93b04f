"""Checkpoints turned into safetensors without executing anything in them; weights that a network takes."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from semisam_o1.cli import main
from semisam_o1.encoders.base import Encoder
from semisam_o1.weights import convert_weights, load_weights


class Intruder:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


class Settings:
    """Something that a training script may have left in its checkpoint, with state and a list in it."""

    def __init__(self):
        self.lr, self.names = 0.1, ["a", "b"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", None])
def test_converting_keeps_every_tensor_and_executes_nothing(tmp_path, zipped, key):
    trace, source, target = tmp_path / "trace", tmp_path / "weights.pth", tmp_path / "out" / "weights.safetensors"
    state = network().half().state_dict()
    beside = {"args": Intruder(trace), "more": Settings(), "list": [Settings(), 1], "set": {1, 2}}
    stored = {**beside, key: state} if key else {**state, **beside}
    torch.save(stored, source, _use_new_zipfile_serialization=zipped)
    assert convert_weights(source, target) == len(state)
    assert not trace.exists()
    found = load_file(target)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in state)
    loaded = load_weights(network(), target)
    assert torch.equal(loaded[0].weight, state["0.weight"].float())
    assert loaded[1].num_batches_tracked.dtype == torch.int64


def test_weights_that_share_memory_are_converted(tmp_path):
    whole = torch.arange(6.0)
    torch.save({"a": whole[:4], "b": whole[2:].reshape(2, 2).T}, tmp_path / "w.pth")
    assert convert_weights(tmp_path / "w.pth", tmp_path / "w.safetensors") == 2
    found = load_file(tmp_path / "w.safetensors")
    assert found["a"].tolist() == [0, 1, 2, 3] and found["b"].tolist() == [[2, 4], [3, 5]]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"<html>not found</html>"])
def test_what_cannot_be_read_leaves_no_file(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match="w.pth is no readable checkpoint"):
        convert_weights(tmp_path / "w.pth", tmp_path / "w.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "w.pt")
    with pytest.raises(ValueError, match="w.pt is no readable checkpoint .*TorchScript"):
        convert_weights(tmp_path / "w.pt", tmp_path / "w.safetensors")


def test_no_tensors(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="w.pth has no tensors"):
        convert_weights(tmp_path / "w.pth", tmp_path / "w.safetensors")


def test_from_the_command_line(tmp_path, capsys):
    torch.save({"model_state_dict": {"a": torch.ones(2)}, "args": Settings()}, tmp_path / "w.pth")
    assert main(["convert-weights", str(tmp_path / "w.pth"), str(tmp_path / "w.safetensors")]) == 0
    assert "1 tensors" in capsys.readouterr().out
    assert main(["convert-weights", str(tmp_path / "w.pth"), str(tmp_path / "w.bin")]) == 2
    assert main(["convert-weights", str(tmp_path / "absent"), str(tmp_path / "w.safetensors")]) == 2


def test_other_numbers_of_a_broken_safetensors_file(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match="w.safetensors is no readable checkpoint"):
        load_weights(network(), tmp_path / "w.safetensors")


# An encoder of one's own


def test_an_encoder_says_when_its_weights_are_random(caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        Encoder(nn.AvgPool3d(2), "pool", 2)
        Encoder(network(), "mine", trained=True)
        torch.save(network().state_dict(), tmp_path / "w.pth")
        Encoder(network(), "mine", weights=tmp_path / "w.pth")
        assert not caplog.records
        Encoder(network(), "mine")
    assert "encoder mine: RANDOM WEIGHTS" in caplog.text


def test_weights_from_a_part_of_a_checkpoint(tmp_path):
    one, other = network(), network()
    nn.init.ones_(other[0].weight)
    state = {f"module.encoder.{key}": value for key, value in other.state_dict().items()}
    torch.save({"state_dict": state | {"module.decoder.x": torch.ones(1)}}, tmp_path / "w.pth")
    found = Encoder(one, "mine", weights=tmp_path / "w.pth", prefix="encoder.").network
    assert torch.equal(found[0].weight, other[0].weight)


class TwoStages(nn.Module):
    def forward(self, volume):
        return [volume, nn.functional.avg_pool3d(volume, 2)]


def test_one_of_several_outputs():
    volume = torch.rand(1, 1, 4, 4, 4)
    encoder = Encoder(TwoStages(), "two", 2, stage=-1)
    assert torch.equal(encoder(volume), nn.functional.avg_pool3d(volume, 2))


@pytest.mark.parametrize("how", [dict(precision="bfloat16"), dict(compiled=True)])
def test_the_error_of_a_faster_way_is_measured_and_logged(how, caplog):
    torch.manual_seed(0)
    plain = nn.Conv3d(1, 4, 3, padding=1)
    encoder, volume = Encoder(plain, "conv", trained=True, **how), torch.randn(2, 1, 6, 6, 6)
    with caplog.at_level(logging.INFO):
        tokens = encoder(volume)
    assert tokens.dtype == torch.float32
    assert encoder.error == pytest.approx(float((plain(volume[:1]) - tokens[:1]).abs().max().detach()), abs=1e-7)
    assert encoder.error < 0.05 and (encoder.error > 1e-4) == ("precision" in how)
    assert "conv in " in caplog.text and "largest error" in caplog.text
    encoder(volume)
    assert len(caplog.records) == 1  # once


def test_unknown_precisions_are_refused():
    with pytest.raises(ValueError, match="precision 'int3', expected one of float32, bfloat16, float16"):
        Encoder(nn.AvgPool3d(2), "pool", 2, precision="int3")
