"""The list of packages; everything else is in setup.cfg.

The bundle lies at the top of the repository, where MONAI's tools and people look for it, and has no Python in
it. In a wheel it becomes the data folder `semisam_o1/bundle`. setup.cfg can find packages or list them, not
both, hence this file. `semisam_o1.BUNDLE_ROOT` knows both places.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["semisam_o1", "semisam_o1.*"]), "semisam_o1.bundle"],
    package_dir={"semisam_o1.bundle": "bundles/semisam_o1"},
    package_data={"semisam_o1.bundle": ["**/*"], "semisam_o1": ["py.typed"], "semisam_o1.report": ["templates/*.j2"]},
    # Weights that someone trained in place are theirs, and large. model.ts is a note for MONAI Label.
    exclude_package_data={"semisam_o1.bundle": [f"models/*.{end}" for end in ("pt", "pth", "onnx")]},
    include_package_data=False,
)
