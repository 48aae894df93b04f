"""Segmentation networks: volume in, voxel scores out."""

from semisam_o1.networks.unet3d import LogitsAlone, UNet3D, UNet3DSDF

__all__ = ["LogitsAlone", "UNet3D", "UNet3DSDF"]
