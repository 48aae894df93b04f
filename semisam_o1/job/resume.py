"""A killed run goes on where it was: the journal of its steps, and its lock."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from semisam_o1.files import write_json, write_text
from semisam_o1.job.config import reaches
from semisam_o1.runfolder import LAYOUT, RunFolder
from semisam_o1.types import DatasetError

# Matters of the machine and of the command: they may change from one start to the next, results stay the same.
FREE = (
    "bundle_root",
    "cache_num",
    "checkpoint_seconds",
    "dataset_dir",
    "device",
    "output_dir",
    "preset",
    "restart_from",
    "round",
    "threads",
)


MOST_CAUSES = 5  # of changed settings, named in a message


class Journal:
    """``RUN/progress.json``: with which settings a run was begun, and which of its steps are whole, in their order.

    Args:
        run: the folder.
        leaves: every value that results may depend on, by its id; see `JobConfig.leaves`. Those below FREE are left
            out.
        needed: step -> the ids that it is made of; see `JobConfig.needed`.
    """

    def __init__(self, run: RunFolder, leaves: Mapping[str, Any], needed: Callable[[str], set[str]]):
        self.run, self.needed = run, needed
        kept = {id: value for id, value in leaves.items() if id.split("#")[0] not in FREE}
        self.settings = json.loads(json.dumps(kept, default=str))
        self.done: list[str] = []
        self.half_done_fits = False  # whether what the first step not done has left may be used

    def open(self, restart_from: str | None = None) -> bool:
        """Take up the steps of an earlier start; False if there is none.

        Raises:
            DatasetError: settings have changed since, which makes finished steps stale, and ``restart_from`` names
                no step early enough; or the folder is of an earlier layout.
        """
        kept = self.run.read_journal()
        if not kept:
            return False
        self.done = kept["done"]
        if restart_from is not None:
            if not re.fullmatch(r"(features|propagation|round_[1-9]\d*)(/\w+)?", restart_from):
                raise DatasetError(f"restart_from '{restart_from}': expected features, propagation, round_1, ...")
            if (number := round_of(restart_from)) > round_of(self.done[-1] if self.done else "") + 1:
                raise DatasetError(f"restart_from '{restart_from}': the run has not come to round {number} yet.")
            self.done = self.done[: self._first(restart_from)]
        old = kept["settings"]
        changed = sorted(k for k in {*old, *self.settings} if old.get(k) != self.settings.get(k))
        stale = next((step for step in self.done if self._is_stale(step, changed)), None)
        if stale is not None:
            causes = [id for id in changed if reaches(self.needed(stale), id)]
            said = "; ".join(
                f"{id} was {short(old.get(id))}, is {short(self.settings.get(id))}" for id in causes[:MOST_CAUSES]
            )
            more = f"; and {len(causes) - MOST_CAUSES} more" if len(causes) > MOST_CAUSES else ""
            raise DatasetError(
                f"{self.run.path} was begun with other settings ({said}{more}), so its results from '{part_of(stale)}' "
                "on do not fit. Name another folder, take the old settings, or say "
                f"--restart-from {part_of(stale)}."
            )
        self.half_done_fits = restart_from is None and not changed
        self._write()
        return True

    def begin(self) -> None:
        """Forget every step."""
        self.done = []
        self._write()

    def add(self, step: str) -> None:
        self.done.append(step)
        self._write()

    def _is_stale(self, step: str, changed: list[str]) -> bool:
        needed = self.needed(step) if changed else set()
        return any(reaches(needed, id) for id in changed)

    def _first(self, step: str) -> int:
        """How many of the steps done come before ``step`` or its parts ("round_1" of "round_1/training")."""
        parts = (number for number, name in enumerate(self.done) if f"{name}/".startswith(f"{step}/"))
        return next(parts, len(self.done))

    def _write(self) -> None:
        write_json(self.run.journal, {"layout": LAYOUT, "done": self.done, "settings": self.settings})


def part_of(step: str) -> str:
    """The step to restart from for ``step``: the first part of a round or of the propagation is the whole of it."""
    return {"propagation/first": "propagation"}.get(step, step.removesuffix("/training"))


def round_of(step: str) -> int:
    """The round that a step belongs to; 0 before the first."""
    return int(step.split("/")[0].removeprefix("round_")) if step.startswith("round_") else 0


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextlib.contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """``folder`` for this process alone; freed with the process, however it ends.

    Raises:
        DatasetError: another process works there; it is named.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / ".holder"
    try:
        with FileLock(folder / ".lock", timeout=0):
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            write_text(holder, f"process {os.getpid()} on {socket.gethostname()}, since {since}")
            try:
                yield
            finally:
                holder.unlink(missing_ok=True)
    except Timeout as error:
        who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise DatasetError(f"{folder} is being worked on by {who}.") from error
