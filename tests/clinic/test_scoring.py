"""Scoring by a real server with the network of `dtc`, which has two outputs; test_training.py scores with another."""

import json
import shutil
import time

import numpy as np

from semisam_o1.cli import main
from semisam_o1.runfolder import RunFolder
from tests.clinic.server import MODEL, TRAINS, Server
from tests.jobs import small


def test_scores_of_a_network_with_two_outputs_are_entropies(phantom_dir, tmp_path):
    run = tmp_path / "run"
    command = ["run", str(phantom_dir), "--output", str(run), "--device", "cpu", "--method", "dtc"]
    assert main([*command, *small(num_rounds=1)]) == 0
    (tmp_path / "studies").mkdir()
    for number in (1, 2):
        shutil.copy(phantom_dir / "images" / f"phantom_{number:02d}.nii.gz", tmp_path / "studies")
    with Server(tmp_path, tmp_path / "studies", RunFolder(run).bundle, epistemic_model=MODEL) as server:
        end = time.monotonic() + TRAINS  # a server begins with the scoring by itself
        while len(found := scores(server.studies)) < 2:
            assert time.monotonic() < end, "no scores"
            time.sleep(1)
    assert all(0 < score < np.log(3) for score in found), found


def scores(studies):
    """The scores that the server has written so far."""
    try:
        known = json.loads((studies / "datastore_v2.json").read_text())["objects"]
    except (FileNotFoundError, ValueError):  # not written yet, or being written
        return []
    infos = [entry["image"]["info"] for entry in known.values()]
    return [info["epistemic_entropy"] for info in infos if "epistemic_entropy" in info]
