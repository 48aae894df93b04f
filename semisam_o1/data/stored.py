"""What every format's reader returns: a file whose header has been read and checked, its voxels not yet."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semisam_o1.data.findings import NOTE, Fault, Finding
from semisam_o1.data.grids import Grid

DEFLATE = 1032  # largest ratio of zlib and gzip
SLACK = 4096  # bytes
MOST_VOXELS = 2_000_000_000
POINTERS = (b"version https://git-lfs", b"/annex/objects/", b"../.git/annex/", b".git/annex/")
PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")  # the first letters of a web page
REASONS: tuple[tuple[tuple[type[Exception], ...], str], ...] = (  # what readers raise, in words
    ((EOFError,), "it ends too early"),
    ((zlib.error, gzip.BadGzipFile), "its gzip stream is corrupt"),
    ((struct.error,), "its header is incomplete"),
)
DAMAGED = ("a file that can be read", "copy or export it again")


@dataclass(frozen=True)
class ReadOptions:
    """How files are read.

    Attributes:
        dataset: the dataset to read from an HDF5 file.
        spacing: voxel size of HDF5 scans in mm along the stored axes, one number or three; None: 1 mm.
        nifti_form: which form of a NIfTI header is taken: "itk" follows ITK's rule, "sform" and "qform" take that form
            if it is set.
        most_voxels: files with more are refused before memory is allocated.
    """

    dataset: str = "image"
    spacing: float | tuple[float, ...] | None = None
    nifti_form: str = "itk"
    most_voxels: int = MOST_VOXELS


@dataclass(frozen=True)
class Stored:
    """An image file whose header has been read.

    Attributes:
        grid: affine (RAS mm) and shape; the shape keeps all axes of the file, but trailing ones of length 1.
        read: reads the voxels: an array of the file's shape, float32. Raises `Fault` if they are damaged.
        findings: what its reader noticed in the header.
        other: name and affine of the form of a NIfTI header that is not taken, if both are set.
    """

    grid: Grid
    read: Callable[[], np.ndarray]
    findings: tuple[Finding, ...] = ()
    other: tuple[str, np.ndarray] | None = None

    def voxels(self) -> np.ndarray:
        """All voxels, float32, of the grid's shape."""
        return np.ascontiguousarray(self.read().reshape(self.grid.shape), dtype=np.float32)


def damaged(why: str | Exception) -> Fault:
    """``why``: a few words without paths or text of the header, or what a reader raised."""
    if isinstance(why, Exception):
        words = (text for kinds, text in REASONS if isinstance(why, kinds))
        why = next(words, f"the reader says {type(why).__name__}")
    return Fault(f"truncated or damaged ({why})", *DAMAGED)


def sniff(path: Path) -> bytes:
    """The first bytes of a file.

    Raises:
        Fault: the file is empty or a web page, or stands for a file that was not fetched.
    """
    if path.is_symlink() and not path.exists():
        raise Fault(
            "a link to a file that is not there",
            "the file itself",
            "copy the file to where the link points (git annex get, datalad get), or put it here",
        )
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise Fault("an empty file", "a whole file", "copy or export it again")
    if any(start.startswith(pointer) for pointer in POINTERS):
        raise Fault("a pointer of Git LFS or git-annex", "the file itself", "fetch it: git lfs pull, or git annex get")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(PAGES):
        raise no_image("HTML or XML, e.g. a web page that was saved in place of the download")
    return start


def no_image(begins: str) -> Fault:
    """The fault of a file that is no image; ``begins``: what its first bytes are."""
    return Fault(f"a file that is no image: it begins with {begins}", "an image", "download or export it again")


def drop_trailing(shape: Sequence[int]) -> tuple[tuple[int, ...], list[Finding]]:
    """``shape`` without axes of length 1 after the third."""
    kept = [int(n) for n in shape]
    while len(kept) > 3 and kept[-1] == 1:
        kept.pop()
    if len(kept) == len(shape):
        return tuple(kept), []
    return tuple(kept), [Finding(NOTE, f"{len(shape)} axes, the last of length 1", "three axes", "read as 3D")]


def check_size(shape: Sequence[int], voxel_bytes: int, stored: int, most_voxels: int, ratio: int | None = 1) -> None:
    """Refuse a header that promises more than the file holds, before memory is allocated for it.

    Args:
        stored: bytes of data in the file. ratio: how much compression may gain; None: unknown.

    Raises:
        Fault: too many voxels, or more than the file can hold.
    """
    voxels = math.prod(int(n) for n in shape)
    if voxels > most_voxels:
        remedy = "crop or resample it, or raise most_voxels"
        raise Fault(f"{voxels:,} voxels", f"at most {most_voxels:,} (most_voxels)", remedy)
    if ratio is not None and voxels * voxel_bytes > stored * ratio + (SLACK if ratio > 1 else 0):
        raise damaged("shorter than its header says")
