"""Loading of trained weights into a network, and conversion of checkpoints to safetensors, without executing code."""

from __future__ import annotations

import argparse
import pickle
import re
import types
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from semisam_o1.files import atomic_write
from semisam_o1.types import UserError

LISTED = 20  # names of each kind in an error, before "and more"

# Arguments and numbers that training loops save beside the weights. They are plain data.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
HARMLESS = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64")),
    *((_NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # NumPy 1 and 2
]


def load_weights(network: nn.Module, file: str | Path, prefix: str = "", what: str = "the network") -> nn.Module:
    """Load the weights in ``file`` into ``network`` as float32; returns ``network``, which may be on the meta device.

    ``file`` is a PyTorch checkpoint or ``.safetensors``: a state dict, or a dict that contains one as
    ``model_state_dict`` or ``state_dict``. A prefix ``module.`` of the keys is removed. If keys start with ``prefix``,
    it is removed and all other keys are ignored.

    Raises:
        UserError: the file cannot be read without executing code from it, or its weights do not fit the network. The
            message lists missing and extra weights and those of another shape.
    """
    path = Path(file)
    weights = read_weights(path, prefix)
    _check(weights, network.state_dict(), path, what)
    weights = {key: weight.float() if weight.is_floating_point() else weight for key, weight in weights.items()}
    network.load_state_dict(weights, assign=True)
    return network


def check_weights(network: nn.Module, file: str | Path, what: str = "the network") -> None:
    """Check that a file holds weights for ``network``, without loading them.

    Raises:
        UserError: as `load_weights`.
    """
    _check(read_weights(Path(file)), network.state_dict(), Path(file), what)


def read_weights(path: Path, prefix: str = "") -> dict[str, Any]:
    """The state dict in a file for `load_weights`, its keys without ``module.`` and ``prefix``."""
    weights = {key.removeprefix("module."): value for key, value in _state(read_checkpoint(path), path).items()}
    part = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    return part or weights


def published_classes(path: str | Path) -> int:
    """The number of classes of a checkpoint of the published code.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it contains no such network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    head = read_weights(Path(path)).get("final.weight")
    if not isinstance(head, Tensor) or head.ndim != 5:
        raise UserError(f"{path} has no 'final.weight': expected a 3D U-Net of the published code.")
    return len(head)


def read_checkpoint(path: Path) -> Any:
    """Read a checkpoint that contains only tensors and plain data, on the CPU.

    Raises:
        UserError: the checkpoint needs other types (the message lists them), or cannot be read.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file; expected a checkpoint.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:
            raise _unreadable(path, error) from error
    with torch.serialization.safe_globals(HARMLESS):  # type: ignore[arg-type]
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if names := _unsafe_names(path, error):
                raise UserError(
                    f"{path} asks for more than weights, which could execute code: {', '.join(names)}. Extract "
                    f"its weights without executing code: semisam-o1 convert-weights {path} "
                    f"{path.with_suffix('.safetensors')}"
                ) from error
            raise _unreadable(path, error) from error
        except FileNotFoundError:
            raise
        except Exception as error:  # the unpickler raises many kinds on a damaged file
            raise _unreadable(path, error) from error


def convert_weights(source: str | Path, target: str | Path) -> int:
    """Save every tensor of a checkpoint's state dict to a safetensors file; returns their number.

    No code from the checkpoint is executed: every object that is neither a tensor nor a plain container is replaced by
    an inert placeholder. Keys stay unchanged.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: the file is not a PyTorch checkpoint, or has no tensors.
    """
    source, target = Path(source), Path(target)
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: expected a name that ends with .safetensors.")
    if not source.is_file():
        raise FileNotFoundError(f"There is no checkpoint {source}.")
    try:
        if zipfile.is_zipfile(source) and any(n.endswith("constants.pkl") for n in zipfile.ZipFile(source).namelist()):
            raise UserError("a TorchScript archive, which holds code")
        stored = torch.load(source, map_location="cpu", weights_only=False, pickle_module=_TENSORS_ALONE)
    except Exception as error:
        raise _unreadable(source, error) from error
    tensors = {key: value for key, value in _state(stored, source).items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{source} has no tensors under model_state_dict, state_dict or at its top.")
    content = save({key: value.detach().clone().contiguous() for key, value in tensors.items()})
    with atomic_write(target) as aside:
        aside.write_bytes(content)
    return len(tensors)


class _Inert:
    """Placeholder for anything that is not a tensor: accepts every call and every content, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def __hash__(self) -> int:
        return 0


class _TensorUnpickler(pickle.Unpickler):
    """Resolves only the names that rebuild tensors and ordered dicts; every other name becomes `_Inert`."""

    ALLOWED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
        ("torch", "Size"): torch.Size,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return self.ALLOWED[module, name]
        if module in ("torch", "torch.storage") and re.fullmatch(r"\w+Storage", name):
            return super().find_class(module, name)  # a storage type; torch.load reads the bytes itself
        return _Inert


def _load(file: Any, **kwargs: Any) -> Any:
    return _TensorUnpickler(file, **kwargs).load()


_TENSORS_ALONE = types.SimpleNamespace(
    __name__="tensors_alone", Unpickler=_TensorUnpickler, load=_load, UnpicklingError=pickle.UnpicklingError
)


def _unsafe_names(path: Path, error: pickle.UnpicklingError) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # noqa: BLE001 - only the zip format can be listed; the error names the first type
        return re.findall(r"GLOBAL (\S+) was not", str(error))


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    return UserError(f"{path} is no readable checkpoint ({reason}): get the file again.")


def _state(stored: Any, path: Path) -> dict[str, Any]:
    for key in ("model_state_dict", "state_dict"):
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
    if not isinstance(stored, Mapping):
        raise UserError(
            f"{path} holds a {type(stored).__name__}; expected a state dict, or a dict with model_state_dict."
        )
    return {str(key): value for key, value in stored.items()}


def _check(weights: Mapping[str, Any], expected: Mapping[str, Tensor], path: Path, what: str) -> None:
    def shape(value: Any) -> Any:
        return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__

    shapes = {key: (shape(weights[key]), shape(expected[key])) for key in expected if key in weights}
    problems = {
        "missing": [key for key in expected if key not in weights],
        "not expected": [key for key in weights if key not in expected],
        "of another shape": [f"{key}: {a} instead of {b}" for key, (a, b) in shapes.items() if a != b],
    }
    found = "; ".join(
        f"{len(keys)} {problem}: {', '.join(keys[:LISTED])}" + (" and more" if len(keys) > LISTED else "")
        for problem, keys in problems.items()
        if keys
    )
    if found:
        raise UserError(f"{path} does not fit {what}. {found}.")
