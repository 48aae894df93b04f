"""One process works on a run folder, with and without locks of the file system."""

import errno
import json
import os
import socket
import subprocess
import sys

import pytest

from semisam_o1.lock import DEAD, has_locks, is_alive, lock_folder
from semisam_o1.types import DatasetError

PROGRAM = """
import sys, time
from semisam_o1.lock import lock_folder
from semisam_o1.types import DatasetError
try:
    with lock_folder(sys.argv[1]):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
except DatasetError as error:
    print(error, flush=True)
"""


@pytest.fixture(params=["locks", "no locks"])
def begin(request, tmp_path):
    """begin(seconds): a process that holds the folder so long, on a file system with or without locks."""
    environment = dict(os.environ)
    if request.param == "no locks":
        environment |= {
            "LD_PRELOAD": str(request.getfixturevalue("fail")),
            "HOSTILE_FOLDER": str(tmp_path), "HOSTILE_CALL": "flock",
            "HOSTILE_ERRNO": str(errno.ENOLCK), "HOSTILE_FIRST": "1", "HOSTILE_COUNT": "1000000",
        }  # fmt: skip
    running = []

    def begin(seconds):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(seconds)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_is_dead(begin, tmp_path):
    first = begin(60)
    assert first.stdout.readline() == "held\n"
    said = begin(0).stdout.readline()
    assert f"is being worked on by process {first.pid} on {socket.gethostname()}, since 20" in said
    first.kill()
    first.wait()
    assert (tmp_path / ".holder").exists()
    third = begin(0)
    assert third.stdout.readline() == "held\n" and third.wait() == 0
    assert not (tmp_path / ".holder").exists()


def test_this_file_system_has_locks(tmp_path):
    assert has_locks(tmp_path) and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("begin", ["no locks"], indirect=True)  # with locks, the file says nothing
@pytest.mark.parametrize("silent", [0, DEAD + 5])
def test_a_process_of_another_computer_lives_as_long_as_it_gives_signs(begin, tmp_path, silent):
    holder = tmp_path / ".holder"
    holder.write_text(json.dumps({"process": 1, "began": "5", "host": "elsewhere", "since": "2026"}))
    os.utime(holder, (holder.stat().st_mtime - silent,) * 2)
    said = begin(0).stdout.readline()
    assert said == "held\n" if silent else "is being worked on by process 1 on elsewhere, since 2026" in said


@pytest.mark.parametrize("text", ["", "process 5 on here", "[]", '{"process": "x"}'])
def test_a_holder_that_cannot_be_read_holds_nothing(tmp_path, text):
    (tmp_path / ".holder").write_text(text)
    with (
        lock_folder(tmp_path),
        pytest.raises(DatasetError, match="is being worked on by process"),
        lock_folder(tmp_path),
    ):
        pass


def test_who_lives_is_told_by_the_process_and_by_signs_of_life(tmp_path):
    holder = tmp_path / ".holder"
    assert not is_alive(holder)
    with lock_folder(tmp_path):
        mine = json.loads(holder.read_text())
        assert is_alive(holder) and mine["process"] == os.getpid()
    holder.write_text(json.dumps(mine))
    assert is_alive(holder)
    holder.write_text(json.dumps(mine | {"began": "1"}))  # the number of a process that ended is used again
    assert not is_alive(holder)
    holder.write_text(json.dumps(mine | {"process": 2**22 + 1}))
    assert not is_alive(holder)
    holder.write_text(json.dumps(mine | {"host": "elsewhere"}))
    assert is_alive(holder)
    os.utime(holder, (holder.stat().st_mtime - DEAD - 5,) * 2)
    assert not is_alive(holder)
