"""Resuming a killed run: the journal of its steps, and the lock of its folder."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from semisam_o1.data.cohort import LISTS
from semisam_o1.files import checksum, is_path, write_json
from semisam_o1.job.config import reaches
from semisam_o1.runfolder import LAYOUT, RunFolder
from semisam_o1.types import DatasetError

# Settings of the machine and the command, and those whose effect is compared in their place. They may change between
# starts without changing the results.
FREE = (
    "bundle_root",
    "cache_num",
    "checkpoint_seconds",
    "dataset_dir",
    "device",
    "output_dir",
    "preset",
    "pseudonyms",  # the names that it gives are compared, not where it lies
    "restart_from",
    "reviewed",  # what it holds is compared
    "round",
    "template",  # the templates that it gives are compared: naming those in use changes nothing
    "threads",
)


TEMPLATE, LABEL = "cohort#template ", "cohort#label "  # starts of the ids of a template's image and label
SCAN = re.compile("cohort#(pool|val|test|template) ")  # start of the id of a scan; its name follows
STEP = re.compile(r"(features|propagation|round_[1-9]\d{0,5})(/\w+)?")  # that a run can be restarted from
MOST_CAUSES = 5  # changed settings listed in a message


class StaleError(DatasetError):
    """Changed settings or files make finished steps stale; ``step``: the one to restart from."""

    def __init__(self, text: str, step: str):
        super().__init__(text)
        self.step = step


class Journal:
    """``RUN/progress.json``: the settings a run was started with, and its finished steps in order.

    Scans count by their bytes, as settings ``cohort#SPLIT NAME``: a file that was only touched makes nothing stale. A
    scan that comes or goes makes nothing stale either.

    Args:
        run: the folder.
        leaves: every value that results may depend on, by id; see `JobConfig.leaves`. Ids under FREE are ignored.
        needed: step -> the ids that it depends on; see `JobConfig.needed`.
        files: id -> file whose content results depend on.

    Attributes:
        came, went: names of scans that the earlier start did not have, and of those that only it had.
        half_done_fits: whether the results of unfinished steps that are on disk fit this start. It is on record until
            `cleaned`, so that a start that is killed before it has removed them leaves none to the next one.
    """

    def __init__(
        self,
        run: RunFolder,
        leaves: Mapping[str, Any],
        needed: Callable[[str], set[str]],
        files: Mapping[str, Path] = MappingProxyType({}),
    ):
        self.run, self.needed = run, needed
        self.kept = run.read_journal()
        self.files = fingerprints(files, self.kept.get("files", {}))
        kept = {id: without_path(value) for id, value in leaves.items() if id.split("#")[0] not in FREE}
        self.settings = json.loads(json.dumps(kept, default=str)) | {id: f["sha256"] for id, f in self.files.items()}
        implicit = not any(id.split("#")[0] == "template" and value for id, value in leaves.items())
        self.all_labelled = implicit and not (Path(str(leaves.get("dataset_dir"))) / LISTS["pool"]).exists()
        self.under_pseudonyms = leaves.get("pseudonyms") is not None
        self.came: list[str] = []
        self.went: list[str] = []
        self.done: list[str] = []
        self.half_done_fits = False

    @property
    def names(self) -> set[str]:
        """The cases of this start and of the one before."""
        return {id.partition(" ")[2] for id in (*self.settings, *self.kept.get("settings", {})) if SCAN.match(id)}

    def open(self, restart_from: str | None = None) -> bool:
        """Read the finished steps of an earlier start; False if there is none.

        Raises:
            StaleError: changed settings make finished steps stale and ``restart_from`` names no step early enough.
            DatasetError: ``restart_from`` is no step, or the folder has an earlier layout.
        """
        kept = self.kept
        if restart_from is not None and not STEP.fullmatch(restart_from):
            raise DatasetError(f"restart_from '{restart_from}': expected features, propagation, round_1, ...")
        if not kept:
            if restart_from is not None:
                raise DatasetError(f"restart_from '{restart_from}': no run was begun in {self.run.path}.")
            return False
        self.done = list(kept["done"])
        if not all(isinstance(step, str) and STEP.fullmatch(step) for step in self.done):
            raise DatasetError(f"{self.run.journal} is damaged: 'done' has no names of steps. Restore it.")
        if restart_from is not None:
            if (number := round_of(restart_from)) > round_of(self.done[-1] if self.done else "") + 1:
                raise DatasetError(f"restart_from '{restart_from}': the run has not reached round {number} yet.")
            self.done = self.done[: self._first(restart_from)]
        old = {id: value for id, value in kept["settings"].items() if id.split("#")[0] not in FREE}
        changed = sorted(k for k in {*old, *self.settings} if old.get(k) != self.settings.get(k))
        came, went = ([id for id in changed if is_scan(id) and id not in side] for side in (old, self.settings))
        changed = [id for id in changed if id not in (*came, *went)]
        self.came, self.went = ([id.partition(" ")[2] for id in ids] for ids in (came, went))
        stale = next((step for step in self.done if self._is_stale(step, changed)), None)
        if stale is not None:
            causes = [id for id in changed if reaches(self.needed(stale), id)]
            texts = list(dict.fromkeys(self._said(id, old) for id in causes))
            more = f"; and {len(texts) - MOST_CAUSES} more" if len(texts) > MOST_CAUSES else ""
            raise StaleError(
                f"{self.run.path} was started with other settings ({'; '.join(texts[:MOST_CAUSES])}{more}), so its "
                f"results from step '{part_of(stale)}' on do not match. Name another folder, use the old settings"
                f"{self._earlier_templates(old)}, or add --restart-from {part_of(stale)}.",
                part_of(stale),
            )
        same = restart_from is None and not (changed or came or went)
        self.half_done_fits = same and kept.get("half_done_fits", True)
        self._write()
        return True

    def begin(self) -> None:
        """Forget every step."""
        self.done = []
        self._write()

    def add(self, step: str) -> None:
        """Add a finished step, before those of later rounds."""
        self.done.insert(sum(round_of(other) <= round_of(step) for other in self.done), step)
        self._write()

    def follow(self, steps: Sequence[str]) -> None:
        """Forget those of ``steps``, the planned ones of a round in order, that were done before an earlier one."""
        order = [*self.done, *(step for step in steps if step not in self.done)]
        places = [order.index(step) for step in steps]
        self.forget([step for n, step in enumerate(steps) if places[n] < max(places[:n], default=-1)])

    def forget(self, steps: Collection[str]) -> None:
        """Some steps have to be done again: their results describe what is not there any more."""
        if not {*steps}.isdisjoint(self.done):
            self.done = [step for step in self.done if step not in steps]
            self.distrust()

    def distrust(self) -> None:
        """The results of unfinished steps do not fit this start."""
        self.half_done_fits = False
        self._write()

    def cleaned(self) -> None:
        """The results of unfinished steps that do not fit are removed."""
        self.half_done_fits = True
        self._write()

    def _is_stale(self, step: str, changed: list[str]) -> bool:
        needed = self.needed(step) if changed else set()
        return any(reaches(needed, id) for id in changed)

    def _said(self, id: str, old: Mapping[str, Any]) -> str:
        """What has changed of an id, in words."""
        if not id.startswith((TEMPLATE, LABEL)):
            return f"{id} was {short(old.get(id))}, is {short(self.settings.get(id))}"
        name = id.partition(" ")[2]
        if f"{LABEL}{name}" not in self.settings:
            return f"{name} is no template any more"
        if f"{LABEL}{name}" not in old:
            why = ": it has a label, and without train.txt every labelled scan is one" if self.all_labelled else ""
            return f"{name} is a template now{why}"
        return f"the {'label' if id.startswith(LABEL) else 'image'} of the template {name} has changed"

    def _earlier_templates(self, old: Mapping[str, Any]) -> str:
        """How to name the templates of the start before, if they were others."""
        before, now = ([id for id in ids if id.startswith(TEMPLATE)] for ids in (old, self.settings))
        if sorted(before) == sorted(now):
            return ""
        names = shlex.join(id.removeprefix(TEMPLATE) for id in before[:MOST_CAUSES])
        names += f" and {len(before) - MOST_CAUSES} more" if len(before) > MOST_CAUSES else ""
        said = f"and the real names of {names}" if self.under_pseudonyms else names
        return f" (--template {said} learns from these alone, as before)"

    def _first(self, step: str) -> int:
        """How many finished steps come before ``step`` or its parts ("round_1" includes "round_1/training")."""
        parts = (number for number, name in enumerate(self.done) if f"{name}/".startswith(f"{step}/"))
        return next(parts, len(self.done))

    def _write(self) -> None:
        kept = {"done": self.done, "half_done_fits": self.half_done_fits}
        write_json(self.run.journal, {"layout": LAYOUT, **kept, "settings": self.settings, "files": self.files})


def without_path(value: Any) -> Any:
    """A checksum in place of a path: paths may name patients, and stand in ``run.json`` alone."""
    if not is_path(value):
        return value
    return f"a path, sha256 {hashlib.sha256(str(value).encode(errors='surrogateescape')).hexdigest()[:16]}"


def is_scan(id: str) -> bool:
    """Whether ``id`` stands for the image of a scan that is no template."""
    return bool(SCAN.match(id)) and not id.startswith("cohort#template ")


def fingerprints(files: Mapping[str, Path], known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Size, time of the last change and SHA-256 of each file; a file as ``known`` is not read again."""
    found = {}
    for id, path in files.items():
        seen = path.stat()
        place = {"bytes": seen.st_size, "changed_ns": seen.st_mtime_ns}
        earlier = known.get(id) if isinstance(known.get(id), dict) else {}
        same = {key: earlier.get(key) for key in place} == place
        found[id] = place | {"sha256": earlier.get("sha256") if same else checksum(path)}
    return found


def part_of(step: str) -> str:
    """The step to restart from for ``step``: the first part of a round or of the propagation stands for all of it."""
    return {"propagation/first": "propagation"}.get(step, step.removesuffix("/training"))


def round_of(step: str) -> int:
    """The round that a step belongs to; 0 before the first round."""
    return int(step.split("/")[0].removeprefix("round_")) if step.startswith("round_") else 0


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
