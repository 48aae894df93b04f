"""Which file of a data set's folders is which case. Every file is a case, is ignored by name and counted, or a problem.

Names are matched as people and programs write them: with accents composed or decomposed, with nnU-Net's channel
(``x_0000``), with BIDS entities, as ``.seg.nrrd``, and in lists with folder and suffix.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path, PureWindowsPath

from semisam_o1.data.findings import NOTE, STOPS, WARNING, Problem
from semisam_o1.data.formats import SUFFIXES, case_name, format_of
from semisam_o1.data.hdf5 import has_dataset
from semisam_o1.data.labels import some
from semisam_o1.data.reader import LABEL
from semisam_o1.literals import is_name, printable

FOLDERS = ("images", "labels", "data")
CHANNEL = re.compile(r"^(.+)_(\d{4})$")
# Entities of BIDS that say what a file is, not of which scan it is.
OF_A_FILE = {"desc", "label", "space", "res", "den", "seg", "hemi", "from", "to", "mode", "rec"}
DOCUMENTS, MOST_NAMED = "sidecars and documents", 3  # so many are named
UNNAMED = "a file"  # in place of a name that may be that of a patient
# Files that are no scans, by name: pattern -> what they are.
IGNORED = {
    r"^\._.*": "AppleDouble files of macOS",
    r"^(\.DS_Store|\.directory|Thumbs\.db|desktop\.ini)$": "files of the desktop",
    r"^\..*|.*(~|\.tmp|\.part|\.lock)$": "hidden or temporary files",
    r".*\.(json|bvec|bval|txt|csv|tsv|xml|md|yaml|yml|log|html|pdf|docx?|xlsx?|png|jpe?g)$": DOCUMENTS,
}
# Formats that people have and that are not read: pattern -> what they are.
UNREAD = {
    r".*\.(dcm|dicom|ima)$": "a DICOM file",
    r".*\.(zip|tar|tgz|7z|rar|tar\.gz)$": "an archive",
    r".*\.nii\.(bz2|xz|zst|zip)$": "NIfTI in a compression that is not read",
}
BESIDE = {".img": (".hdr",), ".raw": (".mhd", ".nhdr"), ".zraw": (".mhd",), ".gz": (".nhdr",), ".bz2": (".nhdr",)}
Index = dict[str, list[Path]]  # case name -> its files


def composed(name: str) -> str:
    """``name`` with accents composed (NFC), in which form names are compared."""
    return unicodedata.normalize("NFC", name)


def find_files(
    root: Path, listed: Collection[str], channel: int | None, problems: list[Problem], name_ignored: bool = True
) -> tuple[Index, Index]:
    """Image and label files by case, for either layout; an HDF5 file with a label is in both.

    Args:
        listed: the entries of the lists, and the names of templates.
        channel: of scans in several files ``x_0000``, ``x_0001``, ... the one to take.
        name_ignored: name entries that are no scans; their names may be those of patients.
    """
    layout = "data/*.h5, or images/*.nii.gz (nii, nrrd, mha ...)"
    if not root.is_dir():
        found = "a file, not a folder" if root.exists() else "no such folder"
        problems.append(Problem("data set", STOPS, found, "a folder", "check the path"))
        return {}, {}
    hdf5, images = (_index(root, folder, problems, name_ignored) for folder in ("data", "images"))
    if hdf5 and images:
        problems.append(Problem("data set", STOPS, "images in data/ and in images/", "one of them", "move one away"))
    if not hdf5 and not images:
        above = root.name in FOLDERS and any(format_of(path) for path in root.glob("*"))
        remedy = "name the folder above it" if above else "check the path and the suffixes"
        problems.append(Problem("data set", STOPS, "no image", layout, remedy))
    if not images:
        return hdf5, {name: paths for name, paths in hdf5.items() if has_dataset(paths[0], LABEL)}
    labels = _index(root, "labels", problems, name_ignored)
    images = _by_channel(images, {*labels, *(_plain(text) for text in listed)}, channel, problems)
    matched: Index = {}
    for name, paths in labels.items():
        matched.setdefault(match(name, images), []).extend(paths)
    return images, matched


def match(text: str, images: Collection[str]) -> str:
    """The case that a list's entry, a label's name or a template's name stands for; the plain name if there is none."""
    names = [composed(text), _plain(text)]
    names += [channel[1] for name in names if (channel := CHANNEL.match(name))]
    for name in names:
        if name in images:
            return name
    if _plain(text).startswith("sub-"):
        wanted = _entities(_plain(text))
        found = [name for name in images if name.startswith("sub-") and wanted.items() <= _entities(name).items()]
        exact = [name for name in found if _entities(name) == wanted]
        for few in (exact, found):
            if len(few) == 1:
                return few[0]
    return _plain(text)


def leaves_the_folder(name: str) -> bool:
    """Whether a list's entry, folders of the data set taken off, is no plain name of a case."""
    odd = name in (".", "..") or not is_name(name) or any(c in "/\\" for c in name)
    return odd or bool(PureWindowsPath(name).drive)


def without_folder(text: str, root: Path) -> str:
    """A list's entry without the folder of the data set: ``images/x.nii.gz`` is ``x.nii.gz``."""
    plain = text.replace("\\", "/")
    for start in (f"{root.resolve().as_posix()}/", f"{root.as_posix()}/", f"{root.name}/"):
        plain = plain.removeprefix(start)
    plain = plain.removeprefix("./")
    first, _, rest = plain.partition("/")
    return rest if first in FOLDERS and rest and "/" not in rest else text


def _plain(text: str) -> str:
    """A name composed and without the suffix of its format, and without Slicer's ``.seg``."""
    name = composed(text)
    suffix = max((s for s in SUFFIXES if name.lower().endswith(s)), key=len, default="")
    return name[: len(name) - len(suffix)].removesuffix(".seg")


def _entities(name: str) -> dict[str, str]:
    """The BIDS entities of a name that say of which scan it is: {"sub": "01", "ses": "2"}."""
    pairs = (part.partition("-") for part in name.split("_"))
    return {key: value for key, found, value in pairs if found and key not in OF_A_FILE}


def scans_of(folder: Path, problems: list[Problem], name_ignored: bool = True) -> list[Path]:
    """The images of any folder, sorted. ``name_ignored``: see `find_files`."""
    index = _index(folder, "", problems, name_ignored)
    return sorted(path for paths in index.values() for path in paths)


def _index(root: Path, folder: str, problems: list[Problem], name_ignored: bool) -> Index:
    """The files of a folder by case. What is no case is counted or named as a problem. "": one of any format."""
    files: Index = {}
    ignored: dict[str, list[str]] = {}
    paths = sorted((root / folder).iterdir()) if (root / folder).is_dir() else []
    names, place = {path.name for path in paths}, f"{folder}/" if folder else "the folder"
    for path in paths:
        if what := next(
            (what for pattern, what in IGNORED.items() if re.fullmatch(pattern, path.name, re.IGNORECASE)), ""
        ):
            ignored.setdefault(what, []).append(path.name)
        elif (trouble := _trouble(path, folder)) is not None:
            if trouble and not _is_beside(path, names):
                problems.append(Problem(printable(path.name) if name_ignored else UNNAMED, *trouble))
        elif is_name(name := composed(case_name(path)).removesuffix(".seg")):
            files.setdefault(name, []).append(path)
        else:
            remedy = "rename the file; it is ignored"
            found = f"a name in {place} with control characters or too long"
            case = printable(name) if name_ignored else UNNAMED
            problems.append(Problem(case, NOTE, found, "a name that can be printed", remedy))
    if ignored:
        counts = [f"{what} ({_count(those, name_ignored and what == DOCUMENTS)})" for what, those in ignored.items()]
        found = f"ignored in {place}: {', '.join(counts)}"
        problems.append(Problem("data set", NOTE, found, "scans and labels", "nothing to do"))
    return files


def _count(names: list[str], say: bool) -> str:
    """How many names there are and, if ``say``, the first ones."""
    shown = ", ".join(map(printable, names[:MOST_NAMED])) + (", ..." if len(names) > MOST_NAMED else "")
    return f"{len(names)}: {shown}" if say else f"{len(names)}"


def _trouble(path: Path, folder: str) -> tuple[str, str, str, str] | None:
    """Why an entry of a folder is no file of a case: severity, found, expected, remedy. None if it is one."""
    expected, place = (
        "HDF5" if folder == "data" else "NIfTI, NRRD, MHA or MGZ",
        f"{folder}/" if folder else "the folder",
    )
    format = format_of(path)
    if path.is_dir():
        return WARNING, f"a folder in {place}", "files alone", "move its scans up; folders are not read"
    if not path.is_file() and not path.is_symlink():
        return WARNING, f"no regular file in {place}", expected, "remove it"
    if format is None:
        unread = (what for pattern, what in UNREAD.items() if re.fullmatch(pattern, path.name, re.IGNORECASE))
        found = next(unread, None) or ("a DICOM file" if _is_dicom(path) else "a format that is not read")
        return WARNING, f"{found} in {place}", expected, "convert it, e.g. to NIfTI, or move it away"
    if folder and format.folder != ("data" if folder == "data" else "images"):
        return WARNING, f"{format.name} in {place}", expected, f"move it to {format.folder}/"
    if folder in ("images", "") and path.name.lower().endswith((".seg.nrrd", ".seg.nhdr")):
        return WARNING, "a segmentation in images/", "a scan", "move it to labels/"
    return None


def _is_beside(path: Path, names: Collection[str]) -> bool:
    """Whether a file holds the voxels of a header beside it."""
    stem, suffix = path.stem, path.suffix.lower()
    heads = BESIDE.get(suffix, ())
    return any(f"{start}{head}" in names for head in heads for start in (stem, Path(stem).stem))


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _by_channel(images: Index, known: Iterable[str], channel: int | None, problems: list[Problem]) -> Index:
    """``images`` without nnU-Net's channel in their names, if labels and lists write them so.

    A number of four digits at the end of a name may also be the number of a case. It is a channel if a label or a list
    has a name without it, for which there is no other image, and none has a name with it.
    """
    parts = {name: found for name in images if (found := CHANNEL.match(name))}
    known = set(known)
    without = {found[1] for found in parts.values()} & known - set(images)
    if not without or known & set(parts):
        return images
    cases: dict[str, dict[int, list[Path]]] = {}
    for name, found in parts.items():
        if found[1] not in images:
            cases.setdefault(found[1], {})[int(found[2])] = images[name]
    others = {name: paths for name, paths in images.items() if name not in parts or parts[name][1] in images}
    numbers = sorted({number for found in cases.values() for number in found})
    if channel is None and len(numbers) > 1:
        shown = some([f"_{number:04d}" for number in numbers])
        remedy = f"choose one: --set channel={numbers[0]}"
        problems.append(Problem("data set", STOPS, f"several channels per scan: {shown}", "one channel", remedy))
        return others | {name: next(iter(found.values())) for name, found in cases.items()}
    wanted = numbers[0] if channel is None else channel
    lacking = [name for name, found in cases.items() if wanted not in found]
    expected = "the channel of the other scans"
    problems += [Problem(name, WARNING, f"no channel _{wanted:04d}", expected, "add it") for name in lacking]
    return others | {name: found[wanted] for name, found in cases.items() if wanted in found}
