"""Scoring by a real server with the network of `dtc`, which has two outputs; test_training.py scores with the others'."""

import json
import shutil

import numpy as np

from semisam_o1.cli import main
from semisam_o1.runfolder import RunFolder
from tests.clinic.server import MODEL, Server
from tests.jobs import small


def test_scores_of_a_network_with_two_outputs_are_entropies(phantom_dir, tmp_path):
    run = tmp_path / "run"
    command = ["run", str(phantom_dir), "--output", str(run), "--device", "cpu", "--method", "dtc"]
    assert main([*command, *small(num_rounds=1)]) == 0
    (tmp_path / "studies").mkdir()
    for number in (1, 2):
        shutil.copy(phantom_dir / "images" / f"phantom_{number:02d}.nii.gz", tmp_path / "studies")
    with Server(tmp_path, tmp_path / "studies", RunFolder(run).bundle, epistemic_model=MODEL) as server:
        assert server.wait("scoring")["status"] == "DONE"  # a server begins with it
        known = json.loads((server.studies / "datastore_v2.json").read_text())["objects"]
    scores = [known[name]["image"]["info"]["epistemic_entropy"] for name in ("phantom_01", "phantom_02")]
    assert all(0 < score < np.log(3) for score in scores), scores
