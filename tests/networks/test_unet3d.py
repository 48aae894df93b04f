"""The U-Net against the published numbers, and on sizes that do not halve evenly."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from semisam_o1.networks.unet3d import LogitsAlone, UNet3D, UNet3DSDF

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden files in {GOLDEN}")
SMALL = (2, 3, 4, 5, 6)


@pytest.fixture(scope="module")
def weights():
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_golden
@pytest.mark.parametrize(
    ("network", "name", "outputs"),
    [(UNet3D, "unet_3D", ["logits"]), (UNet3DSDF, "unet_3D_sdf", ["sdf", "logits"])],
)
def test_published_numbers(weights, network, name, outputs):
    model = network(1, 2).eval()
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == json.loads((GOLDEN / f"{name}.state_dict.json").read_text())
    weights.fill(model)
    with torch.inference_mode():
        found = model(weights.unet_input())
    found = found if isinstance(found, tuple) else (found,)
    with np.load(GOLDEN / f"{name}.npz") as expected:
        for key, tensor in zip(outputs, found, strict=True):
            np.testing.assert_allclose(tensor.numpy(), expected[key], rtol=0, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("sides", [(32, 16, 16), (33, 17, 18), (47, 31, 20)])
def test_any_size_is_kept(sides):
    model = UNet3DSDF(2, 3, features=SMALL).eval()
    with torch.inference_mode():
        distance, logits = model(torch.randn(2, 2, *sides))
    assert distance.shape == logits.shape == (2, 3, *sides)
    assert distance.abs().max() <= 1


def test_odd_planes_repeat_their_neighbour():
    """A level that lost its last plane to pooling gets the upsampled map's last plane twice."""
    up = UNet3D(1, 2, features=SMALL).up_concat1
    seen = []
    up.conv = torch.nn.Identity()
    up.conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    up(torch.zeros(1, 1, 5, 4, 4), torch.arange(2.0).reshape(1, 1, 2, 1, 1).expand(1, 1, 2, 2, 2))
    assert seen[0][0, 1, :, 0, 0].tolist() == [0, 0.25, 0.75, 1, 1]


@pytest.mark.parametrize("shape", [(1, 1, 16, 16, 16), (1, 1, 64, 64, 15), (1, 32, 32, 32)])
def test_too_small_says_what_to_do(shape):
    with pytest.raises(ValueError, match="pad the volume"):
        UNet3D(1, 2, features=SMALL)(torch.zeros(shape))


def test_five_widths():
    with pytest.raises(ValueError, match="5 widths"):
        UNet3D(1, 2, features=(16, 32))


def test_dropout_acts_in_training_alone():
    model, volume = UNet3D(1, 2, features=SMALL), torch.randn(1, 1, 32, 16, 16)
    assert not torch.equal(model(volume), model(volume))
    model.eval()
    assert torch.equal(model(volume), model(volume))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("network", [UNet3D, UNet3DSDF])
def test_scripts(network):
    """A bundle exports its network to TorchScript."""
    model, volume = network(1, 2, features=SMALL).eval(), torch.randn(1, 1, 33, 16, 17)
    torch.testing.assert_close(torch.jit.script(model)(volume), model(volume))


def test_monai_label_sets_the_dropout_of_every_network():
    """To score scans; the names of the weights stay."""
    plain, scored = LogitsAlone(UNet3DSDF(1, 2, [2] * 5)), LogitsAlone(UNet3DSDF(1, 2, [2] * 5), dropout=0.2)
    assert plain.state_dict().keys() == scored.state_dict().keys()
    rates = [{layer.p for layer in one.modules() if hasattr(layer, "p")} for one in (plain, scored)]
    assert rates == [{0.3}, {0.2}]
