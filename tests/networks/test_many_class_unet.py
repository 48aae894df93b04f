"""MONAI's U-Net for many classes: few classes as in MONAI, many at a cost that grows with their number alone."""

import torch
from monai.networks.nets import UNet

from semisam_o1.networks import ManyClassUNet

SMALL = {"channels": (4, 8), "strides": (2,), "num_res_units": 2, "norm": "INSTANCE"}


def made(network, classes):
    torch.manual_seed(0)
    return network(3, 1, classes, **SMALL).eval()


def test_with_few_classes_it_is_monais():
    ours, theirs, image = made(ManyClassUNet, 4), made(UNet, 4), torch.rand(1, 1, 8, 8, 4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=0)


def test_with_many_classes_each_costs_one_weight_per_channel():
    weights = {n: sum(part.numel() for part in made(ManyClassUNet, n).parameters()) for n in (5, 40)}
    assert weights[40] - weights[5] == 35 * (4 + 1)
    network, image = made(ManyClassUNet, 40), torch.rand(2, 1, 8, 8, 4)
    found = network(image)
    assert found.shape == (2, 40, 8, 8, 4)
    assert len({round(float(one), 6) for one in found.mean((0, 2, 3, 4))}) == 40
    torch.testing.assert_close(torch.jit.script(network)(image), found)
