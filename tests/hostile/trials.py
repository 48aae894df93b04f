"""One bad input or fault as a `Trial`, the place where it is tried, and the judgement of how it ended.

A trial may end in three ways: *refused*, exit status 1 or 2 with a clear line; *aside*, exit status 0 and the bad case
named; *right*, exit status 0 and the right result. Whatever the end, no file outside the output changes, no file
``PWNED`` appears, no traceback is printed, and the output is short.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import re
import resource
import shutil
import signal
import stat
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from semisam_o1.cli import main
from semisam_o1.data.phantoms import write_demo_data
from semisam_o1.files import checksum
from tests.jobs import small

REFUSED, ASIDE, RIGHT = "refused", "aside", "right"
TEMPLATE, POOL, OTHER, VAL, TEST = (f"phantom_{number:02d}" for number in range(5))
MOST_LINES, MOST_CHARACTERS, MOST_SECONDS, MOST_BYTES = 150, 40_000, 20, 8 << 30
TINY = {"feature_voxels": 800, "train_voxels": 2000, "max_iterations": 2, "iterations_per_epoch": 1}
SETTINGS = ["--device", "cpu", *small(**TINY)]
QUICK = ["--device", "cpu", *small(**TINY, label_fusion=False, quality_estimate=False)]


@dataclass(frozen=True)
class Stock:
    """What trials copy: a tiny data set with ``images``, ``labels`` and lists, and a finished run on it."""

    data: Path
    run: Path
    ledger: Path  # of the data set, which is kept out of it: hand-made data sets have none


def make_stock(folder: Path) -> Stock:
    stock = Stock(folder / "data", folder / "run", folder / "written.json")
    if not stock.run.exists():
        write_demo_data(stock.data, cases=5, shape=(16, 16, 14), spacing=3)
        (stock.data / "written.json").rename(stock.ledger)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main(["run", str(stock.data), "--output", str(stock.run), *SETTINGS]) == 0
    return stock


class Place:
    """A folder of its own for one trial: copies of the stock, a user's files, and a working directory.

    Attributes:
        data, run, out: the data set; the finished run, copied on first use; a folder that does not exist yet.
        user: a folder with a user's files. It, the data set and the working directory must stay as they are.
        words: name -> text that the command may name in braces.
        named: what a message must contain if a case is set aside.
        rng: the only source of a trial's random choices.
    """

    def __init__(self, root: Path, stock: Stock, rng: random.Random):
        self.root, self.stock, self.rng = root, stock, rng
        self.data, self.out, self.user, self.cwd = (root / name for name in ("data", "out", "user", "cwd"))
        self.cwd.mkdir(parents=True)
        shutil.copytree(stock.data, self.data)
        self.user.mkdir()
        (self.user / "notes.txt").write_text("a user's notes\n")
        shutil.copyfile(self.label(POOL), self.user / "by_hand.nii.gz")
        self.named = POOL
        self.words = {name: str(getattr(self, name)) for name in ("data", "out", "user", "cwd")}
        self.words |= {"run": str(root / "run"), "image": str(self.image(TEST)), "file": str(root / "file")}
        self.words |= {"template": TEMPLATE, "name": TEMPLATE}
        self._works: dict[str, Path] = {}

    @property
    def run(self) -> Path:
        path = self.root / "run"
        if not path.exists():
            shutil.copytree(self.stock.run, path)
        return path

    @property
    def file(self) -> Path:
        return self.root / "file"

    def image(self, name: str) -> Path:
        return self.data / "images" / f"{name}.nii.gz"

    def label(self, name: str) -> Path:
        return self.data / "labels" / f"{name}.nii.gz"

    def rename(self, old: str, new: str) -> None:
        """Rename a case in files and lists."""
        for path in (self.image(old), self.label(old)):
            path.rename(path.with_name(f"{new}.nii.gz"))
        for path in self.data.glob("*.txt"):
            text = path.read_text(encoding="utf-8", errors="surrogateescape").replace(f"{old}\n", f"{new}\n")
            path.write_text(text, encoding="utf-8", errors="surrogateescape")

    def work_of_a_person(self, path: Path) -> None:
        """Whatever happens, the present content of ``path`` must still be somewhere in the place."""
        self._works[checksum(path)] = path

    def lost(self) -> list[str]:
        if not self._works:
            return []
        found = {checksum(path) for path in self.root.rglob("*") if path.is_file()}
        return [f"work of a person is lost: {path.name}" for sum, path in self._works.items() if sum not in found]

    def state(self) -> dict[str, str]:
        """Every file and folder that a command must leave alone -> what it is."""
        found: dict[str, str] = {}
        tops = [self.data, self.user, self.cwd, self.file, *(p for p in self.root.iterdir() if p.name.startswith("x"))]
        for top in tops:
            for path in [top, *(top.rglob("*") if top.is_dir() and not top.is_symlink() else ())]:
                if os.path.lexists(path) and not path.is_relative_to(self.out):
                    found[os.fsencode(path.relative_to(self.root)).decode(errors="backslashreplace")] = kind_of(path)
        return found


def kind_of(path: Path) -> str:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"link to {path.readlink()}"
    return checksum(path) if stat.S_ISREG(mode) else f"kind {stat.S_IFMT(mode)}"


@dataclass(frozen=True)
class Trial:
    """One bad input or fault.

    Attributes:
        spoil: puts it into a place; may change ``place.words`` and ``place.named``.
        command: words for `main`; those in braces come from ``place.words``.
        ends: the ways in which it may end.
        check: raises an AssertionError if the result after exit status 0 is not right.
        fault: a context in which the command runs.
        early: a refusal must come before features are computed.
    """

    family: str
    name: str
    spoil: Callable[[Place], None]
    command: Sequence[str]
    ends: Iterable[str]
    check: Callable[[Place], None] | None = None
    fault: Callable[[Place], contextlib.AbstractContextManager] | None = None
    early: bool = False

    @property
    def id(self) -> str:
        return f"{self.family}/{self.name}"


@dataclass(frozen=True)
class End:
    """How a trial ended, the reasons why that is wrong (none if it is right), and what was printed."""

    how: str
    wrong: tuple[str, ...]
    said: str

    def __str__(self) -> str:
        return "\n".join([*self.wrong, f"ended: {self.how}", self.said[-3000:]])


class _TooLong(BaseException):
    """A command does not end."""


def attempt(trial: Trial, stock: Stock, folder: Path, seed: int = 0) -> End:
    """Try ``trial`` in ``folder``, which is removed afterwards."""
    place = Place(folder, stock, random.Random(f"{seed} {trial.id}"))
    try:
        if any("{run}" in word for word in trial.command):
            _ = place.run
        trial.spoil(place)
        before = place.state()
        status, said, faults = _command([word.format(**place.words) for word in trial.command], place, trial.fault)
        how, more = _judge(trial, place, status, said)
        after = place.state()
        changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
        changed = [name for name in changed if not re.fullmatch(r"cwd/problems(_\d+)?\.csv", name)]
        faults += more + [f"changed: {name[-80:]}" for name in changed[:5]] + place.lost()
        if trial.early and (place.out / "features").exists():
            faults.append("work was done before the refusal")
        if any(path.name == "PWNED" for path in place.root.rglob("*")):
            faults.append("code was executed: PWNED is there")
        return End(how, tuple(faults), said)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _command(words: list[str], place: Place, fault) -> tuple[int | None, str, list[str]]:
    """Exit status (None after an exception), output, and faults of the package."""
    faults: list[str] = []
    status, here = None, Path.cwd()
    said = io.BytesIO()
    out, err = (io.TextIOWrapper(said, "utf-8", how, write_through=True) for how in ("strict", "backslashreplace"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    memory = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, memory[1]))
    os.chdir(place.cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with fault(place) if fault else contextlib.nullcontext():
                status = main(words)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except _TooLong:
        faults.append(f"no end within {MOST_SECONDS} s")
    except BaseException as error:  # noqa: BLE001 - whatever escapes the command is a fault of it
        faults.append(f"traceback: {_cause(error)}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, memory)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.chdir(here)
        for name in ("semisam_o1", None):
            logging.getLogger(name).handlers.clear()
        torch.set_num_threads(1)
    text = said.getvalue().decode(errors="backslashreplace")
    out.detach()
    err.detach()
    return status, text, faults


def _give_up(number, frame):
    raise _TooLong


def _cause(error: BaseException) -> str:
    """The first exception of a chain, and the last line of the package that it went through."""
    frames: list[traceback.FrameSummary] = []
    while True:
        here = [f for f in traceback.extract_tb(error.__traceback__) if "semisam_o1" in Path(f.filename).parts]
        frames = here or frames
        if (earlier := error.__cause__ or error.__context__) is None:
            break
        error = earlier
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside the package"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]} ({where})"


def _judge(trial: Trial, place: Place, status: int | None, said: str) -> tuple[str, list[str]]:
    if status is None:
        return "traceback", []
    faults = []
    if "Traceback (most recent" in said:
        faults.append("a traceback was printed")
    if said.count("\n") > MOST_LINES or len(said) > MOST_CHARACTERS:
        faults.append(f"too much output: {said.count(chr(10))} lines, {len(said)} characters")
    if "memory is not enough" in said:
        faults.append(f"memory is used up: {MOST_BYTES >> 30} GiB")
    if odd := sorted({c for c in said if not c.isprintable() and c not in "\n\t\r"} - {"\x1b"}):
        faults.append(f"control characters were printed: {odd[:5]}")
    if "\x1b" in said:
        faults.append("an escape sequence was printed")
    if status in (1, 2):
        how = REFUSED
        if not said.strip():
            faults.append("refused without a word")
    elif status == 0:
        named = "".join(place.named.split()) in "".join(said.split())
        how = ASIDE if named and (ASIDE in trial.ends) else RIGHT
    else:
        how = f"status {status}"
    if how not in trial.ends:
        faults.append(f"ended {how} (exit status {status}), expected {' or '.join(trial.ends)}")
    if status == 0 and trial.check is not None:
        try:
            trial.check(place)
        except Exception as error:  # noqa: BLE001 - a missing or damaged result is a wrong one
            faults.append(f"wrong result: {type(error).__name__}: {str(error)[:200]}")
    return how, faults


Damage = Callable[[Path, Place], None]  # to a file


def content(make: Callable[[bytes, Place], bytes]) -> Damage:
    """The file with other bytes."""

    def damage(path: Path, place: Place) -> None:
        made = make(path.read_bytes(), place)
        path.unlink()
        path.write_bytes(made)

    return damage


def instead(make: Damage) -> Damage:
    """Something else in place of the file."""

    def damage(path: Path, place: Place) -> None:
        path.unlink()
        make(path, place)

    return damage


def leave(place: Place) -> None:
    """Spoil nothing."""


def same_labels(place: Place) -> None:
    """The run's final labels are, byte for byte, those of the stock."""
    expected = {path.name: path.read_bytes() for path in (place.stock.run / "pseudo_labels").iterdir()}
    found = {path.name: path.read_bytes() for path in (place.root / "run" / "pseudo_labels").iterdir()}
    assert found.keys() == expected.keys(), f"labels {sorted(found)}"
    different = [name for name in found if found[name] != expected[name]]
    assert not different, f"other bytes: {different}"
