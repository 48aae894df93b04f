"""Labels of a run as suggestions in a studies folder of MONAI Label, and behind a server that answers as it does."""

import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import nibabel
import numpy as np
import pytest

from semisam_o1.cli import main
from semisam_o1.clinic.export import export
from semisam_o1.files import checksum, write_json
from semisam_o1.types import UserError

NUMBERS = {"front part": 1, "back part": 4}


def volume(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.full((2, 3, 4), value, np.uint8), np.eye(4)), path)
    return path


@pytest.fixture
def run(tmp_path):
    """A finished run with labels of two scans and one whose scan MONAI Label does not have."""
    folder = tmp_path / "run"
    for value, name in enumerate(("one", "two.5", "elsewhere"), start=1):
        volume(folder / "pseudo_labels" / f"{name}.nii.gz", value)
    classes = {"0": "background"} | {str(number): name for name, number in NUMBERS.items()}
    lists = dict.fromkeys(("template", "stages", "warnings"), [])
    known = {"layout": 3, "classes": classes, "settings": {}, "set_aside": {}, "rounds": 1, "best_round": 1}
    write_json(folder / "run.json", known | lists)
    return folder


@pytest.fixture
def studies(tmp_path):
    for name in ("one.nii.gz", "two.5.nii", "three.nii.gz"):
        volume(tmp_path / "studies" / name, 7)
    return tmp_path / "studies"


def suggested(studies, name):
    return studies / "labels" / "original" / f"{name}.nii.gz"


def test_labels_become_suggestions_with_the_names_of_their_classes(run, studies):
    text, whole = export(run, str(studies))
    assert "2 of 3 labels" in text and "elsewhere" in text and not whole
    for name in ("one", "two.5"):
        assert checksum(suggested(studies, name)) == checksum(run / "pseudo_labels" / f"{name}.nii.gz")
    entry = json.loads((studies / "datastore_v2.json").read_text())["objects"]["two.5"]
    assert (entry["image"]["ext"], entry["labels"]["original"]["ext"]) == (".nii", ".nii.gz")
    assert entry["labels"]["original"]["info"]["params"]["label_names"] == NUMBERS


def test_only_own_unchanged_suggestions_are_replaced(run, studies):
    foreign = checksum(volume(suggested(studies, "one"), 9))
    text, whole = export(run, str(studies))
    assert checksum(suggested(studies, "one")) == foreign and "one. Delete" in text and not whole
    volume(run / "pseudo_labels" / "two.5.nii.gz", 5)
    export(run, str(studies))
    assert checksum(suggested(studies, "two.5")) == checksum(run / "pseudo_labels" / "two.5.nii.gz")
    changed = checksum(volume(suggested(studies, "two.5"), 6))
    text, _ = export(run, str(studies))
    assert checksum(suggested(studies, "two.5")) == changed and "one, two.5. Delete" in text


def test_other_entries_of_the_datastore_stay(run, studies):
    final = {"ext": ".nii.gz", "info": {"name": "one.nii.gz"}}
    image = {"ext": ".nii.gz", "info": {"checksum": "x"}}
    write_json(
        studies / "datastore_v2.json",
        {"name": "mine", "objects": {"one": {"image": image, "labels": {"final": final}}}},
    )
    export(run, str(studies))
    found = json.loads((studies / "datastore_v2.json").read_text())
    assert found["name"] == "mine" and found["objects"]["one"]["image"] == image
    assert found["objects"]["one"]["labels"]["final"] == final and "original" in found["objects"]["one"]["labels"]


def test_what_is_wrong_is_said(run, studies, tmp_path, capsys):
    assert main(["export", str(run), "--to", "monailabel", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["export", str(studies), "--to", "monailabel", str(studies)]) == 2
    assert "folder of a finished run" in capsys.readouterr().err
    with pytest.raises(UserError, match="no MONAI Label server answers there"):
        export(run, "http://127.0.0.1:9")


class Answers(BaseHTTPRequestHandler):
    """The part of MONAI Label's datastore that the export asks."""

    held: dict = {}

    def do_GET(self):
        asked = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(asked.query))
        known = self.held.get((query.get("label"), query.get("tag")))
        if asked.path == "/datastore/":
            self._answer(json.dumps({"objects": {"one": {}, "two.5": {}}}).encode())
        elif known is None:
            self._answer(b"", 404)
        else:
            self._answer(known[0] if asked.path == "/datastore/label" else json.dumps(known[1]).encode())

    def do_PUT(self):
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        mark = self.headers["Content-Type"].partition("boundary=")[2].encode()
        params, label = (part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for part in body.split(b"--" + mark)[1:3])
        self.held[query["image"], query["tag"]] = label, json.loads(params)
        self._answer(b"{}")

    def _answer(self, content, code=200):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def test_a_server_gets_the_same_suggestions(run):
    Answers.held = {("one", "original"): (b"of somebody", {})}
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        text, whole = export(run, f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()
    assert Answers.held["one", "original"] == (b"of somebody", {}) and "one. Delete" in text and not whole
    label, info = Answers.held["two.5", "original"]
    assert label == (run / "pseudo_labels" / "two.5.nii.gz").read_bytes()
    assert info["params"]["label_names"] == NUMBERS
