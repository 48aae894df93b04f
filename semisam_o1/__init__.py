"""SemiSAM-O1: segmentation of a set of 3D scans from one labelled volume.

Importing the package loads none of its modules, so code that only needs the bundle's path does not wait for torch.
"""

from pathlib import Path

from semisam_o1.version import VERSION

__all__ = ["BUNDLE_ROOT", "__version__"]

__version__ = VERSION

_HERE = Path(__file__).resolve().parent

#: The MONAI bundle (configs/, docs/, models/): inside the package in a wheel, in ``bundles/`` in a checkout.
BUNDLE_ROOT: Path = _HERE / "bundle"
if not BUNDLE_ROOT.is_dir():
    BUNDLE_ROOT = _HERE.parent / "bundles" / "semisam_o1"
