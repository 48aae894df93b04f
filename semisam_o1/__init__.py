"""SemiSAM-O1: a whole set of 3D scans segmented from one labelled volume.

Importing the package loads none of its modules, so that whoever only looks for the bundle does not wait for
torch.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["BUNDLE_ROOT", "__version__"]

try:
    __version__ = version("semisam-o1")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent

#: The MONAI bundle (configs/, docs/, models/): beside the modules in a wheel, else that of the checkout.
BUNDLE_ROOT: Path = _HERE / "bundle"
if not BUNDLE_ROOT.is_dir():
    BUNDLE_ROOT = _HERE.parent / "bundles" / "semisam_o1"
