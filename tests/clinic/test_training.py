"""From one final label to suggestions that people use, in a real server."""

import json
import shutil
import time

import nibabel
import numpy as np
import pytest

import semisam_o1
from semisam_o1.data.phantoms import CLASSES
from semisam_o1.reviewed import Reviewed
from semisam_o1.runfolder import RunFolder
from tests.clinic.server import MODEL, Refused, Server

# Enough for these phantoms.
SETTINGS = {
    "feature_voxels": 4000,
    "train_voxels": 8000,
    "template_copies": 0,
    "first_round_factor": 1,
    "learning_rate": 0.005,
    "pool_batch": 1,
    "affine_prob": 0.4,
    "view_turn": 0,
    "displayable_configs": {"num_rounds": 1, "max_iterations": 150, "model_filename": "model.pt"},
}
SEGMENTS = {"label_info": [{"name": name, "idx": number} for number, name in CLASSES.items()]}
TURNED = {"label_info": [{"name": CLASSES[2], "idx": 1}, {"name": CLASSES[1], "idx": 2}]}  # in another order


@pytest.fixture(scope="module")
def day(phantom_dir, tmp_path_factory):
    """Folders of an annotator's day: four images, and the shipped bundle with small settings in the app."""
    folder = tmp_path_factory.mktemp("day")
    (folder / "studies").mkdir()
    for number in range(4):
        shutil.copy(phantom_dir / "images" / f"phantom_{number:02d}.nii.gz", folder / "studies")
    bundle = shutil.copytree(semisam_o1.BUNDLE_ROOT, folder / "bundle")
    config = bundle / "configs" / "train.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | SETTINGS))
    return folder


@pytest.fixture(scope="module")
def truth(phantom_dir):
    return {path.name.split(".")[0]: path for path in (phantom_dir / "labels").iterdir()}


def serve(day, **conf):
    return Server(day, day / "studies", day / "bundle", **conf)


def values(path):
    return np.asarray(nibabel.load(path).dataobj).astype(int)


def dice(found, expected):
    found, expected = values(found), values(expected)
    both = [2 * ((found == n) & (expected == n)).sum() / ((found == n).sum() + (expected == n).sum()) for n in CLASSES]
    return float(np.mean(both))


def test_a_day_of_an_annotator(day, truth, phantom_dir, tmp_path):
    with serve(day) as server:
        server.train()
        ended = server.wait()
        assert ended["status"] == "ERROR" and ended["details"][-1].startswith("No scan has a final label yet")
        server.save_label("phantom_00", truth["phantom_00"], params=SEGMENTS)
        begun = time.monotonic()
        server.train()
        assert server.running()["status"] in ("SUBMITTED", "RUNNING")
        ended = server.wait()
        assert ended["status"] == "DONE" and "trained on 1 labelled and 3 other scans" in " ".join(ended["details"])
        print(f"from a final label to a model: {time.monotonic() - begun:.0f} s")
        with pytest.raises(Refused, match="Restart the server"):
            server.infer("phantom_02", tmp_path / "early.nii.gz")
    with serve(day, epistemic_model=MODEL) as server:
        first = server.infer("phantom_02", tmp_path / "first.nii.gz")
        print(f"Dice of a scan never labelled: {dice(first, truth['phantom_02']):.3f}")
        assert dice(first, truth["phantom_02"]) > 0.4

        # A second final label, its values in another order, and a new image; the training is stopped midway.
        swapped = np.array([0, 2, 1], np.uint8)[values(truth["phantom_01"])]
        nibabel.save(nibabel.Nifti1Image(swapped, nibabel.load(truth["phantom_01"]).affine), tmp_path / "a.nii.gz")
        server.save_label("phantom_01", tmp_path / "a.nii.gz", params=TURNED)
        shutil.copy(phantom_dir / "images" / "phantom_04.nii.gz", server.studies)
        run = RunFolder(server.bundle / "run")
        server.train()
        end = time.monotonic() + 300
        while not run.round(2).path.exists():
            assert time.monotonic() < end
            time.sleep(0.1)
        server.ask("DELETE", "/train/")
        assert server.wait()["status"] == "STOPPED"
        np.testing.assert_array_equal(values(server.infer("phantom_02", tmp_path / "same.nii.gz")), values(first))

        server.train()
        ended = server.wait()
        assert ended["status"] == "DONE" and "trained on 2 labelled and 3 other scans" in " ".join(ended["details"])
        assert "Restart" not in ended["details"][-1]
        assert run.read_record()["template"] == ["phantom_00"] and run.pseudo_label("phantom_04").is_file()
        taken = Reviewed(run.reviewed).label("phantom_01")
        np.testing.assert_array_equal(values(taken), values(truth["phantom_01"]))
        second = server.infer("phantom_02", tmp_path / "second.nii.gz")  # the new weights, without a restart
        assert (values(second) != values(first)).any() and dice(second, truth["phantom_02"]) > 0.4

        server.ask(
            "POST", f"/batch/infer/{MODEL}", json.dumps({"device": "cpu", "multi_gpu": False}).encode(), images="all"
        )
        assert server.wait("batch/infer")["status"] == "DONE"
        suggested = server.studies / "labels" / "original"
        assert {path.name for path in suggested.iterdir()} == {f"phantom_{n:02d}.nii.gz" for n in range(5)}
        np.testing.assert_array_equal(values(suggested / "phantom_02.nii.gz"), values(second))

        server.ask("POST", f"/scoring/{MODEL}", json.dumps({"device": "cpu", "simulation_size": 2}).encode())
        assert server.wait("scoring")["status"] == "DONE"
        known = json.loads((server.studies / "datastore_v2.json").read_text())["objects"]
        scores = [known[f"phantom_{n:02d}"]["image"]["info"]["epistemic_entropy"] for n in (2, 3, 4)]
        assert all(0 < score < np.log(3) for score in scores)
