"""Atomic file writes, and the arrays that one stage writes for the next."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np
import torch


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``; renamed to ``path`` if the block succeeds, else deleted."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".partial-{path.name}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def disk_full(error: BaseException) -> bool:
    """Whether an error means that the disk is full; HDF5 reports it only in its text."""
    return getattr(error, "errno", None) == errno.ENOSPC or f"errno = {errno.ENOSPC}," in str(error)


def write_text(path: str | Path, text: str) -> None:
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content) -> None:
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


class WorkFiles:
    """Arrays of one kind that a stage writes for the next: one HDF5 file per case."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.h5"

    def has(self, name: str, key: str) -> bool:
        if not self.path(name).exists():
            return False
        with h5py.File(self.path(name), "r") as file:
            return key in file

    def save(self, name: str, half: dict[str, torch.Tensor], plain: dict) -> None:
        """``half``: large tensors, as float16. ``plain``: small arrays, numbers, text. Keys may be paths, "a/b"."""
        with atomic_write(self.path(name)) as aside, h5py.File(aside, "w") as file:
            for key, tensor in half.items():
                file[key] = tensor.numpy().astype(np.float16)
            for key, value in plain.items():
                file[key] = value.numpy() if isinstance(value, torch.Tensor) else value

    def groups(self, name: str, key: str) -> list[str]:
        """The names below the path ``key``, sorted; empty if the path does not exist."""
        with h5py.File(self.path(name), "r") as file:
            return sorted(file[key]) if key in file else []

    def load(self, name: str, keys: Iterable[str]) -> list:
        """The values of ``keys``: float32 tensors; text as str, several texts as a list."""
        with h5py.File(self.path(name), "r") as file:
            return [plain(file[key]) for key in keys]


def plain(stored: h5py.Dataset) -> torch.Tensor | str | list[str]:
    if not h5py.check_string_dtype(stored.dtype):
        return torch.as_tensor(stored[()], dtype=torch.float32)
    text = stored.asstr()[()]
    return text if isinstance(text, str) else text.tolist()
