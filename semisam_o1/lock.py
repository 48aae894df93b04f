"""One process works on a run folder at a time, also on file systems without locks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from semisam_o1.files import PARTIAL, write_text
from semisam_o1.types import DatasetError

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
BEAT = 10  # seconds between two signs of life
WAIT = 60  # seconds for a file that another process reads and writes
DEAD = 6 * BEAT  # without one for so long, a process on another computer is taken for dead


@contextlib.contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Lock ``folder`` for this process. The lock ends with the process, even if it is killed.

    A file system may have no locks. Then the file ``.holder`` says who works there: a process of this computer that no
    longer runs, or one of another computer that has given no sign of life for `DEAD` seconds, holds nothing.

    Raises:
        DatasetError: another process holds the lock; the message names it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / ".holder"
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(folder / ".lock", timeout=0))
        except (NotImplementedError, OSError) as error:
            if not isinstance(error, (Timeout, NotImplementedError)) and error.errno not in NO_LOCKS:
                raise
            if has_locks(folder) or is_alive(holder):
                raise DatasetError(f"{folder} is being worked on by {_who(holder)}.") from error
        write_text(holder, json.dumps(_me()))
        held.callback(holder.unlink, missing_ok=True)
        held.enter_context(_signs_of_life(holder))
        yield


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Wait for other processes that read and write ``file``; where the file system has no locks, nobody waits."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(file.with_name(f".{file.name}.lock"), timeout=WAIT))
        except Timeout as error:
            raise DatasetError(f"{file} has been in use by another process for {WAIT} s. Try again.") from error
        except (NotImplementedError, OSError) as error:
            if not isinstance(error, NotImplementedError) and error.errno not in NO_LOCKS:
                raise
        yield


def has_locks(folder: Path) -> bool:
    """Whether the file system of ``folder`` has locks: nobody else can hold that of a new file."""
    with tempfile.TemporaryDirectory(prefix=f"{PARTIAL}{os.getpid()}-", dir=folder) as name:
        try:
            with FileLock(Path(name) / "lock", timeout=0):
                return True
        except (NotImplementedError, OSError):  # Timeout is one
            return False


def is_alive(holder: Path) -> bool:
    """Whether the process that a ``.holder`` file names still works."""
    try:
        found = json.loads(holder.read_text(encoding="utf-8"))
        host, process, began = found["host"], int(found["process"]), found["began"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    if host == socket.gethostname():
        return _began(process) == began
    return _now(holder.parent) - holder.stat().st_mtime < DEAD


def _me() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"process": os.getpid(), "began": _began(os.getpid()), "host": socket.gethostname(), "since": since}


def _who(holder: Path) -> str:
    try:
        found = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {int(found['process'])} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


def _began(process: int) -> str | None:
    """When a process of this computer began, in ticks of its clock: numbers of processes are used again.

    None if there is no such process; "?" where the system does not say.
    """
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None if Path("/proc/self/stat").exists() or not _runs(process) else "?"


def _runs(process: int) -> bool:
    if os.name != "posix":  # elsewhere the call below ends the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def _now(folder: Path) -> float:
    """The time by the clock of the file system, which may not be that of this computer."""
    with tempfile.NamedTemporaryFile(prefix=f"{PARTIAL}{os.getpid()}-", dir=folder) as file:
        return Path(file.name).stat().st_mtime


@contextlib.contextmanager
def _signs_of_life(holder: Path) -> Iterator[None]:
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(holder)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
