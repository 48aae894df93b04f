"""The documented examples of encoders of one's own: a 2D vision transformer in three planes, MONAI's Swin UNETR."""

import json
import re
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn

from semisam_o1.encoders.base import Encoder
from semisam_o1.encoders.slices import SlicesInThreePlanes
from semisam_o1.features import TokenInferer

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "encoders.md").read_text()


class Mean(nn.Module):
    """A 2D network whose features are the mean of each patch and its square."""

    def __init__(self, patch):
        super().__init__()
        self.patch, self.calls = patch, []

    def forward(self, slices):
        self.calls.append(tuple(slices.shape))
        mean = nn.functional.avg_pool2d(slices, self.patch).mean(1, keepdim=True)
        return torch.cat([mean, mean**2], 1)


def test_tokens_of_three_planes_by_hand():
    volume = torch.rand(2, 1, 8, 4, 12, generator=torch.Generator().manual_seed(0))
    tokens = SlicesInThreePlanes(Mean(4), 4)(volume)
    assert tokens.shape == (2, 6, 2, 1, 3)
    expected = nn.functional.avg_pool3d(volume, 4)[:, 0]
    for plane in range(3):
        torch.testing.assert_close(tokens[:, 2 * plane], expected)
    squares = [  # in each plane the patches of slices are squared, then averaged across
        nn.functional.avg_pool3d(volume, kernel)[:, 0] ** 2 for kernel in ((1, 4, 4), (4, 1, 4), (4, 4, 1))
    ]
    torch.testing.assert_close(tokens[:, 1], squares[0].unflatten(1, (2, 4)).mean(2))
    torch.testing.assert_close(tokens[:, 3], squares[1].unflatten(2, (1, 4)).mean(3))
    torch.testing.assert_close(tokens[:, 5], squares[2].unflatten(3, (3, 4)).mean(4))


def test_slices_are_resampled_repeated_and_skipped():
    network = Mean(8)
    SlicesInThreePlanes(network, 4, size=16, channels=3, every=2, batch=3)(torch.rand(1, 1, 8, 8, 8))
    assert network.calls == [(3, 3, 16, 16), (1, 3, 16, 16)] * 3
    with pytest.raises(ValueError, match="every 5: expected 1 to patch_size 4"):
        SlicesInThreePlanes(network, 4, every=5)


def test_every_token_of_the_coarsest_choice_of_slices_has_one():
    volume = torch.rand(1, 1, 16, 8, 12) + 1
    tokens = SlicesInThreePlanes(Mean(4), 4, every=4)(volume)
    assert (tokens[:, 0::2] >= 1).all()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


def tokens_of(encoder, shape=(40, 33, 36)):
    assert isinstance(encoder, Encoder)
    return TokenInferer()(torch.rand(1, 1, *shape), encoder)


def built(text):
    parser = ConfigParser(json.loads(text))
    return parser.get_parsed_content("encoder")


def test_the_swin_unetr_example(caplog):
    (example,) = (text for text in blocks("json") if "SwinTransformer" in text)
    encoder = built(example)
    assert "RANDOM WEIGHTS" in caplog.text
    tokens = tokens_of(encoder)
    assert tokens.shape[1] == 4 * encoder.network.embed_dim
    assert tokens.shape[2:] == tuple(-(-max(n, encoder.input_size) // encoder.patch_size) for n in (40, 33, 36))


def test_the_example_of_a_vision_transformer_in_three_planes(monkeypatch, tmp_path):
    (code,) = (text for text in blocks("python") if "TransformerEncoder" in text)
    (tmp_path / "my_vit.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (example,) = (text for text in blocks("json") if "my_vit" in text)
    encoder = built(example)
    tokens = tokens_of(encoder)
    width = encoder.network.network.width
    assert tokens.shape[1:] == (3 * width, *(-(-n // encoder.patch_size) for n in (40, 33, 36)))
    assert tokens.as_tensor().isfinite().all()
