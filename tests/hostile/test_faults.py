"""Kills, signals and faults of the machine in a whole job; afterwards the same command makes the same labels."""

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from semisam_o1.cli import main
from tests.hostile.trials import SETTINGS, make_stock
from tests.jobs import start

FAULTS = {  # name -> call, how many calls fail (a disk stays full, an error of a disk may pass), what the line says
    "ENOSPC": ("write", 10**9, "disk is full"),
    "EDQUOT": ("write", 10**9, "quota"),
    "EIO": ("write", 1, ""),
    "EACCES": ("open", 10**9, ""),
    "EROFS": ("open", 10**9, ""),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stock(made_once):
    return make_stock(made_once("hostile", make_stock))


@pytest.fixture
def job(stock, tmp_path):
    """The words of a command that runs a whole job into a new folder."""
    return ["run", str(stock.data), "--output", str(tmp_path / "run"), *SETTINGS]


def labels_of(run: Path) -> dict[str, bytes]:
    """The final labels and the predictions of the rounds."""
    files = [*run.glob("pseudo_labels/*"), *run.glob("round_*/predictions/*.nii.gz")]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def assert_whole_or_not_at_all(job, stock):
    """Every label that is there is the one of an undisturbed run."""
    assert labels_of(Path(job[3])).items() <= labels_of(stock.run).items()


def assert_ends_as_undisturbed(job, stock):
    assert main(job) == 0
    made = labels_of(Path(job[3]))
    assert len(made) > 5 and made == labels_of(stock.run)
    assert not json.loads((Path(job[3]) / "run.json").read_text())["set_aside"]  # no scan is blamed


def assert_a_clear_line(text: str, *words: str):
    assert "Traceback" not in text, text[-3000:]
    last = text.strip().splitlines()[-1]
    assert last.startswith("semisam-o1: ") and all(word in last for word in words), text[-3000:]


def finished_steps(job) -> list[str]:
    journal = Path(job[3]) / "progress.json"
    return json.loads(journal.read_text())["done"] if journal.exists() else []


def wait_for(job, step: str, process) -> None:
    while step not in finished_steps(job):
        assert process.is_alive() or step in finished_steps(job)
        time.sleep(0.02)


def test_faults_of_the_disk_one_after_the_other(fail, job, stock):
    """Each meets the job where the one before left it; in the end the same command finishes it."""
    chance = random.Random(0)
    for name, (call, count, said) in FAULTS.items():
        fault = {"FOLDER": job[3], "CALL": call, "ERRNO": getattr(errno, name), "COUNT": count}
        fault |= {"FIRST": chance.randrange(10, 60)}
        environment = os.environ | {f"HOSTILE_{key}": str(value) for key, value in fault.items()}
        environment |= {"LD_PRELOAD": str(fail), "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-m", "semisam_o1.cli", *job]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2, f"{name}: {done.stderr[-3000:]}"
        assert_a_clear_line(done.stderr, job[3], said)
        assert_whole_or_not_at_all(job, stock)
    assert_ends_as_undisturbed(job, stock)


def start_with_little_memory(most: int, *arguments) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    start(*arguments)


def in_use() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def test_too_little_memory(process, job, stock, tmp_path):
    context = multiprocessing.get_context("forkserver")
    for more in (60, 150, 300):  # MiB; OpenBLAS waits for ever with 20
        out, err = tmp_path / f"out_{more}.txt", tmp_path / f"err_{more}.txt"
        begun = context.Process(target=start_after_measuring, args=(more << 20, job, out, err))
        begun.start()
        begun.join(300)
        assert begun.exitcode is not None  # a library in C may also end the process where no Python can say so
        if begun.exitcode == 2:
            assert_a_clear_line(err.read_text(), "memory")
        assert_whole_or_not_at_all(job, stock)
    assert_ends_as_undisturbed(job, stock)


def start_after_measuring(more: int, *arguments) -> None:
    start_with_little_memory(in_use() + more, *arguments)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_at_three_steps(number, status, process, job, stock, tmp_path):
    for step in ("features", "propagation/first", "round_1/training"):
        out, err = tmp_path / "out.txt", tmp_path / "err.txt"
        for _ in range(3):  # on a busy machine the signal may come when all is done
            begun = process(job, out, err)
            wait_for(job, step, begun)
            os.kill(begun.pid, number)
            begun.join(60)
            if begun.exitcode != 0:
                break
            shutil.rmtree(job[3])
        assert begun.exitcode == status, f"{step}: {err.read_text()[-3000:]}"
        assert_a_clear_line(err.read_text(), "give the same command again")
        assert "terminating" not in out.read_text() + err.read_text()
        assert_whole_or_not_at_all(job, stock)
    assert_ends_as_undisturbed(job, stock)


def test_ten_kills(process, job, stock, tmp_path, capfd):
    """At random moments, many of them in a job that goes on; the last command is as a user types it."""
    job = [*job, "--set", "max_iterations=6", "iterations_per_epoch=3", "checkpoint_seconds=0"]  # all steps are kept
    stock = replace(stock, run=tmp_path / "whole")
    began = time.monotonic()
    assert main(["run", str(stock.data), "--output", str(stock.run), *job[4:]]) == 0
    seconds, chance, kills = time.monotonic() - began, random.Random(0), 0
    while kills < 10:
        begun = process(job, tmp_path / "out.txt", tmp_path / "err.txt")
        begun.join(chance.uniform(0.05, 0.5) * seconds)
        begun.kill()
        begun.join()
        if begun.exitcode == -signal.SIGKILL:
            kills += 1
            assert_whole_or_not_at_all(job, stock)
        else:  # done before its time: once more from the beginning
            assert begun.exitcode == 0, (tmp_path / "err.txt").read_text()[-3000:]
            assert_ends_as_undisturbed(job, stock)
            shutil.rmtree(job[3])
    typed = [str(Path(sys.executable).parent / "semisam-o1"), *job]
    last = subprocess.run(typed, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    capfd.readouterr()
    assert_ends_as_undisturbed(job, stock)
    said = capfd.readouterr().out
    assert "going on after" in said and "training:" not in said  # all was done
