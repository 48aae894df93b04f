"""Features computed once: the store on disk, and what fills it (an inferer and a handler for MONAI's evaluator)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer, SlidingWindowInferer
from monai.utils import CommonKeys as Keys

from semisam_o1.encoders.base import Encoder
from semisam_o1.export import whole
from semisam_o1.transforms import Grid
from semisam_o1.types import Affine, Case, Tokens

log = logging.getLogger("semisam_o1")
FORMAT = 1  # of the store's files; a change makes them stale


@dataclass(frozen=True)
class Features:
    """What the store keeps of a scan.

    tokens: (C, H', W', D') float32. affine: (4, 4), token index to RAS mm. descriptor: (C,), the mean of the tokens
    over space, of unit length. scan: the stored grid of the scan itself, to which results go back.
    """

    tokens: Tokens
    affine: Affine
    descriptor: np.ndarray
    scan: Grid

    @property
    def step_mm(self) -> float:
        """From one token to the next; the working space is isotropic."""
        return float(np.linalg.norm(self.affine[:3, 0]))


class FeatureStore:
    """A folder with one HDF5 file a case; docs/feature_store.md describes it for other programs.

    A file is fresh while the scan's bytes, the encoder (settings and weights) and the working spacing are those it
    was made from: their SHA-256 is its attribute ``key``. Files are written aside and renamed, so a killed run
    leaves whole files or none. Nothing is held in memory.

    Args:
        folder: where the files are; made when the first is written.
        encoder: whose features these are.
        spacing: of the working space, mm; None is the stored grid.
        dtype: of the tokens on disk, float16 or float32.
        settings: anything else that the features depend on, e.g. the HDF5 key; goes into the key as text.
    """

    def __init__(
        self, folder: str | Path, encoder: Encoder, spacing: float | None, dtype: str = "float16", settings: str = ""
    ):
        self.folder, self.encoder, self.spacing, self.dtype = Path(folder), encoder, spacing, dtype
        self.settings = f"{FORMAT} {encoder_key(encoder)} {self.spacing} {dtype} {settings}"

    def frame(self, name: str) -> FeatureStore:
        """The store, in a folder of this one, of features in another frame, e.g. the "stored" axes of oblique scans."""
        return FeatureStore(self.folder / name, self.encoder, self.spacing, self.dtype)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.h5"

    def key(self, case: Case) -> str:
        """SHA-256 over the scan's bytes and all settings that its features depend on."""
        digest = hashlib.sha256(self.settings.encode())
        with open(case.image, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def missing(self, cases: Iterable[Case]) -> list[Case]:
        """Those of ``cases`` without fresh features."""
        return [case for case in cases if self._stored_key(case.name) != self.key(case)]

    def _stored_key(self, name: str) -> str | None:
        try:
            with h5py.File(self.path(name), "r") as file:
                return file.attrs["key"]
        except (OSError, KeyError):  # none yet, or not one of ours: made again
            return None

    def save(self, case: Case, tokens: Tokens, affine: Affine, scan: Grid) -> None:
        """Write one case: tokens (C, H', W', D') and their affine, beside the scan's own grid."""
        descriptor = F.normalize(tokens.float().mean((1, 2, 3)), dim=0)
        key = self.key(case)
        with whole(self.path(case.name)) as aside, h5py.File(aside, "w") as file:
            file.create_dataset("tokens", data=tokens.cpu().numpy().astype(self.dtype), chunks=(1, *tokens.shape[1:]))
            file["affine"], file["descriptor"] = np.asarray(affine, float), descriptor.cpu().numpy()
            file["scan_affine"], file["scan_shape"] = np.asarray(scan.affine, float), np.asarray(scan.shape, int)
            file.attrs.update(key=key, encoder=self.encoder.name, spacing_mm=self.spacing or 0.0, format=FORMAT)

    def load(self, name: str) -> Features:
        """One case from disk.

        Raises:
            FileNotFoundError: it has no features; run the stage ``features`` first.
        """
        if not self.path(name).exists():
            raise FileNotFoundError(f"case {name}: no features in {self.folder}; run the stage 'features' first.")
        with h5py.File(self.path(name), "r") as file:
            tokens = torch.from_numpy(file["tokens"][()].astype(np.float32))
            scan = Grid(file["scan_affine"][()], tuple(int(n) for n in file["scan_shape"][()]))
            return Features(tokens, file["affine"][()], file["descriptor"][()], scan)

    def descriptors(self, names: Iterable[str]) -> np.ndarray:
        """The global descriptors of ``names``, (N, C), without reading a token."""
        rows = []
        for name in names:
            with h5py.File(self.path(name), "r") as file:
                rows.append(file["descriptor"][()])
        return np.stack(rows)


def encoder_key(encoder: Encoder) -> str:
    """SHA-256 over an encoder's structure and weights."""
    digest = hashlib.sha256(
        f"{encoder.name} {encoder.patch_size} {encoder.input_size} {named(encoder.normalise)}".encode()
    )
    network = encoder.network
    plain = {k: v for k, v in vars(network).items() if not k.startswith("_") and k != "training"}
    digest.update(f"{type(network).__qualname__} {network} {sorted(plain.items())}".encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def named(function) -> str:
    """A function's name, which stays the same from one process to the next as its text does not."""
    if function is None:
        return "none"
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


class TokenInferer(Inferer):
    """Tokens of a whole volume (1, 1, H, W, D), with the affine that says where each lies: (1, C, H', W', D').

    The volume is padded evenly with its border to whole patches, and to the encoder's window where that is bound;
    windows overlap by ``overlap`` and are blended (Gaussian weights). ``crop`` "center" is the published code's way:
    zeros are padded, and one window is cut from the middle.
    """

    def __init__(self, overlap: float = 0.5, sw_batch_size: int = 1, crop: str | None = None):
        if crop not in (None, "center"):
            raise ValueError(f"crop '{crop}': expected 'center' or None.")
        self.overlap, self.sw_batch_size, self.crop = overlap, sw_batch_size, crop

    def __call__(self, inputs: torch.Tensor, network: Encoder, *args, **kwargs) -> MetaTensor:
        patch, window = network.patch_size, network.input_size
        affine = np.asarray(inputs.meta["affine"] if isinstance(inputs, MetaTensor) else np.eye(4), float)
        affine = affine.reshape(-1, 4, 4)[0]
        volume = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        sides = [max(-(-n // patch) * patch, window or 0) for n in volume.shape[2:]]
        if self.crop and window:
            sides = [window] * 3
        before = [(side - n) // 2 for side, n in zip(sides, volume.shape[2:])]
        after = [side - n - b for side, n, b in zip(sides, volume.shape[2:], before)]
        pads = [p for pair in zip(before[::-1], after[::-1]) for p in pair]
        if any(pads):  # negative ones crop
            volume = F.pad(volume, pads, mode="constant" if self.crop else "replicate")
        if window is None:
            tokens = network(volume)
        else:
            step = max(patch, round(window * (1 - self.overlap) / patch) * patch)  # windows start on whole tokens
            overlap = max(0.0, 1 - (step + 0.5) / window)  # MONAI rounds window x (1 - overlap) down: to the step
            slide = SlidingWindowInferer(window, self.sw_batch_size, overlap=overlap, mode="gaussian")
            tokens = slide(volume, network)
        place = np.eye(4)
        place[:3, :3] *= patch
        place[:3, 3] = (patch - 1) / 2 - np.array(before)
        return MetaTensor(tokens, affine=torch.as_tensor(affine @ place))


class FeatureSaver:
    """Handler: after each volume of a MONAI evaluator, puts its tokens into the store."""

    def __init__(self, store: FeatureStore, cohort):
        self.store, self.cohort = store, cohort

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        (name,) = engine.state.batch["case"]
        case, tokens = self.cohort.case(name), engine.state.output[Keys.PRED]
        affine = np.asarray(tokens.affine, float).reshape(-1, 4, 4)[0]
        self.store.save(case, tokens.as_tensor()[0], affine, self.cohort.grid(case))


def image_alone(batch: dict, device=None, non_blocking: bool = False, **kwargs) -> tuple[torch.Tensor, None]:
    """For an evaluator that is to see no label: the image (B, 1, H, W, D) with its metadata, and None."""
    return batch[Keys.IMAGE].to(device, non_blocking=non_blocking, **kwargs), None
