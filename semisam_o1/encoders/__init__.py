"""Frozen encoders: volume (B, 1, H, W, D) -> tokens (B, C, H', W', D')."""

from semisam_o1.encoders.base import Encoder
from semisam_o1.encoders.mind_descriptors import MIND, mind
from semisam_o1.encoders.sam_med3d_encoder import SAMMed3DEncoder, load_sam_med3d, sam_med3d
from semisam_o1.encoders.slices import SlicesInThreePlanes

__all__ = [
    "MIND",
    "Encoder",
    "SAMMed3DEncoder",
    "SlicesInThreePlanes",
    "load_sam_med3d",
    "mind",
    "sam_med3d",
]
