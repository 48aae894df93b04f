"""Round 0: propagation of the template's label to every scan, without training."""

from semisam_o1.round_0.engines import copies_engine, first_pass_engine, label_fusion_engine, quality_engine
from semisam_o1.round_0.propagation import Propagated, Reference, copy, nearest, prototype

__all__ = [
    "Propagated",
    "Reference",
    "copies_engine",
    "copy",
    "first_pass_engine",
    "label_fusion_engine",
    "nearest",
    "prototype",
    "quality_engine",
]
