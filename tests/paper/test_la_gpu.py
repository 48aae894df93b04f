"""The paper's table in one command, on phantoms with made-up weights: two rounds of four iterations."""

import csv
import os
import subprocess
import sys
import threading
from multiprocessing.connection import Client, Listener
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "la_gpu.sh"
SMALL = ["patch_size=[32,32,32]", "iterations_per_epoch=2", "validation_interval=2", "knn_k=2", "device=cpu"]
SMALL += ["network_widths=[4,8,16,32,64]"]
COMMAND = f"""#!{sys.executable} -ES
import sys
from multiprocessing.connection import Client
with Client({{address!r}}) as line:
    line.send(sys.argv[1:])
    code, out, err = line.recv()
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


@pytest.fixture
def path(process, tmp_path_factory):
    """A PATH whose ``semisam-o1`` is the command in a process of its own, that need not import everything first."""
    folder = tmp_path_factory.mktemp("bin")
    address, said = str(folder / "line"), (folder / "out.txt", folder / "err.txt")
    (folder / "semisam-o1").write_text(COMMAND.format(address=address))
    (folder / "semisam-o1").chmod(0o755)
    with Listener(address) as listener:

        def serve():
            while True:
                with listener.accept() as line:
                    if (arguments := line.recv()) is None:
                        return
                    made = process(arguments, *said)
                    made.join()
                    line.send((made.exitcode, *(path.read_text() for path in said)))

        thread = threading.Thread(target=serve)
        thread.start()
        yield {"PATH": f"{folder}:{os.environ['PATH']}"}
        with Client(address) as line:
            line.send(None)
        thread.join()


@pytest.mark.slow
def test_the_table_from_start_to_end_and_again(phantom_h5_dir, path, tmp_path, sam_weights):
    out = tmp_path / "out"
    command = [SCRIPT, phantom_h5_dir, out, sam_weights, "4", "2", *SMALL]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | path)
    assert done.returncode == 0, done.stderr[-3000:]
    table = (out / "table.txt").read_text()
    assert [line for line in table.splitlines() if line in ("mt", "uamt", "dan", "dtc")] == ["mt", "uamt", "dan", "dtc"]
    assert table.count("round 1") == table.count("round 2") == 4 and table.count("±") == 32
    for method in ("mt", "uamt", "dan", "dtc"):
        rows = list(csv.DictReader((out / method / "test" / "test.csv").open()))
        assert {row["model"] for row in rows} == {"round 1", "round 2"}
        assert (out / method / "round_2" / "model.pt").is_file()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    again = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | path)
    assert again.returncode == 0 and again.stdout.endswith(table)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}


def test_it_says_how_it_is_used():
    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "DIR OUT WEIGHTS" in done.stdout
