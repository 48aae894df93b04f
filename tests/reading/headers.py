"""Files with headers of every kind, written byte by byte where a library would put them right."""

import struct

import nibabel
import numpy as np

SHAPE, SIZES = (9, 8, 7), (2.0, 3.0, 4.0)
VOXELS = np.random.default_rng(0).integers(0, 1000, SHAPE).astype(np.int16)
PLAIN = np.array([[2.0, 0, 0, -5], [0, 3, 0, -6], [0, 0, 4, -7], [0, 0, 0, 1]])
TURNED = np.array([[0.0, -3, 0, 10], [2, 0, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1]])  # the same voxel sizes
SHEARED = np.array([[2.0, 0, 1.2, -5], [0, 3, 0, -6], [0, 0, 4, -7], [0, 0, 0, 1]])


class AsSaid(nibabel.Nifti1Image):
    """Writes the header as it is."""

    def update_header(self):
        pass


def write_nifti(path, sform=None, qform=None, codes=(0, 0), units="mm", voxels=VOXELS, fields=None):
    """A NIfTI file with the forms, their codes (sform, qform) and, at last, the raw header ``fields``."""
    header = nibabel.Nifti1Header()
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    header["pixdim"][1:4] = SIZES
    if qform is not None:
        header.set_qform(qform, 1, strip_shears=True)
    if sform is not None:
        header.set_sform(sform, 1)
    header["sform_code"], header["qform_code"] = codes
    header.set_xyzt_units(units)
    for name, value in (fields or {}).items():
        header[name] = value
    AsSaid(voxels, None, header).to_filename(path)
    return path


def write_nrrd(path, fields, voxels=VOXELS, encoding="raw", data=None):
    """A NRRD file of the header lines ``fields``; ``data``: the bytes after the header, by default the voxels."""
    sizes = " ".join(map(str, voxels.shape))
    names = {"int16": "short", "uint8": "uchar", "float32": "float", "int64": "long long"}
    lines = ["NRRD0005", f"type: {names[voxels.dtype.name]}", f"dimension: {voxels.ndim}", f"sizes: {sizes}"]
    lines += [f"encoding: {encoding}", "endian: little", *fields, "", ""]
    path.write_bytes("\n".join(lines).encode() + (voxels.tobytes(order="F") if data is None else data))
    return path


def write_mha(path, fields, voxels=VOXELS, data=None, last="ElementDataFile = LOCAL"):
    """A MetaImage of the header lines ``fields``."""
    names = {"int16": "MET_SHORT", "uint8": "MET_UCHAR"}
    sizes = " ".join(map(str, voxels.shape))
    lines = ["ObjectType = Image", f"NDims = {voxels.ndim}", "BinaryData = True", "BinaryDataByteOrderMSB = False"]
    lines += [*fields, f"DimSize = {sizes}", f"ElementType = {names[voxels.dtype.name]}", last, ""]
    path.write_bytes("\n".join(lines).encode() + (voxels.tobytes(order="F") if data is None else data))
    return path


def patch(path, offset, form, *values):
    """Overwrite bytes of a file."""
    raw = bytearray(path.read_bytes())
    raw[offset : offset + struct.calcsize(form)] = struct.pack(form, *values)
    path.write_bytes(raw)
