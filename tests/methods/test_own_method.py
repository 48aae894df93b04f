"""The method worked out in docs/methods.md."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from semisam_o1.cli import main
from tests.jobs import small

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()


def example(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)[1]


def test_the_loss_asks_for_sure_predictions():
    names = {}
    exec(example("python"), names)
    loss = names["SureLoss"](consistency=1.0, consistency_rampup=0.0)
    logits = torch.zeros(2, 2, 4, 4, 4)
    target = {"label": torch.zeros(2, 1, 4, 4, 4), "labelled": torch.tensor([True, False])}
    loss(logits, target)
    assert abs(loss.weighted["consistency"] - torch.log(torch.tensor(2.0))) < 1e-6
    logits[1, 0] = 20
    loss(logits, target)
    assert loss.weighted["consistency"] < 1e-6


@pytest.mark.slow
def test_the_overlay_trains(begun, phantom_dir, tmp_path, monkeypatch):
    (tmp_path / "sure.py").write_text(example("python"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sure", raising=False)
    overlay = json.loads(example("json"))
    settings = small(**{"num_rounds": 1, "max_iterations": 2} | overlay)
    assert main(["run", str(phantom_dir), "--output", str(begun), *settings]) == 0
    trained = json.loads((begun / "progress.json").read_text())["settings"]
    assert trained["train#loss#_target_"] == "sure.SureLoss"
    assert (begun / "round_1" / "model.pt").is_file()
