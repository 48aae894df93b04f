"""Loss of Dice with a template whose field of view, orientation or intensities differ from the pool's.

    python -m benchmarks perturbed [DIR] [--split test] [--cases N]

Without DIR: synthetic data. Only the template is changed, and written as NIfTI. First pass and label fusion.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
from monai.transforms import RandBiasField, RandGaussianNoise
from nibabel.orientations import axcodes2ornt, ornt_transform

from benchmarks.pools import drawn, fill, propagated_dice
from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.grids import choose_spacing
from semisam_o1.data.phantoms import write_demo_data
from semisam_o1.encoders.mind_descriptors import mind
from semisam_o1.features import FeatureStore

Pair = tuple[nibabel.Nifti1Image, nibabel.Nifti1Image]  # image and label
SEED = 0


def stored_as(axcodes: str) -> Callable[[Pair], Pair]:
    """The same scan stored with other axes and a matching header."""

    def change(pair: Pair) -> Pair:
        turn = [ornt_transform(nibabel.io_orientation(p.affine), axcodes2ornt(axcodes)) for p in pair]
        return tuple(p.as_reoriented(t) for p, t in zip(pair, turn))

    return change


def cropped(share: float, first: float) -> Callable[[Pair], Pair]:
    """Crop each axis by ``share``, the part ``first`` of it at the start."""

    def change(pair: Pair) -> Pair:
        cut = [(round(n * share * first), round(n * share)) for n in pair[0].shape]
        part = tuple(slice(begin, n - (total - begin)) for (begin, total), n in zip(cut, pair[0].shape))
        return tuple(p.slicer[part] for p in pair)

    return change


def intensities(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Pair], Pair]:
    def change(pair: Pair) -> Pair:
        return nibabel.Nifti1Image(function(pair[0].get_fdata(dtype=np.float32)), pair[0].affine), pair[1]

    return change


def noisy(image: np.ndarray) -> np.ndarray:
    noise = RandGaussianNoise(prob=1, std=0.2 * float(image.std()), sample_std=False).set_random_state(SEED)
    return noise(image[None])[0].numpy()


def biased(image: np.ndarray) -> np.ndarray:
    field = RandBiasField(prob=1, degree=3, coeff_range=(0.2, 0.3)).set_random_state(SEED)
    return field(image[None] - image.min())[0].numpy()


CHANGES: dict[str, Callable[[Pair], Pair]] = {
    "as it is": lambda pair: pair,
    "stored as LPS": stored_as("LPS"),
    "stored as PIR": stored_as("PIR"),
    "cropped by 15%, both sides": cropped(0.15, 0.5),
    "cropped by 15%, one side": cropped(0.15, 0.0),
    "intensities x 3 + 100": intensities(lambda image: 3 * image + 100),
    "noise, 0.2 of their deviation": intensities(noisy),
    "bias field": intensities(biased),
}


def options(parser) -> None:
    parser.add_argument("dataset_dir", nargs="?", metavar="DIR")
    parser.add_argument("--split", default="pool", choices=("pool", "val", "test"))
    parser.add_argument("--cases", type=int, default=12, help="largest number of cases, drawn with a fixed seed")
    parser.add_argument("--voxels", type=int, default=400000, help="of the working space")


def run(options) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cohort = open_cohort(options.dataset_dir or write_demo_data(folder / "data"), check=False)
        cases = drawn([case for case in cohort.split(options.split) if case.label], options.cases)
        spacing = choose_spacing(cohort.template_grids, options.voxels)
        store = FeatureStore(folder / "features", mind(), spacing)
        fill(store, cohort, cases, spacing)
        (template, *_), plain = cohort.templates, None
        pair = tuple(
            nibabel.Nifti1Image(volume[0].numpy(), np.asarray(volume.affine, float))
            for volume in (
                cohort.reader.volume(template.image),
                cohort.label_volume(template),
            )
        )
        print(f"\n{options.split}, {len(cases)} cases, template {template.name}")
        print(f"{'template':32}{'mean':>8}{'median':>8}{'worst':>8}{'loss':>8}", flush=True)
        for what, change in CHANGES.items():
            files = [folder / f"{template.name}_{part}.nii.gz" for part in ("image", "label")]
            for file, volume in zip(files, change(pair)):
                nibabel.save(volume, file)
            changed = replace(cohort, templates=(replace(template, image=files[0], label=files[1]),))
            fill(store, changed, changed.templates, spacing)
            dice = propagated_dice(store, changed, cases)
            plain = dice.mean() if plain is None else plain
            figures = f"{dice.mean():8.3f}{np.median(dice):8.3f}{dice.min():8.3f}{plain - dice.mean():8.3f}"
            print(f"{what:32}{figures}", flush=True)
