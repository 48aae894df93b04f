"""NIfTI, Analyze and MGH files, read by nibabel; which form of a NIfTI header gives the voxels' place.

The rule is ITK's (`NiftiImageIO` of ITK 5.4), because 3D Slicer and ITK-SNAP lay images by it: the sform where it is
the only form, or where its code is 1 and its axes are at right angles; else the qform. Without either, voxel sizes on
axes that point left, posterior and superior, from origin 0. Two differences: the sform's own voxel size is taken, where
ITK takes ``pixdim``, and a shear is kept, which ITK refuses.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.quaternions import quat2mat

from semisam_o1.data.findings import NOTE, WARNING, Fault, Finding
from semisam_o1.data.grids import Grid, corner_distance
from semisam_o1.data.stored import DEFLATE, ReadOptions, Stored, check_size, damaged, drop_trailing, no_image, sniff
from semisam_o1.types import Affine

ROUNDING = 1e-3  # voxels between two forms over the volume that rounding in a header explains
RIGHT_ANGLES = 1e-4  # largest cosine between two axes, as in ITK
QUATERNION = 1e-6  # the square of a quaternion's vector part may exceed 1 by this in float32
UNITS = {0: ("", 1.0), 1: ("metres", 1000.0), 2: ("mm", 1.0), 3: ("microns", 0.001)}  # code -> name, in mm
HALF_TURN = 1e-7  # what is left for a quaternion's scalar part is rounding below this, as in the NIfTI library
HEADER_SIZES = (348, 540)  # bytes, of NIfTI-1 and NIfTI-2: a file begins with it
GZIP = b"\x1f\x8b"


def _tolerant(image: type) -> type:
    """A class of nibabel that reads a header whose quaternion is longer than 1, which its own refuses."""
    header = type(image.header_class.__name__, (image.header_class,), {"quaternion_threshold": np.inf})  # type: ignore
    return type(image.__name__, (image,), {"header_class": header})


IMAGES: Any = [
    _tolerant(image) for image in (nibabel.Nifti1Image, nibabel.Nifti1Pair, nibabel.Nifti2Image, nibabel.Nifti2Pair)
]


class Forms(NamedTuple):
    """The three ways in which a NIfTI header says where voxels lie: affines to RAS mm, None where a code is not set."""

    sform: Affine | None
    qform: Affine | None
    bare: Affine
    code: int  # of the sform

    def taken(self, form: str) -> str:
        """The name of the form that is taken: "sform", "qform" or "bare"."""
        if form in ("sform", "qform") and getattr(self, form) is not None:
            return form
        if self.sform is None or self.qform is None:
            return "bare" if self.sform is self.qform else "sform" if self.qform is None else "qform"
        return "sform" if self.code == 1 and not sheared(self.sform) else "qform"


def sheared(affine: Affine) -> bool:
    """Whether the axes are not at right angles to one another, by more than rounding; also if one has no length."""
    axes = affine[:3, :3]
    with np.errstate(all="ignore"):
        axes = axes / np.linalg.norm(axes, axis=0)
    between = np.abs(axes.T @ axes)[np.triu_indices(3, 1)]
    return not bool((between <= RIGHT_ANGLES).all())


def quaternion_vector(header: Any) -> np.ndarray:
    """The vector part (3,) of the qform's quaternion, as stored."""
    return np.array([header[f"quatern_{part}"] for part in "bcd"], float)


def _units(header: Any) -> tuple[str, float]:
    """Name and size in mm of the unit of length; mm if the header says none."""
    return UNITS.get(int(header["xyzt_units"]) & 7, UNITS[2])


def forms(header: Any) -> Forms:
    """The forms of a NIfTI header, its units converted to mm."""
    scale = np.diag([*[_units(header)[1]] * 3, 1.0])
    sizes = np.abs(np.asarray(header["pixdim"][1:4], float))
    sizes[sizes == 0] = 1.0
    sform, qform = np.eye(4), np.eye(4)
    sform[:3] = [np.asarray(header[f"srow_{axis}"], float) for axis in "xyz"]
    vector = quaternion_vector(header)
    rest = 1.0 - vector @ vector
    turn = quat2mat([np.sqrt(rest) if rest >= HALF_TURN else 0.0, *vector])  # normalises a vector longer than 1
    qform[:3, :3] = turn * sizes * [1, 1, -1 if header["pixdim"][0] < 0 else 1]
    qform[:3, 3] = [header[f"qoffset_{axis}"] for axis in "xyz"]
    bare = np.diag([-sizes[0], -sizes[1], sizes[2], 1.0])
    codes = int(header["sform_code"]), int(header["qform_code"])
    return Forms(
        scale @ sform if codes[0] > 0 else None, scale @ qform if codes[1] > 0 else None, scale @ bare, codes[0]
    )


def open_nifti(path: Path, options: ReadOptions) -> Stored:
    """A NIfTI file, one file or a pair.

    Raises:
        Fault: it cannot be read, or its voxels are no real numbers.
    """
    start, name = sniff(path), path.name.lower()
    if name.endswith(".nii.gz") != start.startswith(GZIP) and name.endswith((".nii", ".nii.gz")):
        if name.endswith(".gz") and not _has_header(start):
            raise no_image("text" if _is_text(start) else "neither gzip's first bytes nor the header of a NIfTI file")
        state, right = ("not compressed", ".nii") if name.endswith(".gz") else ("compressed by gzip", ".nii.gz")
        raise Fault(f"a file that is {state}, but has another suffix", f"the suffix {right}", "rename it")
    image = _loaded(path)
    header = image.header
    if not isinstance(image, nibabel.Nifti1Pair):  # Analyze: it has no forms
        return _open_other(path, image, options)
    shape, findings = drop_trailing(header.get_data_shape())
    _check_type(header.get_data_dtype())
    found = forms(header)
    taken = found.taken(options.nifti_form)
    affine = getattr(found, taken)
    findings += _unit_findings(header)
    if len(shape) == 3:
        findings += _form_findings(header, found, taken, Grid(affine, shape))
    _check_bytes(image, options)
    other = {"sform": "qform", "qform": "sform"}.get(taken, taken)
    left = getattr(found, other)
    return Stored(
        Grid(affine, shape),
        lambda: _voxels(image),
        tuple(findings),
        None if other == taken or left is None else (other, left),
    )


def _has_header(start: bytes) -> bool:
    """Whether the first bytes of a file are those of a NIfTI header, in either byte order."""
    return any(int.from_bytes(start[:4], order) in HEADER_SIZES for order in ("little", "big"))


def _is_text(start: bytes) -> bool:
    return not any(byte < 32 and byte not in b"\t\n\f\r" for byte in start)


def open_mgh(path: Path, options: ReadOptions) -> Stored:
    """A file of FreeSurfer.

    Raises:
        Fault: it cannot be read.
    """
    sniff(path)
    return _open_other(path, _loaded(path), options)


def _open_other(path: Path, image: Any, options: ReadOptions) -> Stored:
    shape, findings = drop_trailing(image.header.get_data_shape())
    _check_type(image.header.get_data_dtype())
    affine = np.asarray(image.affine, float)
    if isinstance(image, nibabel.AnalyzeImage):
        sizes = np.abs(np.asarray(image.header["pixdim"][1:4], float))
        affine = np.diag([-sizes[0], -sizes[1], sizes[2], 1.0])
        findings.append(_no_form("an Analyze file has no orientation"))
    _check_bytes(image, options)
    return Stored(Grid(affine, shape), lambda: _voxels(image), tuple(findings))


def header_of(path: str | Path) -> Any:
    """The header of a NIfTI file or pair; None for another format."""
    if not str(path).lower().endswith((".nii", ".nii.gz", ".hdr")):
        return None
    header = _loaded(Path(path)).header
    return header if isinstance(header, nibabel.nifti1.Nifti1Header) else None


def _loaded(path: Path) -> Any:
    try:
        with nibabel.imageglobals.LoggingOutputSuppressor():
            for image in IMAGES:
                if image.path_maybe_image(path)[0]:
                    return image.from_filename(path)
            return nibabel.load(path)
    except nibabel.filebasedimages.ImageFileError as error:
        if ".img" in str(error) or ".hdr" in str(error):
            raise _half() from error
        raise damaged("no such header") from error
    except FileNotFoundError as error:
        raise _half() from error
    except nibabel.spatialimages.HeaderDataError as error:
        if "data code" in str(error):
            raise _odd_type("unknown") from error
        raise damaged("header") from error
    except (EOFError, OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise damaged(error) from error


def _half() -> Fault:
    return Fault("one file of a pair", "NAME.hdr and NAME.img", "copy the other beside it")


def _odd_type(name: str) -> Fault:
    return Fault(f"voxels of type {name}", "integers or floating-point numbers", "convert it to int16 or float32")


def _check_type(dtype: np.dtype) -> None:
    if dtype.kind == "c":
        raise Fault("complex numbers", "real numbers", "store the magnitude")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise _odd_type("RGB (colour)" if dtype.kind == "V" else dtype.name)


def _check_bytes(image: Any, options: ReadOptions) -> None:
    path = Path(image.file_map["image"].filename)
    if not path.is_file():
        raise _half()
    header = image.header
    packed = path.name.lower().endswith((".gz", ".mgz", ".bz2"))
    offset = 0 if packed else int(image.dataobj.offset)
    shape, width = header.get_data_shape(), header.get_data_dtype().itemsize
    check_size(shape, width, path.stat().st_size - offset, options.most_voxels, DEFLATE if packed else 1)


def _voxels(image: Any) -> np.ndarray:
    """The voxels, by the standard library's gzip, to the end of the file: there stands the checksum."""
    path = Path(image.file_map["image"].filename)
    opened: Any = gzip.open if path.name.lower().endswith((".gz", ".mgz")) else open
    proxy = image.dataobj
    try:
        with opened(path, "rb") as file:
            values = np.asarray(
                ArrayProxy(file, (proxy.shape, proxy.dtype, proxy.offset, *_scaling(image)), mmap=False)
            )
            while file.read(1 << 20):
                pass
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise damaged("checksum" if "CRC" in str(error) else error) from error
    return values


def _scaling(image: Any) -> tuple[float, float]:
    return float(image.dataobj.slope), float(image.dataobj.inter)


def _unit_findings(header: Any) -> list[Finding]:
    name, scale = _units(header)
    if scale == 1.0:
        return []
    return [Finding(NOTE, f"sizes in {name}", "mm", "converted to mm")]


def _no_form(found: str) -> Finding:
    expected, remedy = (
        "a qform or an sform",
        "left, posterior and superior are assumed, as in ITK; check left and right",
    )
    return Finding(NOTE, found, expected, remedy)


def _form_findings(header: Any, found: Forms, taken: str, grid: Grid) -> list[Finding]:
    findings = []
    vector = quaternion_vector(header)
    if found.qform is not None and vector @ vector > 1 + QUATERNION:
        findings.append(Finding(NOTE, "a quaternion longer than 1", "at most 1", "shortened to 1"))
    if taken == "bare":
        return [*findings, _no_form("neither form of the header has a code")]
    shear = found.sform is not None and sheared(found.sform)
    if shear and found.qform is None:
        remedy = "kept; viewers built on ITK (3D Slicer, ITK-SNAP) refuse the file"
        findings.append(Finding(NOTE, "axes that are not at right angles (sform)", "right angles", remedy))
    if found.sform is not None and found.qform is not None:
        other = "qform" if taken == "sform" else "sform"
        distance = corner_distance(Grid(getattr(found, other), grid.shape), grid)
        if not distance <= ROUNDING:
            skew = "; the sform is sheared" if shear else ""
            text = f"sform and qform differ by {distance:.3g} voxels{skew}; the {taken} is taken"
            remedy = f"compare with your viewer; repair the header, or --set nifti_form={other} (all scans)"
            findings.append(Finding(WARNING, text, "forms that agree", remedy))
    if taken == "sform":
        sizes = np.abs(np.asarray(header["pixdim"][1:4], float)) * _units(header)[1]
        ratio = sizes / grid.spacing
        if not (np.abs(ratio - 1) * np.array(grid.shape) <= ROUNDING).all():
            text = f"voxel sizes of the sform ({_mm(grid.spacing)}) and of pixdim ({_mm(sizes)}) differ"
            remedy = "the sform's are taken; viewers built on ITK take pixdim"
            findings.append(Finding(WARNING, text, "sizes that agree", remedy))
    return findings


def _mm(sizes: np.ndarray) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes) + " mm"
