"""What MONAI Label does with the bundle, without its server; the server itself is started in tests/clinic."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from monai.bundle import ConfigParser
from monai.bundle.scripts import run as run_bundle

import semisam_o1
from semisam_o1.cli import main
from semisam_o1.clinic.next_scan import next_scan
from semisam_o1.clinic.serving import RefuseUntrained
from semisam_o1.clinic.studies import DataSet, classes_of, made_for, opened, read_studies
from semisam_o1.data import open_cohort
from semisam_o1.data.datastore import segments_in
from semisam_o1.job.review import review
from semisam_o1.lock import lock_folder
from semisam_o1.review.ranking import DEFAULT, REASONS
from semisam_o1.reviewed import REJECTED, Entry, Reviewed
from semisam_o1.runfolder import LAYOUT, RunFolder
from semisam_o1.types import UserError
from tests.jobs import SMALL, labels, small

NAMES = [{"name": "bright organ", "idx": 1}, {"name": "dim organ", "idx": 2}]
TURNED = [{"name": "dim organ", "idx": 1}, {"name": "bright organ", "idx": 2}]


class Studies:
    """A studies folder of four phantoms, and a copy of the shipped bundle with settings that take seconds."""

    def __init__(self, folder: Path, phantoms: Path):
        self.phantoms, self.path, self.bundle = phantoms, folder / "studies", folder / "bundle"
        (self.path / "labels" / "final").mkdir(parents=True)
        self.objects, self.time = {}, 0
        for number in range(4):
            self.add(number)
        shutil.copytree(semisam_o1.BUNDLE_ROOT, self.bundle)
        config = self.bundle / "configs" / "train.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | SMALL))

    def add(self, number: int) -> None:
        name = f"phantom_{number:02d}"
        shutil.copy(self.phantoms / "images" / f"{name}.nii.gz", self.path)
        self.objects[name] = {"image": {"ext": ".nii.gz", "info": {}}, "labels": {}}

    def submit(self, number: int, segments=NAMES) -> None:
        """A final label, its values numbered as ``segments`` says."""
        name, self.time = f"phantom_{number:02d}", self.time + 1
        image = nibabel.load(self.phantoms / "labels" / f"{name}.nii.gz")
        names = {1: "bright organ", 2: "dim organ"}
        values = np.zeros(image.shape, np.uint8)
        for part in segments:
            if part["name"] not in names.values():
                continue
            values[np.asarray(image.dataobj) == next(n for n in names if names[n] == part["name"])] = part["idx"]
        nibabel.save(nibabel.Nifti1Image(values, image.affine), self.path / "labels" / "final" / f"{name}.nii.gz")
        info = {"ts": self.time, "label_info": segments}
        self.objects[name]["labels"]["final"] = {"ext": ".nii.gz", "info": info}

    def save(self) -> None:
        (self.path / "datastore_v2.json").write_text(json.dumps({"objects": self.objects}))

    def train(self, validation: int = 0, **shown) -> None:
        """As `BundleTrainTask` does, with so many of the finals put aside for validation."""
        config, metadata = (self.bundle / "configs" / name for name in ("train.json", "metadata.json"))
        overrides = self.overrides(validation, **shown)
        run_bundle(
            run_id="", init_id=None, final_id=None, meta_file=str(metadata), config_file=str(config), **overrides
        )

    def overrides(self, validation: int = 0, **shown) -> dict:
        self.save()
        finals = [
            {"image": str(self.path / f"{name}.nii.gz"), "label": str(self.path / f"labels/final/{name}.nii.gz")}
            for name, known in self.objects.items() if known["labels"]
        ]  # fmt: skip
        config = self.bundle / "configs" / "train.json"
        return {
            "bundle_root": str(self.bundle), "train#trainer#max_epochs": 50, "device": "cpu",
            "train#dataset#data": finals[: len(finals) - validation],
            "validate#dataset#data": finals[len(finals) - validation :],
            "train#handlers": json.loads(config.read_text())["train"]["handlers"],
            "displayable_configs": {"num_rounds": 1, "max_iterations": 4} | shown,
        }  # fmt: skip

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.bundle / "run")

    @property
    def done(self) -> list[str]:
        return json.loads((self.bundle / "run" / "progress.json").read_text())["done"]


@pytest.fixture
def studies(phantom_dir, tmp_path):
    return Studies(tmp_path, phantom_dir)


def test_one_final_label_trains_on_all_scans(studies, monkeypatch, capfd):
    monkeypatch.setattr("semisam_o1.job.selection.expected_gain", lambda *_: -0.5)
    studies.submit(1, [{"name": "of no voxels", "idx": 1}, *({**one, "idx": one["idx"] + 1} for one in TURNED)])
    studies.train()
    last = "trained on 1 labelled and 3 other scans; rounds in all: 1. Its labels are expected to be worse than those"
    assert last in "".join(capfd.readouterr())
    assert set(labels(studies.bundle / "run" / "pseudo_labels")) == {f"phantom_{n:02d}.nii.gz" for n in (0, 2, 3)}
    assert studies.run.read_record()["template"] == ["phantom_01"]
    assert (studies.bundle / "models" / "model.pt").is_file() and "round_1/prediction" in studies.done
    config = json.loads((studies.bundle / "configs" / "inference.json").read_text())
    assert config["class_numbers"] == [0, 1, 2] and config["preprocessing"]["_target_"] == "semisam_o1.data.image_chain"
    output = json.loads((studies.bundle / "configs" / "metadata.json").read_text())["network_data_format"]["outputs"]
    assert output["pred"]["channel_def"] == {"0": "background", "1": "dim organ", "2": "bright organ"}
    others = ["phantom_00", "phantom_02", "phantom_03"]
    found = next_scan(studies.bundle, others)
    assert found.left == 3 and found.reason == REASONS[DEFAULT] and found.image in others
    text, _ = review(studies.bundle / "run", reject=[found.image])
    following = next_scan(studies.bundle, others)
    assert following.left == 2 and f"next: {following.image} " in text
    assert next_scan(studies.bundle, [found.image])[::2] == (None, 0)


def test_the_commands_take_a_studies_folder(studies, tmp_path, capsys):
    """A final label is the template whatever a list says; later ones are corrections, by the names of their classes."""
    studies.save()
    for command in (["validate", str(studies.path)], ["run", str(studies.path), "--output", str(tmp_path / "none")]):
        assert main(command) == 2 and "No scan has a final label yet" in capsys.readouterr().err
    studies.submit(1, TURNED)
    studies.save()
    (studies.path / "train.txt").write_text("phantom_00\nphantom_01\nphantom_02\n")
    assert main(["validate", str(studies.path), "--preset", "quick"]) == 0
    assert "phantom_01" in capsys.readouterr().out
    suggest = ["suggest-template", str(studies.path), "--output", str(tmp_path / "s"), "--set", "feature_voxels=3000"]
    assert main(suggest) == 0
    ranked = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "  phantom_" in line]
    assert sorted(ranked) == ["phantom_00", "phantom_02"]  # phantom_01 has a final label, phantom_03 is in no list
    command = ["run", str(studies.path), "--output", str(tmp_path / "r"), *small(num_rounds=0)]
    assert main(command) == 0
    run = RunFolder(tmp_path / "r")
    assert run.read_record()["template"] == ["phantom_01"] and run.read_record()["classes"]["1"] == "dim organ"
    assert set(labels(run.pseudo_labels)) == {"phantom_00.nii.gz", "phantom_02.nii.gz"}
    studies.submit(0)
    studies.save()
    assert main(["review", str(run.path), "--data", str(studies.path)]) == 0
    assert "phantom_00" in Reviewed(run.reviewed).labels()
    studies.submit(2)
    studies.save()
    assert main(command) == 0
    assert set(Reviewed(run.reviewed).labels()) == {"phantom_00", "phantom_02"}
    taken = nibabel.load(Reviewed(run.reviewed).label("phantom_02"))
    truth = nibabel.load(studies.phantoms / "labels" / "phantom_02.nii.gz")
    np.testing.assert_array_equal(np.asarray(taken.dataobj) == 1, np.asarray(truth.dataobj) == 2)
    del studies.objects["phantom_02"]["labels"]["final"]
    studies.save()
    made = tmp_path / "r-studies" / "labels" / "phantom_01.nii.gz"
    before = made.stat().st_mtime_ns
    with lock_folder(run.path):  # a process works with the data set that was made: it stays as it is
        assert main(command) == 2 and main(["review", str(run.path), "--data", str(studies.path)]) == 2
        assert made.stat().st_mtime_ns == before and "is being worked on" in capsys.readouterr().err
    assert main(command) == 0
    assert set(Reviewed(run.reviewed).labels()) == {"phantom_00"}


def taken(run: RunFolder) -> dict[str, np.ndarray]:
    return {name: np.asarray(nibabel.load(path).dataobj) for name, path in Reviewed(run.reviewed).labels().items()}


def test_the_names_of_segments_tell_the_classes_of_a_taken_label(studies, run, phantom_dir, tmp_path, caplog):
    """3D Slicer numbers the values by the order of the segments."""
    mine = RunFolder(shutil.copytree(run, tmp_path / "run"))
    truth = labels(phantom_dir / "labels")
    for number, segments in ((1, TURNED), (2, TURNED), (3, [])):
        studies.submit(number, NAMES if number == 3 else segments)
        studies.objects[f"phantom_{number:02d}"]["labels"]["final"]["info"]["label_info"] = segments
    other = [{"name": "dim organ", "idx": 1}, {"name": "vessel", "idx": 2}]
    studies.objects["phantom_02"]["labels"]["final"]["info"]["label_info"] = other
    studies.save()
    finals = [str(path) for path in sorted((studies.path / "labels" / "final").iterdir())]
    assert main(["review", str(mine.path), "--take", *finals]) == 1
    said = "case phantom_02: phantom_02.nii.gz is refused: segments unknown to the run: vessel; expected one of bright"
    assert said in caplog.text and set(taken(mine)) == {"phantom_01", "phantom_03"}
    for name, values in taken(mine).items():  # nothing is said of phantom_03: its values are the classes
        np.testing.assert_array_equal(values, truth[f"{name}.nii.gz"])
    caplog.clear()
    before = Reviewed(mine.reviewed).rows()
    assert main(["review", str(mine.path), "--take", finals[0], finals[2]]) == 0
    assert Reviewed(mine.reviewed).rows() == before


def test_a_run_on_another_data_set_keeps_it_and_takes_final_labels_by_its_names(studies, run, phantom_dir, tmp_path):
    mine = RunFolder(shutil.copytree(run, tmp_path / "run"))
    truth = labels(phantom_dir / "labels")
    command = ["review", str(mine.path), "--data", str(studies.path)]
    studies.submit(1, TURNED)
    studies.save()
    assert main(command) == 0 and set(taken(mine)) == {"phantom_01"}
    assert not (tmp_path / "run-studies").exists()
    review(mine.path, reject=["phantom_01"])
    studies.submit(2, TURNED)
    studies.save()
    assert main(command) == 0 and set(taken(mine)) == {"phantom_02"}
    assert Reviewed(mine.reviewed).rejected() == ["phantom_01"]  # the label was given before the rejection
    np.testing.assert_array_equal(taken(mine)["phantom_02"], truth["phantom_02.nii.gz"])


def test_a_class_keeps_its_number_when_a_template_loses_its_label(studies, tmp_path):
    studies.submit(1, TURNED[:1])
    studies.submit(2, NAMES)
    studies.save()
    classes = {"1": "dim organ", "2": "bright organ"}
    assert opened(studies.path, tmp_path / "made").state["classes"] == classes
    truth = labels(tmp_path / "made" / "labels")["phantom_02.nii.gz"]
    del studies.objects["phantom_01"]["labels"]["final"]
    studies.save()
    data = opened(studies.path, tmp_path / "made")
    assert data.templates == ["phantom_02"] and data.state["classes"] == classes
    np.testing.assert_array_equal(labels(tmp_path / "made" / "labels")["phantom_02.nii.gz"], truth)
    del studies.objects["phantom_02"]["labels"]["final"]
    studies.submit(3, [{"name": "new", "idx": 1}, *({**one, "idx": one["idx"] + 1} for one in NAMES)])
    studies.objects["phantom_03"]["labels"]["final"]["info"]["label_info"][2]["name"] = "another"
    studies.save()
    assert opened(studies.path, tmp_path / "made").state["classes"] == classes | {"3": "another"}


def test_names_of_scans_may_be_decomposed(studies, tmp_path, monkeypatch):
    """As files are named on macOS; a data set composes them."""
    name, plain = "Mu\u0308ller", "M\u00fcller"
    studies.submit(0)
    studies.submit(1)
    for folder in (studies.path, studies.path / "labels" / "final"):
        (folder / "phantom_01.nii.gz").rename(folder / f"{name}.nii.gz")
    studies.objects[name] = studies.objects.pop("phantom_01")
    studies.save()
    images, finals = read_studies(studies.path)
    assert plain in images and finals[1].case == plain and finals[1].label.is_file()
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "finals.json").write_text(json.dumps({"templates": [name], "taken": {name: "before"}}))
    data = DataSet(tmp_path / "made")
    data.update(studies.path)
    assert data.templates == [plain] and set(data.state["taken"]) == {plain} and data.withdrawn == []
    cohort = open_cohort(data.folder, data.templates)
    assert [case.name for case in cohort.templates] == [plain] and data.finals[plain].image.is_file()

    reviewed = Reviewed(studies.bundle / "run" / "reviewed")
    reviewed.folder.mkdir(parents=True)
    (studies.bundle / "run" / "run.json").touch()
    monkeypatch.setattr("semisam_o1.clinic.next_scan.ranked", lambda run: [plain])
    assert next_scan(studies.bundle, ["a", name])[::2] == (name, 2)
    reviewed.add(Entry(plain, REJECTED))
    assert next_scan(studies.bundle, ["a", name])[::2] == ("a", 1)


def test_a_final_label_that_cannot_be_used_is_not_taken_for_done(studies, tmp_path):
    studies.submit(1)
    studies.save()
    command = ["run", str(studies.path), "--output", str(tmp_path / "r"), *small(num_rounds=0)]
    assert main(command) == 0
    studies.submit(0)
    studies.save()
    label = studies.path / "labels" / "final" / "phantom_00.nii.gz"
    whole = label.read_bytes()
    label.write_bytes(b"no image")
    review_it = ["review", str(tmp_path / "r"), "--data", str(studies.path)]
    main(review_it)
    assert not Reviewed(tmp_path / "r" / "reviewed").labels()
    state = json.loads((tmp_path / "r-studies" / "finals.json").read_text())
    assert state["taken"] == {}
    label.write_bytes(whole)
    assert main(review_it) == 0 and set(Reviewed(tmp_path / "r" / "reviewed").labels()) == {"phantom_00"}


def test_a_folder_of_somebody_else_is_left_alone(studies, tmp_path, capsys):
    studies.submit(1)
    studies.save()
    label = tmp_path / "r-studies" / "labels" / "by_hand.nii.gz"
    label.parent.mkdir(parents=True)
    label.write_bytes(b"the only copy")
    assert main(["run", str(studies.path), "--output", str(tmp_path / "r"), *small(num_rounds=0)]) == 2
    assert label.read_bytes() == b"the only copy" and "Move it away" in capsys.readouterr().err


def test_where_a_run_has_its_data_set_is_what_it_recorded(tmp_path, monkeypatch):
    run, made = tmp_path / "r", tmp_path / "made"
    for folder in (run, made):
        folder.mkdir()
    (made / "finals.json").write_text("{}")
    monkeypatch.chdir(made)
    assert made_for(run) == tmp_path / "r-studies"  # nothing recorded: not the working directory
    record = {"layout": LAYOUT, "settings": {"dataset_dir": str(made)}, "classes": {}, "template": [], "stages": []}
    record |= {"rounds": 0, "best_round": 0, "set_aside": {}, "warnings": []}
    (run / "run.json").write_text(json.dumps(record))
    assert made_for(run) == made
    (made / "finals.json").unlink()
    (tmp_path / "r-studies").mkdir()
    (tmp_path / "r-studies" / "finals.json").write_text("{}")
    assert made_for(run) is None  # a data set of its own
    made.rmdir()
    assert made_for(run) == tmp_path / "r-studies"  # moved with the run
    (tmp_path / "r-studies" / "finals.json").unlink()
    assert made_for(run) is None
    record["settings"]["dataset_dir"] = str(tmp_path / "elsewhere" / "r-studies")
    (run / "run.json").write_text(json.dumps(record))
    assert made_for(run) == tmp_path / "r-studies"  # to be made again


def test_before_a_training_the_first_image_is_next(studies):
    assert next_scan(studies.bundle, ["b", "a"])[::2] == ("a", 2)
    (studies.bundle / "run").mkdir()
    (studies.bundle / "run" / "run.json").write_text("{}")  # damaged
    assert next_scan(studies.bundle, ["b", "a"])[::2] == ("a", 2)
    assert next_scan(studies.bundle, [])[::2] == (None, 0)


def test_an_app_has_the_bundle_in_it(studies, tmp_path, capsys):
    studies.submit(1)
    (studies.bundle / "run").mkdir()
    app = tmp_path / "app"
    assert main(["monailabel-app", str(app), "--bundle", str(studies.bundle)]) == 0
    assert (app / "model" / "semisam_o1" / "configs" / "inference.json").is_file()
    assert not (app / "model" / "semisam_o1" / "run").exists() and "ReviewApp" in (app / "main.py").read_text()
    assert main(["monailabel-app", str(app)]) == 2 and "exists" in capsys.readouterr().err
    assert main(["monailabel-app", str(tmp_path / "other"), "--bundle", str(tmp_path)]) == 2


@pytest.mark.slow
def test_later_finals_rejections_and_new_scans_follow_the_rules_of_corrections(studies, phantom_dir):
    studies.submit(1)
    studies.train()
    features = {path: path.stat().st_mtime_ns for path in (studies.bundle / "run" / "features").rglob("*.h5")}
    studies.submit(0, TURNED)
    studies.add(4)
    review(studies.bundle / "run", reject=["phantom_03"])
    studies.train(validation=1)
    assert studies.run.read_record()["template"] == ["phantom_01"]
    reviewed = Reviewed(studies.run.reviewed)
    assert set(reviewed.labels()) == {"phantom_00"} and reviewed.rejected() == ["phantom_03"]
    taken, truth = nibabel.load(reviewed.label("phantom_00")), nibabel.load(phantom_dir / "labels/phantom_00.nii.gz")
    np.testing.assert_array_equal(taken.dataobj, truth.dataobj)  # though its values were the other way round
    assert "round_2/prediction" in studies.done  # one more round, and nothing before it anew
    assert all(path.stat().st_mtime_ns == time for path, time in features.items())
    assert studies.run.pseudo_label("phantom_04").is_file() and not studies.run.pseudo_label("phantom_03").exists()
    studies.submit(2)
    studies.save()
    assert main(["review", str(studies.bundle / "run"), "--data", str(studies.path)]) == 0  # of the data set it has
    assert set(reviewed.labels()) == {"phantom_00", "phantom_02"}
    studies.train()
    assert "round_3/prediction" in studies.done


@pytest.mark.slow
def test_a_changed_setting_or_template_is_done_again_by_itself(studies):
    studies.submit(1)
    studies.train()
    studies.train(max_iterations="6")  # as a page sends it
    assert studies.run.read_record()["settings"]["max_iterations"] == 6
    before = labels(studies.bundle / "run" / "round_0" / "labels")
    studies.submit(1, NAMES[:1])
    studies.train(max_iterations=6)
    after = labels(studies.bundle / "run" / "round_0" / "labels")
    assert any((before[name] != after[name]).any() for name in before)


def test_what_fails_says_one_line_and_leaves_the_model(studies, capsys):
    with pytest.raises(SystemExit, match="^No scan has a final label yet") as ended:
        studies.train()
    studies.submit(1)
    studies.train()
    model = (studies.bundle / "models" / "model.pt").read_bytes()
    with pytest.raises(SystemExit, match="num_rounds is 'many'") as ended:
        studies.train(num_rounds="many")
    assert "\n" not in str(ended.value)
    studies.submit(2)
    studies.objects["phantom_02"]["labels"]["final"]["info"]["label_info"] = [{"name": "something else", "idx": 1}]
    studies.train()
    said = capsys.readouterr().out
    assert "segments unknown to the run" in said and "Not used: the final labels of phantom_02" in said
    assert not Reviewed(studies.run.reviewed).labels()
    (studies.path / "labels" / "final" / "phantom_01.nii.gz").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="The final label of phantom_01 cannot be used"):
        studies.train()
    assert (studies.bundle / "models" / "model.pt").read_bytes() == model


@pytest.mark.slow
def test_on_several_gpus_every_process_trains(studies):
    """MONAI Label's command, with two processes on the CPU."""
    studies.submit(1)
    configs = studies.bundle / "configs"
    parser = ConfigParser(json.loads((configs / "train.json").read_text()))
    for id, value in studies.overrides().items():
        parser.set(value, id)
    ConfigParser.export_config_file(parser.config, str(configs / "monailabel_train.json"))
    files = [str(configs / name) for name in ("monailabel_train.json", "multi_gpu_train.json")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2"]
    command += ["-m", "monai.bundle", "run", "run", "--meta_file", str(configs / "metadata.json")]
    command += ["--config_file", str(files), "--logging_file", str(configs / "logging.conf")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained on 1 labelled and 3 other scans") == 1
    assert done.stdout.count("iteration 4 of 4: supervised") == 1  # half of 8, told by the first process alone
    assert (studies.bundle / "models" / "model.pt").is_file()


def test_segments_and_classes():
    assert segments_in({"label_info": [{"name": "a", "idx": 3}, {"idx": 4}, "b"]}) == {3: "a"}
    assert segments_in({}) == {} == segments_in({"label_info": "a"})
    assert classes_of([{2: "a", 5: "B "}, {1: "b", 2: "c"}]) == {"1": "a", "2": "B", "3": "c"}
    alike = [{1: "left kidney", 2: "h\u00fcfte"}, {1: "Left_Kidney", 2: "hu\u0308fte"}, {1: "left-kidney"}]
    assert classes_of(alike) == {"1": "left kidney", "2": "h\u00fcfte"}


def test_the_shipped_bundle_refuses(tmp_path):
    for folder in ("models", "configs"):
        (tmp_path / folder).mkdir()
    refuse, item = RefuseUntrained(tmp_path), {"image": "a"}
    with pytest.raises(UserError, match="no trained model yet"):
        refuse(item)
    (tmp_path / "models" / "model.pt").touch()
    config = tmp_path / "configs" / "inference.json"
    shutil.copy(Path(semisam_o1.BUNDLE_ROOT) / "configs" / "inference.json", config)
    assert refuse(item) is item
    config.write_text("{}")
    with pytest.raises(UserError, match="Restart the server"):
        refuse(item)
