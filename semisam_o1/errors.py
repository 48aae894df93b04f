"""What an error means to a user: the sentence that a command prints in place of a traceback."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

from semisam_o1.types import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# Errors that are never the fault of one scan.
OF_THE_MACHINE = (*NO_ROOM, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
GO_ON = "What is finished is kept: give the same command again to go on."
REMEDIES = {
    errno.ENOSPC: f"the disk is full. Make room. {GO_ON}",
    errno.EDQUOT: f"your disk quota is used up. Make room. {GO_ON}",
    errno.EROFS: "the file system is read-only. Name another folder.",
    errno.EACCES: "permission denied. Change the permissions, or name another folder.",
    errno.EPERM: "the system does not permit it. Change the permissions, or name another folder.",
    errno.EIO: f"the disk or network reports an error. Check it. {GO_ON}",
    errno.ESTALE: f"the network folder has changed or is gone. Mount it again. {GO_ON}",
    errno.ENOENT: "there is no such file or folder.",
    errno.ENOTDIR: "a part of the path is a file, not a folder. Name another path.",
    errno.EISDIR: "a folder stands where a file is expected. Move it away, or name another path.",
    errno.EEXIST: "a file stands where a folder is expected. Move it away, or name another path.",
    errno.ENAMETOOLONG: "the path is too long for the file system. Use a shorter one.",
    errno.ELOOP: "its symbolic links lead in a circle. Remove them.",
    errno.EMFILE: f"too many files are open. Raise the limit (ulimit -n). {GO_ON}",
    errno.ENOMEM: f"memory is used up. Close other programs or use smaller settings. {GO_ON}",
}
MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|Cannot allocate memory|bad_alloc|can't start new thread",
    re.IGNORECASE,
)
WORKER = re.compile(r"DataLoader worker .*(killed|exited unexpectedly)")


class WriteError(UserError):
    """A result cannot be written: the fault of the machine, not of a scan."""

    def __init__(self, path: Path, error: OSError):
        super().__init__(f"{path} cannot be written: {remedy(error)}")
        self.errno = number(error)


def number(error: BaseException) -> int | None:
    """The system's number of an error. HDF5 gives it only in its text."""
    if isinstance(found := getattr(error, "errno", None), int):
        return found
    text = re.search(r"errno = (\d+)", str(error))
    return int(text[1]) if text and isinstance(error, (OSError, RuntimeError)) else None


def remedy(error: BaseException) -> str:
    """What happened and what to do, for an error of the system."""
    return REMEDIES.get(number(error) or 0) or f"{getattr(error, 'strerror', None) or error}."


def of_memory(error: BaseException) -> bool:
    """Whether an error, or a cause of it, says that memory is not enough."""
    return any(
        isinstance(part, MemoryError) or (isinstance(part, RuntimeError) and bool(MEMORY.search(str(part))))
        for part in chain(error)
    )


def of_the_machine(error: BaseException) -> bool:
    """Whether an error met on one scan would be met on every other: no room, no memory, results cannot be written."""
    return isinstance(error, (WriteError, MemoryError)) or number(error) in OF_THE_MACHINE


def plainly(error: BaseException | None) -> str | None:
    """The first message in an error's chain of causes that a user can act on; None if the error is a bug."""
    return next(filter(None, map(_sentence, chain(error))), None)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause of that, ..."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _sentence(error: BaseException) -> str | None:
    if isinstance(error, UserError):
        return str(error)
    if of_memory(error):
        return (
            "memory is not enough. Use smaller settings (feature_voxels, train_voxels, pool_batch; `validate` estimates"
            f" their cost) or close other programs. {GO_ON}"
        )
    if isinstance(error, RuntimeError) and WORKER.search(str(error)):
        return f"a process that loads scans was killed, often for lack of memory. {GO_ON}"
    if isinstance(error, FileNotFoundError) and error.errno is None:  # one of ours, with a sentence
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {remedy(error)}"
    if number(error) in REMEDIES:
        return remedy(error)
    return None
