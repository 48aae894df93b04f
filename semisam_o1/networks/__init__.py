"""Segmentation networks: volume in, voxel scores out."""

from semisam_o1.networks.unet3d import UNet3D, UNet3DSDF

__all__ = ["UNet3D", "UNet3DSDF"]
