"""MONAI's ``--tracking mlflow`` with the shipped configs."""

import json

import pytest
from monai.bundle import ConfigWorkflow
from monai.utils import optional_import

from semisam_o1.job import Job
from semisam_o1.job.config import TRACKING
from semisam_o1.job.tracking import untracked
from semisam_o1.methods import TrainingState
from semisam_o1.types import UserError
from tests.jobs import CONFIGS, SMALL, assert_same_labels, bundle, config_of

INSTALLED = optional_import("mlflow")[1] and optional_import("sqlalchemy")[1]
needs_mlflow = pytest.mark.skipif(not INSTALLED, reason="MLflow is not installed: pip install -e '.[tracking]'")


@pytest.fixture(autouse=True)
def local_store_alone(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def tracked(data, output, tracking="mlflow", **ids) -> dict:
    """The config that ``python -m monai.bundle run training --tracking mlflow`` gives the job."""
    said = SMALL | {"dataset_dir": str(data), "output_dir": str(output), "device": "cpu"} | ids
    made = ConfigWorkflow([str(CONFIGS / "train.json")], logging_file=False, tracking=tracking, **said)
    made.parser.parse()
    return made.parser.get()


def runs(output) -> dict[str, list]:
    """The runs of MLflow by name, the last one first."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{output}/mlruns.db")
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    named: dict[str, list] = {}
    for run in sorted(found, key=lambda run: -run.info.start_time):
        named.setdefault(run.info.run_name, []).append(run)
        run.histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return named


def steps(run, name: str) -> list[int]:
    return [point.step for point in run.histories[name]]


def test_the_config_without_tracking_is_what_it_was(phantom_dir, tmp_path):
    """MONAI's handlers expect another kind of output, and their ids are no settings."""
    plain, settings = untracked(tracked(phantom_dir, tmp_path / "run", run_name="mine"))
    without = tracked(phantom_dir, tmp_path / "run", tracking=None)
    assert {id: value for id, value in without.items() if id not in TRACKING} == plain
    assert settings["run_name"] == "mine" and settings["tracking_uri"].endswith("run/mlruns.db")
    assert not list(tmp_path.iterdir())  # MONAI would write the config with the time in its name


def test_a_handler_of_a_persons_own_stays(phantom_dir, tmp_path):
    config = config_of(phantom_dir, tmp_path / "run")
    config["train"]["handlers"].append({"_target_": "MLFlowHandler", "output_transform": "$lambda out: out['loss']"})
    assert untracked(config)[0]["train"] == config["train"]


@pytest.mark.skipif(INSTALLED, reason="MLflow is installed")
def test_without_mlflow_it_ends_before_any_work(phantom_dir, tmp_path):
    with pytest.raises(UserError, match="MLflow is not installed"):
        Job(tracked(phantom_dir, tmp_path / "run")).run()
    assert not (tmp_path / "run" / "features").exists()


@needs_mlflow
def test_settings_losses_and_metrics_of_each_round(phantom_dir, run, begun):
    job = Job(tracked(phantom_dir, begun, experiment_name="phantoms"))
    job.run()
    found = runs(begun)
    assert sorted(found) == [f"begun, round {number}" for number in range(3)]
    assert all(len(some) == 1 and some[0].info.status == "FINISHED" for some in found.values())
    zero, one, two = (found[f"begun, round {number}"][0] for number in range(3))
    assert (steps(one, "train_loss"), steps(two, "train_loss")) == ([*range(1, 9)], [*range(1, 5)])
    assert {"train_loss/supervised", "train_loss/pseudo", "lr_group_0"} <= two.data.metrics.keys()
    assert {"dice/pool/propagated", "predicted_dice"} <= zero.data.metrics.keys()
    rows = job.evaluate(["val"])
    mean = sum(row["dice"] for row in rows if row["round"] == 2) / sum(row["round"] == 2 for row in rows)
    assert two.data.metrics["dice/val/predicted"] == pytest.approx(mean)
    assert two.data.params["max_iterations"] == "4" and two.data.params["train/method"].endswith("MeanTeacher")
    assert not any(str(begun.parent) in value or "phantom_" in value for value in two.data.params.values())
    for file in ("progress.json", "run.json"):
        assert not any(id in (begun / file).read_text() for id in (*TRACKING, "MLFlowHandler"))
    assert_same_labels(run / "pseudo_labels", begun / "pseudo_labels")

    before = json.loads((begun / "progress.json").read_text())
    names = sorted(path.name for path in begun.iterdir())
    Job(tracked(phantom_dir, begun, experiment_name="phantoms")).run()  # the same command
    again = runs(begun)
    assert {name: [r.histories for r in some] for name, some in again.items()} == {
        name: [r.histories for r in some] for name, some in found.items()
    }
    Job(tracked(phantom_dir, begun, tracking=None)).run()
    assert json.loads((begun / "progress.json").read_text()) == before
    assert sorted(path.name for path in begun.iterdir()) == names

    Job(
        tracked(phantom_dir, begun, experiment_name="phantoms", restart_from="round_1", num_rounds=1, consistency=0)
    ).run()
    anew = runs(begun)
    assert [r.data.params["consistency"] for r in anew["begun, round 1"]] == ["0", "0.1"]
    assert {name: len(some) for name, some in anew.items()} == {f"begun, round {n}": 1 + (n == 1) for n in range(3)}


@needs_mlflow
def test_a_training_that_was_cut_off_goes_on_in_its_run(phantom_dir, run, begun, monkeypatch):
    config = tracked(phantom_dir, begun, checkpoint_seconds=0)
    stop_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        Job(config).run()
    assert [r.info.status for r in runs(begun)["begun, round 1"]] == ["RUNNING"]
    monkeypatch.undo()
    Job(tracked(phantom_dir, begun)).run()
    (one,) = runs(begun)["begun, round 1"]
    assert one.info.status == "FINISHED" and sorted(set(steps(one, "train_loss"))) == [*range(1, 9)]
    assert_same_labels(run / "pseudo_labels", begun / "pseudo_labels")


def stop_after(monkeypatch, iteration: int) -> None:
    """Interrupt a training after it has written its state."""
    from ignite.engine import Events

    attach = TrainingState.attach

    def stop(engine) -> None:
        if engine.state.iteration == iteration:
            raise KeyboardInterrupt

    def attach_both(self, engine) -> None:
        attach(self, engine)
        engine.add_event_handler(Events.ITERATION_COMPLETED, stop)

    monkeypatch.setattr(TrainingState, "attach", attach_both)


@needs_mlflow
def test_a_store_that_cannot_be_used_ends_before_any_work(phantom_dir, tmp_path):
    (tmp_path / "file").write_text("")
    config = tracked(phantom_dir, tmp_path / "run", tracking_uri=f"sqlite:///{tmp_path}/file/mlruns.db")
    with pytest.raises(UserError, match="tracking_uri"):
        Job(config).run()
    assert not (tmp_path / "run" / "features").exists()


@needs_mlflow
def test_predictions_with_tracking(phantom_dir, run, tmp_path):
    """MONAI adds its handler to the handlers that load the weights and write the labels."""
    said = {"bundle_root": str(run / "bundle"), "dataset_dir": str(phantom_dir), "device": "cpu"}
    config = run / "bundle" / "configs" / "inference.json"
    bundle("run", config, output_dir=str(tmp_path / "plain"), **said)
    bundle("run", config, output_dir=str(tmp_path / "tracked"), tracking="mlflow", **said)
    assert_same_labels(tmp_path / "plain" / "labels", tmp_path / "tracked" / "labels")
    assert not list((tmp_path / "tracked").glob("config_*"))


@needs_mlflow
def test_mlflow_reports_nothing(phantom_dir, tmp_path):
    from mlflow.telemetry.client import get_telemetry_client

    from semisam_o1.runtime import set_up

    set_up(0, None, "cpu")
    assert get_telemetry_client() is None
