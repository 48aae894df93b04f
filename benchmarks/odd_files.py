"""Odd and damaged image files: read right, refused, or wrong in silence, by this package and by others.

The truth of a file is what ITK's rule says of it (docs/data_formats.md). A reader is right if all voxels are right and
no corner lies more than 0.05 voxel off; a file that has no truth must be refused. The rivals are MONAI's `LoadImaged`,
TorchIO's `ScalarImage`, and the check of a case of nnU-Net's ``--verify_dataset_integrity`` with the reader that it
chooses; those that are not installed are left out: ``pip install torchio nnunetv2``.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from semisam_o1.data import Grid, ScanReader
from semisam_o1.data.checks import check_case
from semisam_o1.data.findings import LABEL_NOT_USED, SET_ASIDE, STOPS
from semisam_o1.data.grids import corner_distance
from semisam_o1.types import Case
from tests.reading.headers import PLAIN, SHAPE, SHEARED, TURNED, VOXELS, patch, write_mha, write_nifti, write_nrrd

RIGHT, REFUSED, WRONG = "right", "refused", "wrong in silence"
Truth = tuple[np.ndarray, np.ndarray] | None  # voxels and affine (RAS mm); None: the file must be refused
BARE = np.diag([-2.0, -3, 4, 1])
AXES = "space directions: (2,0,0) (0,3,0) (0,0,4)"
LPS = np.diag([-1.0, -1, 1, 1])


def options(parser) -> None:
    parser.add_argument("--output", type=Path, help="CSV of how each file ended")


def files(folder: Path) -> Iterator[tuple[str, Path, Truth]]:
    """Name, path and truth of each file."""

    def nifti(
        name: str, truth: Truth, *forms: Any, suffix: str = ".nii.gz", after: Callable = lambda path: None, **more
    ):
        path = write_nifti(folder / f"{name.replace(' ', '_')}{suffix}", *forms, **more)
        after(path)
        return name, path, truth

    def text(name: str, path: Path, affine: np.ndarray | None):
        return name, path, None if affine is None else (VOXELS, affine)

    plain, turned = (VOXELS, PLAIN), (VOXELS, TURNED)
    yield nifti("sform alone", plain, PLAIN, None, (1, 0))
    yield nifti("qform alone", turned, None, TURNED, (0, 1))
    yield nifti("both agree", plain, PLAIN, PLAIN, (1, 1))
    yield nifti("differ sform scanner", plain, PLAIN, TURNED, (1, 1))
    yield nifti("differ sform aligned", turned, PLAIN, TURNED, (2, 1))
    yield nifti("differ sform MNI", turned, PLAIN, TURNED, (4, 1))
    yield nifti("differ qform aligned", turned, PLAIN, TURNED, (3, 2))
    yield nifti("no code", (VOXELS, BARE), PLAIN, TURNED, (0, 0))
    yield nifti("shear alone", (VOXELS, SHEARED), SHEARED, None, (1, 0))
    yield nifti("shear beside a qform", plain, SHEARED, PLAIN, (1, 1))
    scaled = np.diag([1e3, 1e3, 1e3, 1])
    yield nifti(
        "microns",
        plain,
        scaled @ PLAIN,
        None,
        (1, 0),
        units="micron",
        fields={"pixdim": [1, 2e3, 3e3, 4e3, 0, 0, 0, 0]},
    )
    yield nifti("metres", plain, np.linalg.inv(scaled) @ PLAIN, None, (1, 0), units="meter",
                fields={"pixdim": [1, 2e-3, 3e-3, 4e-3, 0, 0, 0, 0]})  # fmt: skip
    half_turn = np.diag([2.0, -3, -4, 1])
    yield nifti("quaternion too long", (VOXELS, half_turn), None, half_turn, (0, 1), suffix=".nii",
                after=lambda path: patch(path, 256, "<3f", 1.00001, 0, 0))  # fmt: skip
    for dtype in (">i2", "uint16", "int64", "float64"):
        path = folder / f"type_{dtype.strip('>')}.nii.gz"
        header = nibabel.Nifti1Header(endianness=">" if dtype[0] == ">" else "<")
        header.set_data_dtype(np.dtype(dtype))
        nibabel.save(nibabel.Nifti1Image(VOXELS.astype(dtype), PLAIN, header), path)
        yield f"type {dtype}", path, plain
    yield nifti("slope", (VOXELS * 0.5 - 3, PLAIN), PLAIN, None, (1, 0), suffix=".nii",
                after=lambda path: patch(path, 112, "<2f", 0.5, -3))  # fmt: skip
    yield nifti("axis of one", plain, PLAIN, None, (1, 0), voxels=VOXELS[..., None])
    yield nifti("two axes of one", plain, PLAIN, None, (1, 0), voxels=VOXELS[..., None, None])
    yield nifti("4D", None, PLAIN, None, (1, 0), voxels=np.stack([VOXELS] * 2, -1))
    yield nifti("one slice", None, PLAIN, None, (1, 0), voxels=VOXELS[..., :1])
    yield nifti("complex", None, PLAIN, None, (1, 0), voxels=VOXELS.astype(np.complex64))
    yield nifti("voxels of 2 m", None, scaled @ PLAIN, None, (1, 0), fields={"pixdim": [1, 2e3, 3e3, 4e3, 0, 0, 0, 0]})
    yield nifti("constant", None, PLAIN, None, (1, 0), voxels=np.full(SHAPE, 7, np.int16))
    yield nifti("NaN alone", None, PLAIN, None, (1, 0), voxels=np.full(SHAPE, np.nan, np.float32))
    for cut in (1, 4, 9, 400):
        yield nifti(f"gzip without {cut} bytes", None, PLAIN, None, (1, 0), after=lambda path: _cut(path, cut))
    for where in (0.2, 0.5, 0.8, 0.95):
        yield nifti(f"gzip bit flipped at {where:g}", None, PLAIN, None, (1, 0), after=lambda path: _flip(path, where))
    yield nifti("cut in half", None, PLAIN, None, (1, 0), suffix=".nii", after=lambda path: _cut(path, 700))
    yield nifti("header larger than the file", None, PLAIN, None, (1, 0), suffix=".nii",
                after=lambda path: patch(path, 42, "<3h", 90, 80, 70))  # fmt: skip
    yield nifti("empty", None, PLAIN, None, (1, 0), after=lambda path: path.write_bytes(b""))
    yield nifti("pointer of Git LFS", None, PLAIN, None, (1, 0),
                after=lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"))  # fmt: skip
    nibabel.save(nibabel.MGHImage(VOXELS.astype(np.int32), TURNED), folder / "freesurfer.mgz")
    yield "FreeSurfer", folder / "freesurfer.mgz", turned
    nibabel.save(nibabel.Nifti1Pair(VOXELS, TURNED), folder / "pair.hdr")
    yield "pair", folder / "pair.hdr", turned
    flat = np.array([[2.0, 0, 0, 1], [0, 3, 0, 2], [0, 0, 4, 3], [0, 0, 0, 1]])
    origin = "space origin: (1,2,3)"
    for space, affine in (("left-posterior-superior", LPS @ flat), ("LPS", LPS @ flat), ("RAS", flat)):
        path = write_nrrd(folder / f"space_{space}.nrrd", [f"space: {space}", AXES, origin])
        yield text(f"NRRD {space}", path, affine)
    yield text("NRRD spacings alone", write_nrrd(folder / "spacings.nrrd", ["spacings: 2 3 4"]), BARE)
    packed = gzip.compress(VOXELS.tobytes(order="F"))
    for name, data in (("cut by 4", packed[:-4]), ("bit flipped", _flipped(packed, 0.5))):
        path = write_nrrd(folder / f"nrrd {name}.nrrd", ["space: LPS", AXES, origin], encoding="gzip", data=data)
        yield text(f"NRRD gzip {name}", path, None)
    (folder.parent / "elsewhere.raw").write_bytes(VOXELS.tobytes(order="F"))
    path = write_nrrd(folder / "away.nhdr", ["space: LPS", AXES, origin, "data file: ../elsewhere.raw"], data=b"")
    yield text("NRRD data elsewhere", path, None)
    yield text("MHA", write_mha(folder / "plain.mha", ["ElementSpacing = 2 3 4", "Offset = 1 2 3"]), LPS @ flat)
    squeezed = zlib.compress(VOXELS.tobytes(order="F"))
    for where in (0.3, 0.7):
        fields = ["CompressedData = True", f"CompressedDataSize = {len(squeezed)}", "ElementSpacing = 2 3 4"]
        path = write_mha(folder / f"flipped_{where:g}.mha", fields, data=_flipped(squeezed, where))
        yield text(f"MHA bit flipped at {where:g}", path, None)


def _cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def _flipped(data: bytes, where: float) -> bytes:
    changed = bytearray(data)
    changed[int(len(data) * where)] ^= 8
    return bytes(changed)


def _flip(path: Path, where: float) -> None:
    path.write_bytes(_flipped(path.read_bytes(), where))


# Readers: path -> voxels and affine; an exception is a refusal.


def ours(path: Path) -> tuple[np.ndarray, np.ndarray]:
    problems = check_case(Case("a", path, None, "pool"))
    if grave := [problem for problem in problems if problem.severity in (STOPS, SET_ASIDE, LABEL_NOT_USED)]:
        raise ValueError(grave[0].found)
    volume = ScanReader().volume(path)
    return volume[0].numpy(), np.asarray(volume.affine)


def by_monai(path: Path) -> tuple[np.ndarray, np.ndarray]:
    from monai.transforms import LoadImaged

    volume = LoadImaged("image", ensure_channel_first=True)({"image": str(path)})["image"]
    return volume[0].numpy(), np.asarray(volume.affine)


def by_torchio(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import torchio

    image = torchio.ScalarImage(path)
    return image.data[0].numpy(), np.asarray(image.affine)


def by_nnunet(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`check_cases`, which ``--verify_dataset_integrity`` runs on each case, with the image as its own label."""
    from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    suffix = next(suffix for suffix in (".nii.gz", path.suffix) if path.name.endswith(suffix))
    said = {"channel_names": {"0": "CT"}, "labels": {"background": 0}, "numTraining": 1, "file_ending": suffix}
    with contextlib.redirect_stdout(io.StringIO()):
        reader = determine_reader_writer_from_dataset_json(said, str(path), verbose=False)
        if not check_cases([str(path)], str(path), 1, reader):
            raise ValueError("check_cases says no")
        array, properties = reader().read_images([str(path)])
    if "nibabel_stuff" in properties:
        return array[0].T, properties["nibabel_stuff"]["original_affine"]
    stuff, affine = properties["sitk_stuff"], np.eye(4)
    affine[:3, :3] = np.array(stuff["direction"]).reshape(3, 3) * np.array(stuff["spacing"])
    affine[:3, 3] = stuff["origin"]
    return array[0].T, LPS @ affine


READERS = {
    "semisam_o1": (ours, "semisam_o1"), "MONAI": (by_monai, "monai"),
    "TorchIO": (by_torchio, "torchio"), "nnU-Net": (by_nnunet, "nnunetv2"),
}  # fmt: skip


def judge(read: Callable, path: Path, truth: Truth) -> str:
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            voxels, affine = read(path)
    except Exception:  # noqa: BLE001 - readers raise many kinds
        return REFUSED
    if truth is None or voxels.shape != truth[0].shape or not np.allclose(voxels, truth[0], atol=1e-3):
        return WRONG
    return RIGHT if corner_distance(Grid(affine, SHAPE), Grid(truth[1], SHAPE)) <= 0.05 else WRONG


def run(options) -> None:
    readers = {name: read for name, (read, package) in READERS.items() if importlib.util.find_spec(package)}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "files"
        folder.mkdir()
        for what, path, truth in files(folder):
            rows.append(
                [
                    what,
                    "to be read" if truth else "to be refused",
                    *(judge(read, path, truth) for read in readers.values()),
                ]
            )
    width = max(len(row[0]) for row in rows)
    print(f"{'file':{width}}  {'':13}  " + "  ".join(f"{reader:16}" for reader in readers))
    for row in rows:
        print(f"{row[0]:{width}}  {row[1]:13}  " + "  ".join(f"{end:16}" for end in row[2:]))
    print()
    for number, reader in enumerate(readers, start=2):
        ends = Counter(row[number] for row in rows)
        lost = sum(row[1] == "to be read" and row[number] == REFUSED for row in rows)
        said = f"{ends[RIGHT]} right, {ends[REFUSED]} refused ({lost} of them readable), {ends[WRONG]} {WRONG}"
        print(f"{reader:12} {len(rows)} files: {said}")
    if options.output:
        options.output.write_text("\n".join(",".join(row) for row in [["file", "expected", *readers], *rows]) + "\n")
