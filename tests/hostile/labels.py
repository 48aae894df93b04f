"""Labels that are damaged, of another grid, or no labels."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np

from tests.hostile.trials import ASIDE, POOL, REFUSED, RIGHT, TEMPLATE, Place, Trial, content, instead

VALIDATE = ("validate", "{data}")


def volume(change: Callable[[np.ndarray], np.ndarray], affine=lambda affine: affine, **header) -> Callable:
    """A spoiler: the label with other voxels, affine or header fields."""

    def spoil(path: Path, place: Place) -> None:
        image = nibabel.load(path)
        array = change(np.asarray(image.dataobj))
        array = array.astype(np.int16) if array.dtype == np.int64 else array
        made = nibabel.Nifti1Image(array, affine(image.affine.copy()))
        for name, value in header.items():
            made.header[name] = value
        nibabel.save(made, path)

    return spoil


def at_one_voxel(value, kind) -> Callable:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(kind)
        array[tuple(n // 2 for n in array.shape)] = value
        return array

    return volume(change)


def fields(start: int, kind: str, values) -> Callable:
    """A spoiler: other bytes in the NIfTI header."""

    def make(data: bytes, place: Place) -> bytes:
        head, packed = bytearray(gzip.decompress(data)), np.array(values, f"<{kind}").tobytes()
        head[start : start + len(packed)] = packed
        return gzip.compress(bytes(head))

    return content(make)


def flipped(data: bytes, place: Place) -> bytes:
    """Ten random bytes of the header are others."""
    head = bytearray(gzip.decompress(data))
    for _ in range(10):
        head[place.rng.randrange(348)] = place.rng.randrange(256)
    return gzip.compress(bytes(head))


def cut(data: bytes, place: Place) -> bytes:
    return data[: place.rng.randrange(1, len(data) - 20)]


def second_file(path: Path, place: Place) -> None:
    nibabel.save(nibabel.load(path), path.with_name(path.name.removesuffix(".gz")))


def moved(affine: np.ndarray) -> np.ndarray:
    affine[:3, 3] += 3
    return affine


# Wrong in every label: a template stops the command, another label is not used and named.
BAD: dict[str, Callable] = {
    "wrong_shape": volume(lambda a: a[:-1]),
    "turned": volume(lambda a: a.transpose(2, 0, 1)),
    "4d": volume(lambda a: np.stack([a, a], -1)),
    "2d": volume(lambda a: a[..., 5]),
    "nan": at_one_voxel(np.nan, np.float32),
    "infinity": at_one_voxel(np.inf, np.float32),
    "half": at_one_voxel(0.5, np.float32),
    "not_quite_whole": at_one_voxel(0.99, np.float64),
    "negative": at_one_voxel(-1, np.int16),
    "4294967295": at_one_voxel(4294967295, np.uint32),
    "2147483647": at_one_voxel(2147483647, np.int32),
    "65536": at_one_voxel(65536, np.int32),
    "1e30": at_one_voxel(1e30, np.float64),
    "complex": volume(lambda a: a.astype(np.complex64) * 1j),
    "colours": volume(lambda a: np.zeros(a.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])),
    "moved": volume(lambda a: a, moved),
    "cut": content(cut),
    "first_bytes": content(lambda data, place: data[:12]),
    "no_bytes": content(lambda data, place: b""),
    "text": content(lambda data, place: b"this is a label, honestly\n" * 20),
    "random_bytes": content(lambda data, place: place.rng.randbytes(2000)),
    "zipped_twice": content(lambda data, place: gzip.compress(data)),
    "not_zipped": content(lambda data, place: gzip.decompress(data)),
    "zipped_random_bytes": content(lambda data, place: gzip.compress(place.rng.randbytes(5000))),
    "header_alone": content(lambda data, place: gzip.compress(gzip.decompress(data)[:352])),
    "huge_header": fields(40, "i2", [3, 32767, 32767, 32767]),
    "negative_sizes": fields(40, "i2", [3, -5, 16, 14]),
    "unknown_type": fields(70, "i2", [4097]),
    "scaled": fields(112, "f4", [0.3, 0.0]),
    "voxels_far_away": fields(108, "f4", [1e12]),
    "folder": instead(lambda path, place: path.mkdir()),
    "loop": instead(lambda path, place: path.symlink_to(path.name)),
    "dangling": instead(lambda path, place: path.symlink_to("/nowhere/label.nii.gz")),
    "fifo": instead(lambda path, place: os.mkfifo(path)),
    "endless": instead(lambda path, place: path.symlink_to("/dev/zero")),
    "password_file": instead(lambda path, place: path.symlink_to("/etc/passwd")),
    "second_file": second_file,
    "its_image": instead(lambda path, place: path.symlink_to(place.data / "images" / path.name)),
}
# Nothing is there for the pool: like a scan without truth.
ABSENT = ("folder", "loop", "dangling", "fifo", "endless")
# Readable in spite of what they say: both ends are fine.
DOUBTFUL: dict[str, Callable] = {
    "flipped_header": content(flipped),
    "flipped_header_2": content(flipped),
    "flipped_header_3": content(flipped),
    "singular": fields(280, "f4", [0] * 12),
    "nan_slope": fields(112, "f4", [np.nan, np.nan]),
    "nan_affine": fields(280, "f4", [np.nan] * 12),
    "rubbish_after": content(lambda data, place: data + place.rng.randbytes(100)),
}
GOOD: dict[str, Callable] = {
    "float": volume(lambda a: a.astype(np.float32)),
    "nearly_whole": at_one_voxel(0.9999, np.float64),
    "trailing_axis": volume(lambda a: a[..., None]),
    "big_endian": volume(lambda a: a.astype(">i2")),
    "double": volume(lambda a: a.astype(np.float64)),
}
OF_CLASSES: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "empty": (volume(np.zeros_like), (REFUSED,)),
    "class_255": (volume(lambda a: (a * 255).astype(np.uint8)), (RIGHT,)),
    "class_65535": (at_one_voxel(65535, np.uint16), (RIGHT,)),
    "class_249": (volume(lambda a: np.where(a == 2, 249, a).astype(np.uint8)), (REFUSED, RIGHT)),
    "class_7": (volume(lambda a: np.where(a == 2, 7, a)), (RIGHT,)),
    "one_voxel": (volume(lambda a: np.where(np.arange(a.size).reshape(a.shape) == 999, 1, 0)), (RIGHT, REFUSED)),
}


def trial(name: str, spoil: Callable, case: str, ends) -> Trial:
    who = "template" if case == TEMPLATE else "pool"
    return Trial("labels", f"{who}_{name}", lambda place: spoil(place.label(case), place), VALIDATE, ends)


def at_pool(name: str, spoil: Callable) -> Trial:
    return trial(name, spoil, POOL, (ASIDE, RIGHT) if name in ABSENT else (ASIDE,))


TRIALS = [
    *(trial(name, spoil, TEMPLATE, (REFUSED,)) for name, spoil in BAD.items()),
    *(at_pool(name, spoil) for name, spoil in BAD.items()),
    *(trial(name, spoil, TEMPLATE, (REFUSED, RIGHT)) for name, spoil in DOUBTFUL.items()),
    *(trial(name, spoil, POOL, (ASIDE, RIGHT)) for name, spoil in DOUBTFUL.items()),
    *(trial(name, spoil, TEMPLATE, (RIGHT,)) for name, spoil in GOOD.items()),
    *(trial(name, spoil, TEMPLATE, ends) for name, (spoil, ends) in OF_CLASSES.items()),
    *(trial(name, spoil, POOL, (ASIDE, RIGHT)) for name, (spoil, _) in OF_CLASSES.items()),
]
