"""Convolutions in bfloat16 on a CPU."""

import torch
from monai.inferers import SimpleInferer

from semisam_o1.networks.precision import Autocast, bfloat16_pays


class Watcher(torch.nn.Conv3d):
    def forward(self, x):
        self.seen = super().forward(x)
        return self.seen, self.seen + 1


def test_the_network_computes_in_bfloat16_and_gives_float32():
    torch.manual_seed(0)
    network, image = Watcher(1, 2, 3), torch.randn(1, 1, 8, 8, 8)
    exact = Autocast(SimpleInferer(), False)(image, network)
    assert network.seen.dtype == torch.float32
    found = Autocast(SimpleInferer(), True)(image, network)
    assert network.seen.dtype == torch.bfloat16 and [output.dtype for output in found] == [torch.float32] * 2
    assert 0 < (found[0] - exact[0]).abs().max() < 0.05
    found[0].sum().backward()
    assert network.weight.grad.dtype == torch.float32


def test_only_a_cpu_is_asked():
    assert not bfloat16_pays("cuda") and bfloat16_pays("cpu") == torch.cpu._is_amx_tile_supported()


def test_float16_is_for_cuda_alone():
    network, image = Watcher(1, 2, 3), torch.randn(1, 1, 8, 8, 8)
    Autocast(SimpleInferer(), False, amp=True)(image, network)
    assert network.seen.dtype == torch.float32
