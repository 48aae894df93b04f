"""Crops, cells, round 0, windows, votes and validation of the published code (rows 2 to 5, 8 to 10, 12)."""

from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from semisam_o1.data import PublishedPadd, PublishedRandCropd
from semisam_o1.data.datasets import open_cohort
from semisam_o1.encoders.base import Encoder
from semisam_o1.features import FeatureStore, TokenInferer
from semisam_o1.handlers import middle
from semisam_o1.networks import ProbabilityWindows
from semisam_o1.refinement.votes import uncertain, volume_votes, vote_labels
from semisam_o1.report.validation import PublishedValidationDice
from semisam_o1.round_0 import first_pass_engine, prototype
from semisam_o1.round_0.templates import published_reference
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import Case
from semisam_o1.uncertainty import entropy, predictive_entropy
from tests.jobs import cohort_of


class Echo(nn.Module):
    """Gives its input back, one token a patch of 16: the voxel at the patch's first corner."""

    def forward(self, volume):
        return volume[:, :, ::16, ::16, ::16]


class Told(nn.Module):
    """Tokens by the largest value of the input, as the golden file's encoder."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.seen = tokens, []

    def forward(self, volume):
        return torch.as_tensor(self.tokens[int(volume.max()) - 1])[None]


def encoder(network) -> Encoder:
    return Encoder(network, "golden", patch_size=16, input_size=128, trained=True)


@pytest.mark.parametrize("side", [*range(1, 60, 7), *range(90, 301, 11), 127, 128, 129, 130, 131, 300])
def test_the_centre_crop(golden, side):
    """Along one axis: where the patch of 128 lies in the scan."""
    found = golden("crop")
    at = side - 1
    assert found["sides"][at] == side
    volume = torch.arange(1, side + 1, dtype=torch.float32).reshape(1, 1, side, 1, 1).repeat(1, 1, 1, 128, 128)
    patches = []

    class Window(nn.Module):
        def forward(self, window):
            patches.append(window[0, 0, :, 0, 0].numpy().copy())
            return window[:, :, ::16, ::16, ::16]

    TokenInferer(crop="center")(MetaTensor(volume), encoder(Window()))
    (patch,) = patches
    first, length = int(found["patch_first"][at]), int(found["length"][at])
    expected = np.zeros(128)
    expected[first : first + length] = np.arange(length) + found["volume_first"][at] + 1
    np.testing.assert_array_equal(patch, expected)


@pytest.mark.parametrize("n", range(7))
def test_the_label_at_the_cells(golden, inputs, tmp_path, n):
    shapes = [
        (128, 128, 128),
        (129, 131, 133),
        (150, 140, 110),
        (101, 120, 160),
        (127, 90, 128),
        (88, 89, 201),
        (60, 61, 63),
    ]
    shape, found = shapes[n], golden("cells")
    name = "x".join(map(str, shape))
    label = inputs.classes(100 + n, shape, 4)
    assert label.sum() == pytest.approx(float(found[f"{name}/input_sum"]))
    cases = {name: 4} | ({"binary/129x131x133": 2} if n == 1 else {})
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file["image"], file["label"] = np.zeros(shape, np.float32), label
    case = Case("t", tmp_path / "t.h5", tmp_path / "t.h5", "template")
    tokens = TokenInferer(crop="center")(MetaTensor(torch.zeros(1, 1, *shape)), encoder(Echo()))
    affine = np.asarray(tokens.affine).reshape(-1, 4, 4)[0]
    for key, classes in cases.items():
        features = SimpleNamespace(tokens=tokens.as_tensor()[0], affine=affine, scan=SimpleNamespace(affine=np.eye(4)))
        cohort = cohort_of([case], classes=classes, binary=key.startswith("binary"))
        shares = published_reference(case, features, cohort).label
        np.testing.assert_array_equal(shares.numpy(), found[key])


ROUND_0 = {
    "one": (3, 1, 300, [(150, 140, 110), (128, 128, 128), (131, 133, 100), (140, 151, 88), (101, 120, 161)]),
    "two": (4, 2, 320, [(129, 128, 127), (90, 140, 133), (128, 128, 128), (143, 97, 129)]),
    "thin": (3, 1, 340, [(128, 128, 128), (128, 130, 126), (135, 128, 99)]),
    "binary": (2, 1, 360, [(130, 128, 128), (127, 141, 128)]),
}


@pytest.mark.parametrize("case", ROUND_0)
def test_round_0(golden, inputs, tmp_path, case):
    classes, templates, seed, shapes = ROUND_0[case]
    found = golden("round_0")
    (tmp_path / "data").mkdir()
    tokens = []
    for j, shape in enumerate(shapes):
        image = np.zeros(shape, np.float32)
        image[::2] = j + 1
        label = inputs.classes(seed + 50 + j, shape, 3 if case in ("one", "thin") else 4)
        if case == "thin":
            label[label == 2] = 0
            label[40:60, 40:60, 49:63] = 2
        tokens.append(inputs.normal(seed + j, (384, 8, 8, 8)).astype(np.float32))
        with h5py.File(tmp_path / "data" / f"v{j}.h5", "w") as file:
            file["image"], file["label"] = image, label
    (tmp_path / "train.txt").write_text("\n".join(f"v{j}" for j in range(len(shapes))))
    cohort = open_cohort(tmp_path, labeled_num=templates, binary_label=case == "binary")
    assert cohort.num_classes == classes
    store = FeatureStore(tmp_path / "features", encoder(Told(tokens)), None, "float32")
    for scan in cohort.cases:
        with h5py.File(scan.image) as file:
            volume = MetaTensor(torch.as_tensor(file["image"][()])[None, None])
        made = TokenInferer(crop="center")(volume, store.encoder)
        store.save(scan, made.as_tensor()[0], np.asarray(made.affine).reshape(-1, 4, 4)[0], cohort.grid(scan))
    names = [f"v{j}" for j in range(len(shapes))]
    np.testing.assert_allclose(store.descriptors(names), found[f"{case}/descriptors"], atol=1e-6)
    engine = first_pass_engine(store, cohort, prototype, tmp_path / "run", published=True)
    engine.run(cohort.pool, epoch_length=len(cohort.pool))
    assert not engine.state.failed
    from semisam_o1.data import ScanReader

    for scan in cohort.pool:
        label = ScanReader().volume(RunFolder(tmp_path / "run").round(0).label(scan.name))[0].numpy()
        np.testing.assert_array_equal(label, found[f"{case}/label/{scan.name}"])


def test_features_stay_float32(golden, inputs):
    from semisam_o1.round_0 import Reference

    found = golden("feature_dtype")
    label = torch.as_tensor(inputs.classes(400, (128, 128, 128), 2)[::16, ::16, ::16]).long()
    tokens = torch.as_tensor(inputs.normal(401, (384, 8, 8, 8)).astype(np.float32))
    shares = nn.functional.one_hot(label, 2).movedim(-1, 0).float()
    result = prototype([Reference(tokens, shares)], torch.as_tensor(found["scan"]))
    np.testing.assert_array_equal(result.probabilities.argmax(0), found["cells"])


def test_windows_and_uncertainty(golden, inputs):
    found = golden("windows")
    a, b = (torch.as_tensor(inputs.normal(seed, (3, 16, 16, 16)).astype(np.float32))[None] for seed in (500, 501))
    shapes = [(16, 16, 16), (23, 16, 15), (17, 25, 11), (21, 22, 19), (10, 13, 20), (24, 32, 16), (9, 7, 5)]

    def network(x):
        return a * x + b

    for j, shape in enumerate(shapes):
        scan = torch.as_tensor(inputs.normal(510 + j, shape).astype(np.float32))[None, None]
        for key, overlap in (("label", 0.5), ("test_label", 0.5), ("validation_label", 0.25)):
            label = ProbabilityWindows((16, 16, 16), overlap)(scan, network).argmax(1)[0]
            np.testing.assert_array_equal(label, found[f"{key}/v{j}"], err_msg=f"{key} {shape}")
        padded = ProbabilityWindows((16, 16, 16), 0.5, keep_padding=True)(scan, network)
        np.testing.assert_array_equal(middle(padded, shape).argmax(1)[0], found[f"label/v{j}"])
        probabilities = padded.softmax(1)
        assert float(entropy(probabilities[0]).mean()) == pytest.approx(float(found["uncertainty"][j]), abs=2e-6)
        assert float(predictive_entropy(probabilities).mean() * np.log(3)) == pytest.approx(
            float(found["uncertainty"][j]), abs=2e-6
        )


def test_validation_dice(golden):
    found = golden("validation_dice")
    metric = PublishedValidationDice()
    for case in found["cases"]:
        one, other = (torch.as_tensor(found[f"{case}/{what}"].astype(int)) for what in ("prediction", "truth"))
        metric(*(nn.functional.one_hot(label, 4).movedim(-1, 0)[None].float() for label in (one, other)))
    np.testing.assert_allclose(metric.get_buffer(), found["dice"], atol=1e-6)
    assert float(metric.aggregate()) == pytest.approx(float(found["mean_dice"]), abs=1e-6)


@pytest.mark.parametrize("case", ["votes", "half", "few", "opposed", "mixed", "tied", "tied_few"])
def test_votes(golden, case):
    found = {key.split("/", 1)[1]: value for key, value in golden("votes").items() if key.startswith(f"{case}/")}
    before = {key.removeprefix("before/"): value for key, value in found.items() if key.startswith("before/")}
    names = sorted(before)
    k, quantile = int(found["k"]), float(found["quantile"])
    certain = np.concatenate([[True], ~uncertain(found["uncertainty"][1:], quantile)])
    changed = {}
    for i in np.flatnonzero(~certain):
        voters, weights = volume_votes(found["descriptors"], certain, found["descriptors"][i], k)
        if len(voters):
            labels = [torch.as_tensor(before[names[v]].astype(int)) for v in voters]
            changed[names[i]] = vote_labels(labels, weights.tolist(), before[names[i]].shape, 3).numpy()
    expected = {name: found[f"after/{name}"] for name in found["changed"].tolist()}
    for name in names[1:]:
        np.testing.assert_array_equal(changed.get(name, before[name]), expected.get(name, before[name]), err_msg=name)


def test_the_training_crop(golden):
    found = golden("train_crop")
    for shape, pad, corners in zip(found["shapes"], found["pad"], found["corners"]):
        name = "x".join(map(str, shape))
        image = torch.arange(1, int(np.prod(shape)) + 1, dtype=torch.float32).reshape(1, *shape.tolist())
        padded = PublishedPadd("image", [16] * 3)({"image": image})["image"]
        np.testing.assert_array_equal(padded.shape[1:], np.array(shape) + 2 * pad)
        crop = PublishedRandCropd("image", [16] * 3)
        crop.R = SimpleNamespace(randint=lambda low, high: low)
        np.testing.assert_array_equal(crop({"image": padded})["image"][0], found[f"{name}/first"])
        highs = []
        crop.R = SimpleNamespace(randint=lambda low, high, highs=highs: highs.append(high) or high - 1)
        np.testing.assert_array_equal(crop({"image": padded})["image"][0], found[f"{name}/last"])
        np.testing.assert_array_equal(highs, corners)
    crop = PublishedRandCropd("image", [16] * 3).set_random_state(0)
    drawn = [
        int(crop({"image": torch.arange(20.0).reshape(1, 20, 1, 1).expand(1, 20, 20, 20)})["image"][0, 0, 0, 0])
        for _ in range(2000)
    ]
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 2000, found["drawn_side_20"] / 2000, atol=0.03)
