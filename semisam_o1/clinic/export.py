"""Gives the pseudo-labels of a run to MONAI Label as suggestions, which its module in 3D Slicer opens by itself.

A suggestion is a label with the tag ``original``. It carries the names of its classes and its own checksum, so that a
later export replaces its own suggestions alone: a suggestion that somebody changed, or another program made, is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from semisam_o1.data.datastore import STORE
from semisam_o1.data.folders import composed
from semisam_o1.data.formats import case_name, format_of
from semisam_o1.files import checksum, copy_file, read_json, write_json
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import DatasetError, UserError

log = logging.getLogger("semisam_o1")
TAG = "original"  # of suggestions; people's labels have "final"
SUFFIX = ".nii.gz"  # of pseudo-labels
SECONDS = 60  # that a server may take for an answer


class Studies(Protocol):
    """The scans of MONAI Label, in a folder or behind a server."""

    def images(self) -> list[str]:
        """The ids of the images."""

    def suggestion(self, image: str) -> tuple[str, str | None] | None:
        """Checksum of an image's suggestion, and the one that its export recorded; None if there is none."""

    def suggest(self, image: str, label: Path, params: Mapping[str, Any]) -> None:
        """Replace an image's suggestion by a NIfTI label."""


def export(run_dir: str | Path, to: str) -> tuple[str, bool]:
    """Give the final labels of a run to a studies folder or server of MONAI Label.

    Args:
        to: a studies folder, or the address of a server, http://...

    Returns the lines that say what was done, and whether each label was given.

    Raises:
        DatasetError: there is no finished run, or no such folder. UserError: the server cannot be reached.
    """
    run = RunFolder(run_dir)
    record = run.read_record()
    labels = {composed(case_name(path)): path for path in sorted(run.pseudo_labels.glob(f"*{SUFFIX}"))}
    if not record or not labels:
        raise DatasetError(f"{run.path}: no labels there; expected the folder of a finished run.")
    numbers = {name: int(number) for number, name in record["classes"].items() if int(number)}
    studies: Studies = Server(to) if is_address(to) else Folder(to)
    images = {composed(image): image for image in studies.images()}
    given, kept = [], []
    for name, label in labels.items():
        if name not in images:
            continue
        there, mark = studies.suggestion(images[name]), checksum(label)
        if there is not None and there[0] != there[1]:
            kept.append(images[name])
            continue
        if there is None or there[0] != mark:
            studies.suggest(images[name], label, {"label_names": numbers, "sha256": mark})
        given.append(images[name])
    lines = [f"suggestions in {to}: {len(given)} of {len(labels)} labels"]
    if kept:
        lines.append(
            f"kept, because this program did not write them or somebody changed them: {', '.join(kept)}. Delete a "
            f"suggestion (tag {TAG}) to have it replaced."
        )
    if missing := [name for name in labels if name not in images]:
        lines.append(f"no image of that name there: {', '.join(missing)}")
    return "\n".join(lines), not kept and not missing


def is_address(to: str) -> bool:
    return urllib.parse.urlsplit(str(to)).scheme in ("http", "https")


class Folder:
    """A studies folder of MONAI Label: images, labels/TAG/, and a datastore file, which a server reads as it changes.

    Raises:
        DatasetError: there is no such folder, or its datastore file is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise DatasetError(f"{path}: no such folder; expected a studies folder, or the address of a server.")
        self.labels = self.path / "labels" / TAG

    def images(self) -> list[str]:
        return list(self._files())

    def suggestion(self, image: str) -> tuple[str, str | None] | None:
        found = [path for path in self.labels.glob("*") if case_name(path) == image]
        if not found:
            return None
        known = self._datastore()["objects"].get(image, {}).get("labels", {}).get(TAG, {})
        return checksum(found[0]), known.get("info", {}).get("params", {}).get("sha256")

    def suggest(self, image: str, label: Path, params: Mapping[str, Any]) -> None:
        target = self.labels / f"{image}{SUFFIX}"
        self.labels.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / ".lock"):  # of MONAI Label, which writes the datastore file too
            copy_file(label, target)
            datastore, file, now = self._datastore(), self._files()[image], int(time.time())
            suffix = file.name[len(image) :]
            known = datastore["objects"].setdefault(image, {"image": _entry(suffix, ts=now, name=file.name)})
            info = _entry(SUFFIX, ts=now, name=target.name, params=dict(params))
            known["labels"] = known.get("labels", {}) | {TAG: info}
            write_json(self.path / STORE, datastore)

    def _files(self) -> dict[str, Path]:
        return {case_name(path): path for path in sorted(self.path.iterdir()) if path.is_file() and format_of(path)}

    def _datastore(self) -> dict[str, Any]:
        path = self.path / STORE
        empty = {"name": "new-dataset", "description": "New Dataset", "images_dir": ".", "labels_dir": "labels"}
        found = empty | (read_json(path) if path.is_file() else {})
        if not isinstance(found.setdefault("objects", {}), dict):
            raise DatasetError(f"{path} is damaged: 'objects' is no table. Delete it; MONAI Label makes it anew.")
        return found


class Server:
    """A MONAI Label server at ``address``, as http://127.0.0.1:8000."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")

    def images(self) -> list[str]:
        return list(json.loads(self._ask("datastore/", output="all") or b"{}").get("objects", {}))

    def suggestion(self, image: str) -> tuple[str, str | None] | None:
        content = self._ask("datastore/label", label=image, tag=TAG)
        if content is None:
            return None
        info = json.loads(self._ask("datastore/label/info", label=image, tag=TAG) or b"{}")
        return hashlib.sha256(content).hexdigest(), info.get("params", {}).get("sha256")

    def suggest(self, image: str, label: Path, params: Mapping[str, Any]) -> None:
        mark, content = uuid.uuid4().hex, json.dumps({"params": dict(params)})
        head = 'Content-Disposition: form-data; name="'
        parts = [
            f'--{mark}\r\n{head}params"\r\n\r\n{content}\r\n'.encode(),
            f'--{mark}\r\n{head}label"; filename="label{SUFFIX}"\r\n\r\n'.encode(),
            label.read_bytes(),
            f"\r\n--{mark}--\r\n".encode(),
        ]
        kind = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        self._ask("datastore/label", b"".join(parts), kind, image=image, tag=TAG)

    def _ask(
        self, where: str, content: bytes | None = None, headers: Mapping[str, str] | None = None, **query: str
    ) -> bytes | None:
        """The answer to a request, a PUT if it has content; None if the server has no such thing."""
        address = f"{self.address}/{where}?{urllib.parse.urlencode(query)}"
        method = "GET" if content is None else "PUT"
        request = urllib.request.Request(address, content, dict(headers or {}), method=method)  # noqa: S310 - http or https
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310 - the user's own
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 404 and content is None:
                return None
            raise UserError(f"{self.address}: the server answers {error.code} to {where}.") from error
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"{self.address}: no MONAI Label server answers there ({reason}).") from error


def _entry(suffix: str, **info: Any) -> dict[str, Any]:
    """A file in the datastore file of MONAI Label."""
    return {"ext": suffix, "info": info}
