"""MONAI's own commands on a trained bundle: its network as TorchScript and ONNX, and what the metadata say of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.bundle.scripts import ckpt_export, onnx_export, verify_metadata, verify_net_in_out
from monai.utils import optional_import

import semisam_o1

INSTALLED = all(optional_import(name)[1] for name in ("onnx", "onnxscript", "onnxruntime"))
SHIPPED = Path(semisam_o1.BUNDLE_ROOT)
SHAPES = ((1, 1, 32, 24, 24), (2, 1, 40, 32, 48), (3, 1, 64, 56, 16))
AXES = {0: "batch", 2: "x", 3: "y", 4: "z"}
CLEAR = 1e-3  # difference of the two highest logits above which a label is none by chance


def files(bundle: Path) -> dict[str, str]:
    """The arguments that the commands share."""
    configs = bundle / "configs"
    found = {"config_file": configs / "inference.json", "meta_file": configs / "metadata.json", "bundle_root": bundle}
    return {name: str(path) for name, path in found.items()}


@pytest.fixture(scope="module")
def network(run) -> torch.nn.Module:
    parser = ConfigParser()
    parser.read_config(str(run / "bundle" / "configs" / "inference.json"))
    found = parser.get_parsed_content("network_def")
    found.load_state_dict(torch.load(run / "bundle" / "models" / "model.pt", weights_only=True))
    return found.eval()


def test_torchscript_gives_the_same_logits(run, network, tmp_path):
    weights = str(run / "bundle" / "models" / "model.pt")
    ckpt_export("network_def", str(tmp_path / "model.ts"), weights, **files(run / "bundle"))
    exported = torch.jit.load(tmp_path / "model.ts").eval()
    with torch.no_grad():
        for shape in SHAPES:
            scan = torch.rand(shape)
            assert torch.equal(exported(scan), network(scan)), shape


@pytest.mark.skipif(not INSTALLED, reason="ONNX is not installed: pip install -e '.[export]'")
def test_onnx_gives_the_same_labels_of_any_batch_and_shape(run, network, tmp_path):
    from onnxruntime import InferenceSession

    names = {"input_names": ["image"], "output_names": ["pred"]}
    kwargs = names | {"dynamic_axes": {"image": dict(AXES), "pred": dict(AXES)}}
    weights = str(run / "bundle" / "models" / "model.pt")
    onnx_export("network_def", str(tmp_path / "model.onnx"), weights, converter_kwargs=kwargs, **files(run / "bundle"))
    session = InferenceSession(str(tmp_path / "model.onnx"))
    for shape in SHAPES:
        scan = torch.rand(shape)
        with torch.no_grad():
            expected = network(scan)
        (found,) = session.run(["pred"], {"image": scan.numpy()})
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
        highest = expected.topk(2, 1).values
        clear = (highest[:, 0] - highest[:, 1] > CLEAR).numpy()
        np.testing.assert_array_equal(found.argmax(1)[clear], expected.argmax(1).numpy()[clear])


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "shipped"])
def test_metadata_fit_the_network(run, trained):
    verify_net_in_out("network_def", device="cpu", **files(run / "bundle" if trained else SHIPPED))


def needing(properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties)}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "shipped"])
def test_metadata_have_what_a_schema_asks_for(run, trained, tmp_path):
    """MONAI fetches no schema if one lies at ``filepath``; this one has the requirements of MONAI's of July 2024."""
    texts = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors")
    kinds = dict.fromkeys((*texts, "copyright"), {"type": "string"}) | {"required_packages_version": {"type": "object"}}
    fields = {"type": "string", "format": "string", "num_channels": "integer", "dtype": "string"}
    items = {"spatial_shape": ["string", "integer"], "value_range": "number"}
    tensor = {name: {"type": kind} for name, kind in fields.items()}
    tensor |= {name: {"type": "array", "items": {"type": kind}} for name, kind in items.items()}
    tensors = {"type": "object", "minProperties": 1, "additionalProperties": needing(tensor)}
    schema = needing(kinds | {"network_data_format": needing({"inputs": tensors, "outputs": tensors})})
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    bundle = run / "bundle" if trained else SHIPPED
    verify_metadata(str(bundle / "configs" / "metadata.json"), filepath=str(tmp_path / "schema.json"))
