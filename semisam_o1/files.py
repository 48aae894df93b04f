"""Atomic file writes, and the arrays that one stage writes for the next."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from semisam_o1.errors import OF_THE_MACHINE, WriteError, number
from semisam_o1.types import UserError

PARTIAL = ".partial-"  # prefix of a file that is being written; the process follows
PARTIAL_NAME = re.compile(rf"{re.escape(PARTIAL)}\d+-.+")


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``; renamed to ``path`` if the block succeeds, else deleted."""
    path = Path(path)
    aside = partial_path(path)
    with writing_errors(path, aside):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            aside.replace(path)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()


@contextlib.contextmanager
def writing_errors(*paths: Path) -> Iterator[None]:
    """Errors of the system while ``paths`` are written become a `WriteError`; those of other files stay as they are."""
    try:
        yield
    except OSError as error:
        places = {str(place) for path in paths for place in (path, *path.parents)}
        if error.filename is None or str(error.filename) in places or number(error) in OF_THE_MACHINE:
            raise WriteError(paths[0], error) from error
        raise


def is_path(value: Any) -> bool:
    """Whether a setting is a path: a text with a separator that is no expression."""
    return isinstance(value, (str, Path)) and "/" in str(value) and not str(value).startswith("$")


def partial_path(path: Path) -> Path:
    """Where a file is written before it takes its name; of this process alone."""
    return path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")


def remove(path: Path) -> None:
    """Remove a file or a folder with its contents. Of a symbolic link, only the link is removed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def remove_empty(folder: Path) -> None:
    """Remove the folders in ``folder`` in which nothing is, and itself if nothing is left."""
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        remove_if_empty(path)
    remove_if_empty(folder)


def remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copy a file atomically."""
    with atomic_write(target) as aside:
        shutil.copyfile(source, aside)


def checksum(path: str | Path) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path, kind: type = dict) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is no JSON, or its content is not of ``kind``.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: of JSON or of UTF-8
        raise UserError(f"{path} is damaged: no JSON ({str(error)[:100]}). Restore it, or remove it.") from error
    if not isinstance(content, kind):
        raise UserError(f"{path} is damaged: found a {type(content).__name__}, expected a {kind.__name__}.")
    return content


def write_text(path: str | Path, text: str) -> None:
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content) -> None:
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def read_hdf5(path: str | Path) -> h5py.File:
    """An HDF5 file to read. No lock is taken: file systems without locks refuse one, and files are written whole."""
    return h5py.File(path, "r", locking=False)


@contextlib.contextmanager
def write_hdf5(path: str | Path) -> Iterator[h5py.File]:
    """An HDF5 file in memory, written atomically at the end: HDF5 itself loses the cause of a failed write."""
    with h5py.File(f"{path}", "w", driver="core", backing_store=False) as file:
        yield file
        file.flush()
        image = file.id.get_file_image()
    with atomic_write(path) as aside:
        aside.write_bytes(image)


def write_torch(path: str | Path, content: Any) -> None:
    """`torch.save`, atomically: tensors and plain data. The bytes do not depend on the file's name."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as aside:
        aside.write_bytes(buffer.getbuffer())


def hdf5_names(path: Path) -> set[str]:
    """The names at the top of an HDF5 file; none if it is not one."""
    try:
        with read_hdf5(path) as file:
            return set(file)
    except OSError:
        return set()


class WorkFiles:
    """Arrays of one kind that a stage writes for the next: one HDF5 file per case."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.h5"

    def names(self) -> list[str]:
        """The names of the cases with a file, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.h5"))

    def has(self, name: str, key: str) -> bool:
        if not self.path(name).exists():
            return False
        with read_hdf5(self.path(name)) as file:
            return key in file

    def save(self, name: str, half: dict[str, torch.Tensor], plain: dict) -> None:
        """``half``: large tensors, as float16. ``plain``: small arrays, numbers, text. Keys may be paths, "a/b"."""
        with write_hdf5(self.path(name)) as file:
            for key, tensor in half.items():
                file[key] = tensor.numpy().astype(np.float16)
            for key, value in plain.items():
                file[key] = value.numpy() if isinstance(value, torch.Tensor) else value

    def groups(self, name: str, key: str) -> list[str]:
        """The names below the path ``key``, sorted; empty if the path does not exist."""
        with read_hdf5(self.path(name)) as file:
            return sorted(file[key]) if key in file else []

    def load(self, name: str, keys: Iterable[str]) -> list:
        """The values of ``keys``: float32 tensors; text as str, several texts as a list."""
        with read_hdf5(self.path(name)) as file:
            return [plain(file[key]) for key in keys]


def plain(stored: h5py.Dataset) -> torch.Tensor | str | list[str]:
    if not h5py.check_string_dtype(stored.dtype):
        return torch.as_tensor(stored[()], dtype=torch.float32)
    text = stored.asstr()[()]
    return text if isinstance(text, str) else text.tolist()
