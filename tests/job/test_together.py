"""Two processes train one network: the mean of their gradients, from the weights of the first."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from semisam_o1 import processes
from semisam_o1.job.together import shared_length

STEPS, RATE = 2, 0.1  # of two_processes.py


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found."""
    out = tmp_path_factory.mktemp("together")
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, out]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"{number}.pt", weights_only=True) for number in range(2)]


def test_gradients_are_the_mean_and_weights_those_of_the_first(found):
    weight = bias = 1.0  # of the first process; the second's are 2
    for _ in range(STEPS):
        errors = [2 * (weight * x + bias) for x in (1.0, 3.0)]  # derivative of the squared error
        weight, bias = (
            weight - RATE * (errors[0] * 1.0 + errors[1] * 3.0) / 2,
            bias - RATE * (errors[0] + errors[1]) / 2,
        )
    for process in found:
        assert process["network"]["weight"].item() == pytest.approx(weight, rel=1e-5)
        assert process["network"]["bias"].item() == pytest.approx(bias, rel=1e-5)
        assert process["numbers"] == [0, 1]


def test_a_process_that_cannot_build_stops_the_others(found):
    assert found[0]["failure"] == "RuntimeError: process 1: no memory"
    assert found[1]["failure"] == "ValueError: no memory"


def test_each_process_has_a_seed_of_its_own(found):
    assert found[0]["seed"] == 5 != found[1]["seed"]


@pytest.mark.parametrize(
    ("iterations", "count", "expected"),
    [(500, 1, 500), (500, 2, 250), (500, 3, 170), (6, 2, 3), (7, 2, 4), (22, 2, 10)],
)
def test_processes_share_the_iterations(iterations, count, expected):
    assert shared_length(iterations, count) == expected


def test_alone_nothing_changes():
    module = torch.nn.Linear(1, 1)
    processes.join()
    processes.leave()
    assert (processes.count(), processes.number()) == (1, 0)
    assert processes.shared(module) is module
