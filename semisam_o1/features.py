"""Features, computed once: the store on disk, and the inferer and handler that fill it from a MONAI evaluator."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer, SlidingWindowInferer
from monai.utils import CommonKeys as Keys

from semisam_o1.data.grids import Grid
from semisam_o1.data.intensities import HAS_DATA
from semisam_o1.data.turns import FOLDER, turn_of
from semisam_o1.encoders.base import Encoder
from semisam_o1.files import checksum, read_hdf5, write_hdf5
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import Affine, Case, Tokens, UserError

log = logging.getLogger("semisam_o1")
FORMAT = 2  # of the store's files; a new number makes old files stale
SCAN = ("scan_sha256", "scan_bytes", "scan_changed_ns")
JUST_NOW_NS = 2 * 10**9  # a scan modified so shortly before its features were written may change again unnoticed


@dataclass(frozen=True)
class Features:
    """The stored features of a scan.

    tokens: (C, H', W', D') float32. affine: (4, 4), token index to RAS mm. descriptor: (C,), the spatial mean of the
    tokens, of unit length. scan: the stored grid of the scan, on which results are written.
    """

    tokens: Tokens
    affine: Affine
    descriptor: np.ndarray
    scan: Grid

    @property
    def step_mm(self) -> float:
        """The distance between neighbouring tokens; the working space is isotropic."""
        return float(np.linalg.norm(self.affine[:3, 0]))


class FeatureStore:
    """A folder with one HDF5 file per case; docs/feature_store.md describes the format.

    A file is fresh while the scan's bytes, the encoder (settings and weights) and all other settings match the ones it
    was computed from, by SHA-256. A scan with unchanged size and modification time is not read again. Files are written
    atomically, so a killed run leaves no partial file. Nothing is held in memory.

    Args:
        folder: the folder of the files; created with the first file.
        encoder: the encoder that computes the features.
        spacing: of the working space, mm; None is the stored grid.
        dtype: of the tokens on disk, float16 or float32.
        settings: other values that the features depend on, e.g. the HDF5 key; part of the key as text.
    """

    def __init__(
        self,
        folder: str | Path,
        encoder: Encoder,
        spacing: float | None,
        dtype: str = "float16",
        settings: Sequence | str = "",
    ):
        self.folder, self.encoder, self.spacing, self.dtype = Path(folder), encoder, spacing, dtype
        self.settings = settings if isinstance(settings, str) else str(tuple(settings))

    @functools.cached_property
    def made_by(self) -> dict:
        """What features depend on besides the scan, as file attributes."""
        settings = f"{self.settings} {self.dtype}"
        return {"format": FORMAT, "encoder_sha256": encoder_key(self.encoder), "settings": settings}

    def frame(self, name: str) -> FeatureStore:
        """The store of features in a frame.

        "world" is this store. "stored", the stored axes of oblique scans, is a subfolder, and so is the one of all
        frames in which scans are turned, see `data.turns`: a file there is fresh for its own turn alone.
        """
        if name == "world":
            return self
        if turn_of(name) is not None:
            settings = f"{self.settings} {name}"
            return FeatureStore(self.folder / FOLDER, self.encoder, self.spacing, self.dtype, settings)
        return FeatureStore(self.folder / name, self.encoder, self.spacing, self.dtype)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.h5"

    def missing(self, cases: Iterable[Case]) -> list[Case]:
        """The ``cases`` without fresh features."""
        return [case for case in cases if not self.fresh(case)]

    def fresh(self, case: Case) -> bool:
        """Whether the case has features of the present scan, encoder and settings."""
        try:
            with read_hdf5(self.path(case.name)) as file:
                found = {name: file.attrs[name] for name in (*self.made_by, "spacing_mm", *SCAN)}
        except (OSError, KeyError):  # missing, or not a file of this store: compute it
            return False
        made_by = self.made_by | {"spacing_mm": self.spacing or 0.0}
        if any(found[name] != value for name, value in made_by.items()):
            return False
        seen = case.image.stat()
        untouched = (found["scan_bytes"], found["scan_changed_ns"]) == (seen.st_size, seen.st_mtime_ns)
        settled = self.path(case.name).stat().st_mtime_ns - seen.st_mtime_ns > JUST_NOW_NS
        return (untouched and settled) or found["scan_sha256"] == checksum(case.image)

    def save(self, case: Case, tokens: Tokens, affine: Affine, scan: Grid) -> None:
        """Write one case: tokens (C, H', W', D'), their affine, and the stored grid of the scan."""
        descriptor = F.normalize(tokens.float().mean((1, 2, 3)), dim=0)
        seen = case.image.stat()
        scan_of = dict(zip(SCAN, (checksum(case.image), seen.st_size, seen.st_mtime_ns)))
        with write_hdf5(self.path(case.name)) as file:
            file.create_dataset("tokens", data=tokens.cpu().numpy().astype(self.dtype), chunks=(1, *tokens.shape[1:]))
            file["affine"], file["descriptor"] = np.asarray(affine, float), descriptor.cpu().numpy()
            file["scan_affine"], file["scan_shape"] = np.asarray(scan.affine, float), np.asarray(scan.shape, int)
            file.attrs.update(encoder=self.encoder.name, spacing_mm=self.spacing or 0.0, **self.made_by, **scan_of)

    def load(self, name: str) -> Features:
        """Read one case from disk.

        Raises:
            FileNotFoundError: the case has no features; run the stage ``features`` first.
        """
        if not self.path(name).exists():
            raise FileNotFoundError(f"case {name}: no features in {self.folder}; run the stage 'features' first.")
        with read_hdf5(self.path(name)) as file:
            tokens = torch.from_numpy(file["tokens"][()].astype(np.float32))
            scan = Grid(file["scan_affine"][()], tuple(int(n) for n in file["scan_shape"][()]))
            return Features(tokens, file["affine"][()], file["descriptor"][()], scan)

    def descriptors(self, names: Iterable[str]) -> np.ndarray:
        """The global descriptors of ``names``, (N, C); tokens are not read."""
        rows = []
        for name in names:
            with read_hdf5(self.path(name)) as file:
                rows.append(file["descriptor"][()])
        return np.stack(rows)


def run_store(output_dir: str | Path, frame: str = "world", **settings) -> FeatureStore:
    """The `FeatureStore` of a run, for features in ``frame``; ``settings``: arguments of `FeatureStore`."""
    folder = RunFolder(output_dir).features
    return FeatureStore(folder if frame == "world" else folder / frame, **settings)


def encoder_key(encoder: Encoder) -> str:
    """SHA-256 over an encoder's structure and weights."""
    known = (encoder.name, encoder.patch_size, encoder.input_size, encoder.stage, encoder.precision, encoder.compiled)
    digest = hashlib.sha256(f"{known} {named(encoder.normalise)}".encode())
    network = encoder.network
    plain = {k: v for k, v in vars(network).items() if not k.startswith("_") and k != "training"}
    digest.update(f"{type(network).__qualname__} {network} {sorted(plain.items())}".encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def named(function) -> str:
    """A function's qualified name, which is the same in every process (its repr is not)."""
    if function is None:
        return "none"
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def half(surplus: int) -> int:
    """Half of ``surplus``, rounded towards 0: the padding before a volume, or the cropping if negative."""
    return surplus // 2 if surplus >= 0 else -(-surplus // 2)


def plain(volume: torch.Tensor) -> torch.Tensor:
    """A tensor without metadata."""
    return volume.as_tensor() if isinstance(volume, MetaTensor) else volume


class TokenInferer(Inferer):
    """Tokens (1, C, H', W', D') of a whole volume (1, 1, H, W, D), with their affine.

    The volume is padded evenly with border values to whole patches, and at least to the encoder's window if it has
    one. Windows overlap by ``overlap`` and are blended with Gaussian weights. ``crop`` "center" follows the published
    code: pad with zeros and take one window from the middle. ``step`` sets the distance of tokens in voxels, a divisor
    p / n of the patch size p: the encoder sees n^3 shifted copies of the volume, which takes n^3 times as long.
    ``has_data`` (1, 1, H, W, D), 1 or 0: where the volume holds data, for an encoder of whole volumes; None:
    everywhere.
    """

    def __init__(self, overlap: float = 0.5, sw_batch_size: int = 1, crop: str | None = None, step: int | None = None):
        if crop not in (None, "center"):
            raise UserError(f"crop '{crop}': expected 'center' or None.")
        self.overlap, self.sw_batch_size, self.crop, self.step = overlap, sw_batch_size, crop, step

    def __call__(
        self, inputs: torch.Tensor, network: Encoder, *args, has_data: torch.Tensor | None = None, **kwargs
    ) -> MetaTensor:
        patch, window = network.patch_size, network.input_size
        step = self.step or patch
        if patch % step:
            raise UserError(f"a token every {step} voxels: expected a divisor of the encoder's patch size {patch}.")
        affine = np.asarray(inputs.meta["affine"] if isinstance(inputs, MetaTensor) else np.eye(4), float)
        affine = affine.reshape(-1, 4, 4)[0]
        volume = plain(inputs)
        has_data = None if has_data is None else plain(has_data)
        sides = [max(-(-n // patch) * patch, window or 0) for n in volume.shape[2:]]
        if self.crop and window:
            sides = [window] * 3
        before = [half(side - n) for side, n in zip(sides, volume.shape[2:])]
        margin = (patch - step) // 2  # centres the shifted volumes on the original one
        pads: list[int] = []
        for side, n, b in zip(sides, volume.shape[2:], before):
            pads = [b + margin, side - n - b + (patch - step - margin), *pads]
        if any(pads):  # negative values crop
            volume = F.pad(volume, pads, mode="constant" if self.crop else "replicate")
            if has_data is not None:
                has_data = F.pad(has_data, pads, mode="replicate")
        shifts, fine = range(0, patch, step), None
        for i, j, k in itertools.product(shifts, repeat=3):
            part = (..., slice(i, i + sides[0]), slice(j, j + sides[1]), slice(k, k + sides[2]))
            tokens = self._tokens(volume[part], network, None if has_data is None else has_data[part])
            if fine is None:
                fine = tokens.new_empty(*tokens.shape[:2], *(n * len(shifts) for n in tokens.shape[2:]))
            fine[:, :, i // step :: len(shifts), j // step :: len(shifts), k // step :: len(shifts)] = tokens
        place = np.eye(4)
        place[:3, :3] *= step
        place[:3, 3] = (patch - 1) / 2 - margin - np.array(before)
        return MetaTensor(fine, affine=torch.as_tensor(affine @ place))

    def _tokens(self, volume: torch.Tensor, network: Encoder, has_data: torch.Tensor | None) -> torch.Tensor:
        """Tokens (1, C, H', W', D') of a volume of whole patches."""
        patch, window = network.patch_size, network.input_size
        if window is None:
            return network(volume, has_data)
        stride = max(patch, round(window * (1 - self.overlap) / patch) * patch)  # windows start on whole tokens
        overlap = max(0.0, 1 - (stride + 0.5) / window)  # MONAI rounds window x (1 - overlap) down, to the stride
        return SlidingWindowInferer(window, self.sw_batch_size, overlap=overlap, mode="gaussian")(volume, network)


class FeatureSaver:
    """Handler of a MONAI evaluator: writes the tokens of each volume into the store."""

    def __init__(self, store: FeatureStore, cohort):
        self.store, self.cohort = store, cohort

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        (name,) = engine.state.batch["case"]
        case, tokens = self.cohort.case(name), engine.state.output[Keys.PRED]
        affine = np.asarray(tokens.affine, float).reshape(-1, 4, 4)[0]
        self.store.save(case, tokens.as_tensor()[0], affine, self.cohort.grid(case))


def image_and_mask(batch: dict, device=None, non_blocking: bool = False, **kwargs) -> tuple:
    """``prepare_batch`` of features: `image_alone`, and the mask of the voxels with data for the inferer."""
    image, label = image_alone(batch, device, non_blocking, **kwargs)
    mask = batch[HAS_DATA].to(device, non_blocking=non_blocking) if HAS_DATA in batch else None
    return image, label, (), {"has_data": mask}


def image_alone(batch: dict, device=None, non_blocking: bool = False, **kwargs) -> tuple[torch.Tensor, None]:
    """``prepare_batch`` without a label: the image (B, 1, H, W, D) with its metadata, and None."""
    return batch[Keys.IMAGE].to(device, non_blocking=non_blocking, **kwargs), None
