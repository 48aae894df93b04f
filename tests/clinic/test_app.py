"""Our app in the server: which scan it hands out, and what it says when a label is saved."""

import json

import nibabel
import numpy as np
import pytest

from semisam_o1.clinic.export import export
from semisam_o1.clinic.make_app import make_app
from semisam_o1.job.review import review
from tests.clinic.server import Refused, Server


@pytest.fixture(scope="module")
def server(run, phantom_dir, tmp_path_factory):
    """A server of our app with a trained bundle, in which lies the run that trained it."""
    folder = tmp_path_factory.mktemp("app")
    studies = folder / "studies"
    studies.mkdir()
    for image in (phantom_dir / "images").iterdir():
        (studies / image.name).write_bytes(image.read_bytes())
    app = make_app(folder / "apps" / "monaibundle", run / "bundle")
    (app / "model" / "semisam_o1" / "run").symlink_to(run)
    with Server(folder, studies, run / "bundle") as served:
        yield served


def following(server, **request):
    return json.loads(
        server.ask("POST", "/activelearning/" + request.pop("strategy", "review"), json.dumps(request).encode())
    )


def test_the_strategy_review_hands_out_what_review_names(server, run):
    found = following(server)
    text, _ = review(run)
    assert f"next: {found['id']} " in text
    assert list(server.get("/info/")["strategies"])[0] == "review"


def test_saving_a_label_tells_how_many_are_left(server, run, phantom_dir):
    found = following(server)
    answer = server.save_label(found["id"], phantom_dir / "labels" / f"{found['id']}.nii.gz")
    assert answer["left"] == found["left"] - 1
    assert following(server)["id"] != found["id"]


def test_exported_labels_are_suggestions(server, run):
    text, _ = export(run, f"http://127.0.0.1:{server.port}")
    names = [path.name.removesuffix(".nii.gz") for path in (run / "pseudo_labels").iterdir()]
    assert f"{len(names)} of {len(names)} labels" in text
    for name in names:
        info = server.get("/datastore/label/info", label=name, tag="original")
        assert set(info["params"]["label_names"].values()) == {1, 2}
        label = server.ask("GET", "/datastore/label", label=name, tag="original")
        assert label == (run / "pseudo_labels" / f"{name}.nii.gz").read_bytes()
    text, whole = export(run, f"http://127.0.0.1:{server.port}")  # its own are replaced
    assert whole


def test_a_bundle_that_changes_is_read_again(server, run, tmp_path):
    """As after a first training: other settings, without a restart."""
    before = server.infer("phantom_02", tmp_path / "before.nii.gz").read_bytes()
    config = server.bundle / "configs" / "inference.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"class_numbers": [0, 5, 7]}))
    after = server.infer("phantom_02", tmp_path / "after.nii.gz")
    assert set(np.unique(np.asarray(nibabel.load(after).dataobj))) == {0, 5, 7}
    config.write_text(json.dumps(content))
    assert server.infer("phantom_02", tmp_path / "again.nii.gz").read_bytes() == before


def test_a_damaged_scan_is_answered_with_a_sentence(server, phantom_dir, tmp_path):
    image = tmp_path / "cut.nii.gz"
    whole = next((phantom_dir / "images").iterdir()).read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refused, match="^422: .*truncated or damaged.*"):
        server.infer(image, tmp_path / "found.nii.gz")


def test_the_names_of_classes_are_read_again_when_the_bundle_changed(server):
    path = server.bundle / "configs" / "metadata.json"
    metadata = json.loads(path.read_text())
    names = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert names["1"].lower() in server.get("/info/")["models"]["semisam_o1"]["labels"]
    names["1"] = "renamed"
    path.write_text(json.dumps(metadata))
    assert "renamed" in server.get("/info/")["models"]["semisam_o1"]["labels"]
