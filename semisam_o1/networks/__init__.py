"""Segmentation networks and inferers: volume -> logits per voxel."""

from semisam_o1.networks.many_class_unet import ManyClassUNet
from semisam_o1.networks.precision import Autocast, bfloat16_pays
from semisam_o1.networks.unet3d import LogitsAlone, UNet3D, UNet3DSDF
from semisam_o1.networks.views import Views
from semisam_o1.networks.windows import ProbabilityWindows

__all__ = [
    "Autocast",
    "LogitsAlone",
    "ManyClassUNet",
    "ProbabilityWindows",
    "UNet3D",
    "UNet3DSDF",
    "Views",
    "bfloat16_pays",
]
