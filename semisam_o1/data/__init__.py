"""Data sets, scans and labels: reading, checking, transforming and writing."""

from semisam_o1.data.class_sizes import choose_feature_spacing
from semisam_o1.data.cohort import Cohort
from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.formats import Format
from semisam_o1.data.grids import (
    Grid,
    choose_patch,
    choose_spacing,
    choose_strides,
    choose_train_spacing,
    to_grid,
)
from semisam_o1.data.images import image_files, readable_cases
from semisam_o1.data.labels import read_label
from semisam_o1.data.on_scan import LabelOnScand
from semisam_o1.data.reader import CachedScanDataset, LoadScand, ScanDataset, ScanReader
from semisam_o1.data.stored import Stored
from semisam_o1.data.transforms import (
    PublishedPadd,
    PublishedRandCropd,
    chain,
    image_chain,
    label_chain,
    random_flips,
    random_poses,
    template_components,
)

__all__ = [
    "CachedScanDataset",
    "Cohort",
    "Format",
    "Grid",
    "LabelOnScand",
    "LoadScand",
    "PublishedPadd",
    "PublishedRandCropd",
    "ScanDataset",
    "ScanReader",
    "Stored",
    "chain",
    "choose_feature_spacing",
    "choose_patch",
    "choose_spacing",
    "choose_strides",
    "choose_train_spacing",
    "image_chain",
    "image_files",
    "label_chain",
    "open_cohort",
    "random_flips",
    "random_poses",
    "read_label",
    "readable_cases",
    "template_components",
    "to_grid",
]
