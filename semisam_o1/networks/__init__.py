"""Segmentation networks: volume in, voxel scores out."""

from semisam_o1.networks.precision import Autocast, bfloat16_pays
from semisam_o1.networks.unet3d import LogitsAlone, UNet3D, UNet3DSDF

__all__ = ["Autocast", "LogitsAlone", "UNet3D", "UNet3DSDF", "bfloat16_pays"]
