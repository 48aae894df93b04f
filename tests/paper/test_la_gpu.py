"""The paper's table in one command, on phantoms with made-up weights: two rounds of four iterations."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "la_gpu.sh"
SMALL = ["patch_size=[32,32,32]", "iterations_per_epoch=2", "validation_interval=2", "knn_k=2", "device=cpu"]
SMALL += ["network_widths=[4,8,16,32,64]"]


@pytest.mark.slow
def test_the_table_from_start_to_end_and_again(phantom_h5_dir, tmp_path, sam_weights):
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [SCRIPT, phantom_h5_dir, tmp_path, sam_weights, "4", "2", *SMALL]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | path)
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "table.txt").read_text()
    assert [line for line in table.splitlines() if line in ("mt", "uamt", "dan", "dtc")] == ["mt", "uamt", "dan", "dtc"]
    assert table.count("round 1") == table.count("round 2") == 4 and table.count("±") == 32
    for method in ("mt", "uamt", "dan", "dtc"):
        rows = list(csv.DictReader((tmp_path / method / "test" / "test.csv").open()))
        assert {row["model"] for row in rows} == {"round 1", "round 2"}
        assert (tmp_path / method / "round_2" / "model.pt").is_file()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    again = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | path)
    assert again.returncode == 0 and again.stdout.endswith(table)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}


def test_it_says_how_it_is_used():
    done = subprocess.run([str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "DIR OUT WEIGHTS" in done.stdout
