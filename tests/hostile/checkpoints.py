"""Checkpoints that are no checkpoints, damaged, of another network, or code."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from semisam_o1.networks import UNet3D
from tests.hostile.trials import REFUSED, RIGHT, Place, Trial


class Payload:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


def saved(content, **kwargs) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


def weights() -> dict[str, torch.Tensor]:
    return {key: value.contiguous() for key, value in UNet3D(1, 3).state_dict().items()}


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Conv3d(1, 1, 1), torch.zeros(1, 1, 2, 2, 2)), buffer)
    return buffer.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"archive/{name}", content)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return buffer.getvalue()


def flipped(data: bytes, place: Place) -> bytes:
    changed = bytearray(data)
    for _ in range(20):
        changed[place.rng.randrange(len(changed))] ^= 1 << place.rng.randrange(8)
    return bytes(changed)


def header(size: int, text: bytes = b"{}") -> bytes:
    return struct.pack("<Q", size) + text


def listed(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return header(len(text), text) + bytes(64)


def in_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        data = pickle.dumps(Payload())
        entry = tarfile.TarInfo("pickle")
        entry.size = len(data)
        file.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


Content = Callable[[Place], bytes]
FILES: dict[str, tuple[str, Content]] = {
    "text.pth": (".pth", lambda place: b"these are weights, honestly\n"),
    "empty": (".pth", lambda place: b""),
    "random": (".pth", lambda place: place.rng.randbytes(5000)),
    "cut": (".pth", lambda place: saved(weights())[: place.rng.randrange(1, 200_000)]),
    "old_format_cut": (".pth", lambda place: saved({"a": torch.zeros(99)}, _use_new_zipfile_serialization=False)[:-50]),
    "pickle_of_code": (".pth", lambda place: pickle.dumps(Payload())),
    "pickle_0_of_code": (".pth", lambda place: pickle.dumps(Payload(), protocol=0)),
    "dict_of_code": (".pth", lambda place: saved({"model_state_dict": {"final.weight": Payload()}})),
    "old_dict_of_code": (".pth", lambda place: saved({"a": Payload()}, _use_new_zipfile_serialization=False)),
    "code_in_zip": (".pth", lambda place: zipped("data.pkl", pickle.dumps(Payload()))),
    "code_in_tar": (".tar", lambda place: in_tar()),
    "torchscript": (".pt", lambda place: scripted()),
    "zip_without_data": (".pth", lambda place: zipped("nothing", b"")),
    "zip_bomb": (".pth", lambda place: zipped("data.pkl", bytes(50_000_000))),
    "deep_pickle": (".pth", lambda place: b"\x80\x02" + b"(" * 200_000),
    "deep_list": (".pth", lambda place: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
    "huge_memo": (".pth", lambda place: b"\x80\x02]r\xff\xff\xff\x7f."),
    "huge_text": (".pth", lambda place: b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x"),
    "tensor_alone": (".pth", lambda place: saved(torch.zeros(3))),
    "list": (".pth", lambda place: saved([1, 2, 3])),
    "number": (".pth", lambda place: saved(5)),
    "empty_dict": (".pth", lambda place: saved({})),
    "keys_of_numbers": (".pth", lambda place: saved({1: torch.zeros(2), None: torch.zeros(1)})),
    "final_weight_scalar": (".pth", lambda place: saved({"final.weight": torch.tensor(1.0)})),
    "final_weight_number": (".pth", lambda place: saved({"final.weight": 5})),
    "final_weight_empty": (".pth", lambda place: saved({"final.weight": torch.zeros(0, 16, 1, 1, 1)})),
    "final_weight_text": (".pth", lambda place: saved({"final.weight": "$open('PWNED', 'w')"})),
    "other_network": (".pth", lambda place: saved(torch.nn.Conv3d(1, 2, 3).state_dict())),
    "one_missing": (".pth", lambda place: saved({k: v for k, v in weights().items() if not k.startswith("final.b")})),
    "sparse": (".pth", lambda place: saved({"final.weight": torch.eye(3).to_sparse()})),
    "expression_keys": (".pth", lambda place: saved({"$open('PWNED','w')": torch.zeros(1), "@a": torch.zeros(1)})),
    "safetensors_cut": (".safetensors", lambda place: save(weights())[: place.rng.randrange(9, 100_000)]),
    "safetensors_empty": (".safetensors", lambda place: b""),
    "safetensors_text": (".safetensors", lambda place: b"weights"),
    "safetensors_huge": (".safetensors", lambda place: header(1 << 62)),
    "safetensors_negative": (".safetensors", lambda place: header((1 << 64) - 1)),
    "safetensors_brackets": (".safetensors", lambda place: header(90_000, b'{"a":' + b"[" * 90_000)),
    "safetensors_outside": (
        ".safetensors",
        lambda place: listed({"a": {"dtype": "F32", "shape": [9999], "data_offsets": [0, 39996]}}),
    ),
    "safetensors_overlap": (
        ".safetensors",
        lambda place: listed({n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "ab"}),
    ),
    "safetensors_other": (".safetensors", lambda place: save({"a": torch.zeros(3)})),
    "safetensors_none": (".safetensors", lambda place: save({})),
    "pickle_as_safetensors": (".safetensors", lambda place: pickle.dumps(Payload())),
    "flipped": (".pth", lambda place: flipped(saved({"final.weight": torch.zeros(9)}), place)),
    "flipped_2": (".pth", lambda place: flipped(saved({"final.weight": torch.zeros(9)}), place)),
    "flipped_3": (".pth", lambda place: flipped(saved({"final.weight": torch.zeros(9)}), place)),
}
KINDS: dict[str, Callable[[Path], None]] = {
    "folder": lambda path: path.mkdir(),
    "fifo": lambda path: os.mkfifo(path),
    "loop": lambda path: path.symlink_to(path.name),
    "nowhere": lambda path: None,
    "endless": lambda path: path.symlink_to("/dev/zero"),
}
CONVERTIBLE = (
    "dict_of_code", "old_dict_of_code", "keys_of_numbers", "final_weight_scalar", "final_weight_empty", "sparse",
    "other_network", "safetensors_other", "one_missing", "expression_keys", "flipped", "flipped_2", "flipped_3",
)  # fmt: skip


def spoiler(suffix: str, make: Callable[[Path, Place], None], in_run: bool = False):
    def spoil(place: Place) -> None:
        if in_run:
            path = place.run / "bundle" / "models" / "model.pt"
            path.unlink()
        else:
            path = place.root / f"x{suffix}"
            place.words["file"] = str(path)
        make(path, place)

    return spoil


def writing(make: Content) -> Callable[[Path, Place], None]:
    return lambda path, place: path.write_bytes(make(place))


def trials_of(name: str, suffix: str, make: Callable[[Path, Place], None]) -> list[Trial]:
    spoil, with_model = spoiler(suffix, make), spoiler(suffix, make, in_run=True)
    weights_words = ("--weights", "{file}", "--output", "{out}", "--device", "cpu")
    convert = (REFUSED, RIGHT) if name in CONVERTIBLE else (REFUSED,)
    found = [
        Trial("checkpoints", f"convert_{name}", spoil, ("convert-weights", "{file}", "{out}.safetensors"), convert),
        Trial("checkpoints", f"predict_{name}", spoil, ("predict", "{image}", *weights_words), (REFUSED,)),
    ]
    if suffix != ".safetensors":
        words = ("predict", "{image}", "--run", "{run}", "--output", "{out}", "--device", "cpu")
        found.append(Trial("checkpoints", f"model_{name}", with_model, words, (REFUSED,)))
    if name in FEW:
        words = ("test", "{data}", "--weights", "{file}", "--device", "cpu")
        found.append(Trial("checkpoints", f"test_{name}", spoil, words, (REFUSED,)))
        words = ("run", "{data}", "--output", "{out}", "--encoder", "sam_med3d", "--set", "pretrained_ckpt={file}")
        found.append(Trial("checkpoints", f"encoder_{name}", spoil, words, (REFUSED,)))
    return found


FEW = ("text.pth", "dict_of_code", "other_network", "safetensors_cut", "fifo", "nowhere", "folder")

TRIALS = [
    *(trial for name, (suffix, make) in FILES.items() for trial in trials_of(name, suffix, writing(make))),
    *(
        trial
        for name, make in KINDS.items()
        for trial in trials_of(name, ".pth", lambda path, place, make=make: make(path))
    ),
]
