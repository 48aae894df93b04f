"""The refinement between rounds, as settings ask for it."""

import json

import pytest

from semisam_o1.cli import main
from tests.jobs import labels, small


@pytest.mark.slow
def test_volume_refinement_replaces_the_unsure_half(phantom_dir, begun):
    command = ["run", str(phantom_dir), "--output", str(begun), "--refinement", "volume", *small(guard=False)]
    assert main(command) == 0
    predicted, refined = (labels(begun / "round_1" / stage) for stage in ("predictions", "labels"))
    assert sum((predicted[name] != refined[name]).any() for name in refined) == 1


@pytest.mark.slow
def test_voxel_refinement_leaves_what_is_sure(phantom_dir, begun):
    assert main(["run", str(phantom_dir), "--output", str(begun), *small(guard=False, unsure=0.9)]) == 0
    predicted, refined, doubt = (labels(begun / "round_1" / s) for s in ("predictions", "labels", "uncertainty"))
    changed = 0
    for name, label in refined.items():
        moved = label != predicted[name]
        changed += moved.sum()
        assert (doubt[name][moved] >= 0.89).all()
    assert changed


@pytest.mark.slow
def test_a_refinement_that_was_switched_off_stays_off(phantom_dir, begun):
    """Round 1's proposals gain less than is asked; round 2, which would ask again, makes none."""
    extra = small(num_rounds=3, unsure=0.9, least_gain=1)
    assert main(["run", str(phantom_dir), "--output", str(begun), *extra]) == 0
    records = [json.loads((begun / f"round_{n}" / "refinement.json").read_text()) for n in (1, 2)]
    assert [record["switched_off"] for record in records] == [True, False] and records[0]["gains"]
    assert not records[1]["gains"]
    predicted, kept = (labels(begun / "round_2" / stage) for stage in ("predictions", "labels"))
    assert all((predicted[name] == kept[name]).all() for name in kept)
    assert "refined" not in (begun / "metrics.csv").read_text()
