"""NRRD and MetaImage (MHA) files, read by ITK. Their headers are text, and are looked at before ITK sees them.

ITK follows a header to data in any file of the machine, takes some damaged compressed data as good, and allocates what
a header promises. Here data may lie in the file or beside it, and compressed data are read to their checksum first.
"""

from __future__ import annotations

import bz2
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from semisam_o1.data.findings import NOTE, WARNING, Fault, Finding
from semisam_o1.data.grids import Grid
from semisam_o1.data.stored import DEFLATE, ReadOptions, Stored, check_size, damaged, drop_trailing, sniff

LONGEST_HEADER = 1 << 22  # bytes
BLOCK = 1 << 20
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from ITK's LPS


class Data(NamedTuple):
    """Where a header says that the voxels are: the file, the byte at which they begin, and how they are compressed.

    ``packed`` is "" (not at all), "gzip", "bzip2" or "text", which is neither bytes nor compressed.
    """

    file: Path
    start: int
    packed: str


def open_nrrd(path: Path, options: ReadOptions) -> Stored:
    """A NRRD file, attached or beside its header. Raises `Fault` if it cannot be read."""
    if not sniff(path).startswith(b"NRRD"):
        raise damaged("no NRRD header")
    import itk

    head, start = _head(path, rb"\r?\n\r?\n")
    fields = _fields(head, ":")
    packed = {"gz": "gzip", "gzip": "gzip", "bz2": "bzip2", "bzip2": "bzip2", "raw": ""}
    encoding = packed.get(fields.get("encoding", "raw").lower(), "text")
    named = fields.get("data file", fields.get("datafile"))
    file = path if named is None else _beside(path, named)
    findings = []
    if "space" not in fields and "space dimension" not in fields:
        remedy = "left, posterior and superior are assumed, as in ITK; check left and right"
        findings.append(Finding(NOTE, "the header has no space", "a space, e.g. LPS", remedy))
    if odd := sorted(set(re.findall(r'"([^"]*)"', fields.get("space units", ""))) - {"mm", ""}):
        found = f"space units {', '.join(odd)[:40]}"
        findings.append(Finding(WARNING, found, "mm", "sizes are taken as mm; write them in mm"))
    return _open(path, itk.NrrdImageIO.New(), Data(file, start if named is None else 0, encoding), findings, options)


def open_metaimage(path: Path, options: ReadOptions) -> Stored:
    """A MetaImage (MHA, or MHD with its data beside it). Raises `Fault` if it cannot be read."""
    sniff(path)
    import itk

    head, start = _head(path, rb"ElementDataFile\s*=[^\n]*\n?")
    fields = _fields(head, "=")
    named = fields.get("elementdatafile")
    if named is None:
        raise damaged("no ElementDataFile in the header")
    packed = "gzip" if fields.get("compresseddata", "false").lower().startswith("t") else ""
    if fields.get("binarydata", "true").lower().startswith("f"):
        packed = "text"
    local = named.lower() == "local"
    file = path if local else _beside(path, named)
    return _open(path, itk.MetaImageIO.New(), Data(file, start if local else 0, packed), [], options)


def segments_of(path: Path) -> dict[int, str]:
    """Value -> name of the segments of a ``.seg.nrrd``, as 3D Slicer writes them; empty for another NRRD file."""
    head, _ = _head(path, rb"\r?\n\r?\n")
    fields = dict(re.findall(r"(?m)^(Segment\d+_(?:Name|LabelValue)):=(.*?)\r?$", head))
    numbers = sorted({int(name[7:].split("_")[0]) for name in fields})
    named = ((fields.get(f"Segment{n}_LabelValue", ""), fields.get(f"Segment{n}_Name")) for n in numbers)
    return {int(value): name for value, name in named if name and value.strip().isdigit()}


def _head(path: Path, end: bytes) -> tuple[str, int]:
    """The text of a header up to the pattern ``end``, and where the data begin after it."""
    with path.open("rb") as file:
        text = file.read(LONGEST_HEADER)
    found = re.search(end, text)
    head = text if found is None else text[: found.end()]
    try:
        return head.decode("utf-8"), len(head)  # as 3D Slicer and ITK write it
    except UnicodeDecodeError:
        return head.decode("latin-1"), len(head)


def _fields(head: str, mark: str) -> dict[str, str]:
    """Names in lower case -> values, of the lines ``name: value`` (NRRD) or ``name = value`` (MetaImage)."""
    lines = (line.partition(mark) for line in head.splitlines() if not line.startswith("#"))
    return {name.strip().lower(): value.strip() for name, found, value in lines if found}


def _beside(path: Path, name: str) -> Path:
    """The file of voxels that a header names, which must lie beside it."""
    if name.upper().startswith("LIST") or "%" in name:
        raise Fault("voxels in several files", "one file of data", "store it as one file (.nrrd, .mha)")
    if name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
        found = "a header that names data in another folder"
        raise Fault(found, "data in the file or beside it", "store it as one file (.nrrd, .mha)")
    if not (path.parent / name).is_file():
        raise Fault("the file of the voxels is missing", "the data beside the header", "copy it there")
    return path.parent / name


def _open(path: Path, io: Any, data: Data, findings: list[Finding], options: ReadOptions) -> Stored:
    try:
        io.SetFileName(str(path))
        io.ReadImageInformation()
    except RuntimeError as error:
        raise damaged("header") from error
    axes = io.GetNumberOfDimensions()
    sides = [io.GetDimensions(axis) for axis in range(axes)]
    parts, width = io.GetNumberOfComponents(), io.GetComponentSize()
    kind = io.GetComponentTypeAsString(io.GetComponentType())
    if kind == "unknown" or width == 0:
        raise Fault("voxels of an unknown type", "integers or floating-point numbers", "convert it to int16 or float32")
    if io.GetPixelType() == io.GetPixelTypeFromString("complex"):
        raise Fault("complex numbers", "real numbers", "store the magnitude")
    shape, dropped = drop_trailing([*sides, parts] if parts > 1 else sides)
    stored = data.file.stat().st_size - data.start
    ratio = {"": 1, "gzip": DEFLATE}.get(data.packed)
    expected = int(np.prod([float(n) for n in sides])) * parts * width
    check_size([*sides, parts], width, stored, options.most_voxels, ratio)
    affine = np.eye(4)
    for axis in range(min(axes, 3)):
        affine[: min(axes, 3), axis] = np.array(io.GetDirection(axis))[:3] * io.GetSpacing(axis)
        affine[axis, 3] = io.GetOrigin(axis)

    def read() -> np.ndarray:
        import itk

        if data.packed in ("gzip", "bzip2"):
            _check_packed(data, expected)
        try:
            return itk.array_from_image(itk.imread(str(path), pixel_type=itk.F, imageio=type(io).New())).T
        except (RuntimeError, MemoryError) as error:
            raise damaged("voxels") from error

    return Stored(Grid(RAS @ affine, shape), read, (*findings, *dropped))


def _check_packed(data: Data, expected: int) -> None:
    """Read compressed data to their checksum; nothing is kept."""
    unpack: Any = zlib.decompressobj(47) if data.packed == "gzip" else bz2.BZ2Decompressor()
    count = 0
    try:
        with data.file.open("rb") as file:
            file.seek(data.start)
            while not unpack.eof:
                block = unpack.unconsumed_tail if data.packed == "gzip" and unpack.unconsumed_tail else None
                block = block or file.read(BLOCK)
                if not block and not (data.packed == "bzip2" and not unpack.needs_input):
                    raise damaged("the compressed data end early")
                count += len(unpack.decompress(block, BLOCK * 4))
                if count > expected + BLOCK * 64:
                    raise damaged("more data than its header says")
    except Fault:
        raise
    except (zlib.error, OSError, ValueError, EOFError) as error:
        raise damaged("checksum") from error
    if count < expected:
        raise damaged("shorter than its header says")
