"""The published evaluation: score a checkpoint, or the rounds of a run, on a list of labelled cases, in voxels."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from monai.bundle import ConfigParser
from torch import nn

from semisam_o1.data import ScanReader, image_chain, read_label, to_grid
from semisam_o1.data.datasets import listed_cases
from semisam_o1.data.export import write_image, write_label
from semisam_o1.data.findings import Fault
from semisam_o1.data.formats import format_of
from semisam_o1.data.pseudonyms import refuse_key_in, renamed
from semisam_o1.job.bundle import trained_config
from semisam_o1.job.claim import protect_names
from semisam_o1.ledger import Ledger
from semisam_o1.literals import as_config
from semisam_o1.networks import LogitsAlone, ProbabilityWindows, UNet3D, UNet3DSDF
from semisam_o1.report.metrics import MEASURES, score
from semisam_o1.runfolder import RunFolder
from semisam_o1.tables import COUNT, TEXT, write_rows
from semisam_o1.types import Case, DatasetError
from semisam_o1.weights import load_weights, published_classes, read_checkpoint

log = logging.getLogger("semisam_o1")
TABLE = "test.csv"
WINDOW = (128, 128, 128)  # the stride is half of it
PAPER = MEASURES["paper"]
COLUMNS = {"model": TEXT, "case": TEXT, "class": COUNT, **{measure.name: ".6f" for measure in PAPER}}
Predictor = Callable[[Case], np.ndarray]  # returns a label (H, W, D) on the scan's stored grid


def published_network(weights: str | Path, method: str) -> tuple[nn.Module, int]:
    """The network of a checkpoint of the published code, and its number of classes.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it contains no such network.
    """
    classes = published_classes(weights)
    network = (UNet3DSDF if method == "dtc" else UNet3D)(1, classes)
    loaded = load_weights(network, weights, what=f"the network of '{method}' ({classes} classes)")
    return (LogitsAlone(loaded) if method == "dtc" else loaded), classes


def published_predictor(network: nn.Module, device: str) -> Predictor:
    """Predictor of the published test: stored grid and intensities, windows of 128, stride 64, all components kept."""
    chain, inferer = image_chain(None, intensities=None, find_no_data=False), ProbabilityWindows(WINDOW, 0.5)
    return _predictor(network, chain, inferer, device)


def _predictor(
    network: nn.Module, chain: Callable, inferer: Callable, device: str, reader: ScanReader | None = None
) -> Predictor:
    network, reader = network.to(device).eval(), reader or ScanReader()

    def predict(case: Case) -> np.ndarray:
        image = chain({"case": case.name, "image": str(case.image)})["image"]
        with torch.no_grad():
            logits = inferer(image.as_tensor()[None].to(device), network)
        shares = to_grid(logits[0].float().softmax(0).cpu(), np.asarray(image.affine), reader.grid(case.image))
        return shares.argmax(0).numpy()

    return predict


def run_predictors(run: str | Path, device: str) -> Iterator[tuple[str, Predictor, list[int], ScanReader]]:
    """Name, predictor, class numbers and reader of each trained round of a run, by the config of its bundle.

    Raises:
        DatasetError: the run has no trained bundle.
    """
    folder = RunFolder(run)
    record, config = folder.read_record(), trained_config(folder)
    for number in range(1, record["rounds"] + 1):
        parser = ConfigParser(copy.deepcopy(config) | {"device": as_config(device)})
        network, chain, inferer = (parser.get_parsed_content(id) for id in ("network", "preprocessing", "inferer"))
        network.load_state_dict(read_checkpoint(folder.round(number).model))
        reader, numbers = parser.get_parsed_content("reader"), parser.get_parsed_content("class_numbers")
        yield f"round {number}", _predictor(network, chain, inferer, device, reader), numbers, reader


def score_cases(
    predict: Predictor,
    cases: Sequence[Case],
    numbers: Sequence[int],
    model: str,
    save: Path | None,
    ledger: Ledger | None,
    reader: ScanReader,
    binary: bool = False,
) -> list[dict]:
    """Rows with COLUMNS, one for each case and foreground class.

    Args:
        numbers: the class number of each channel of the model.
        save: folder for image, truth and prediction.
        binary: all foreground classes of the truth are one, as a run with ``binary_label`` learned.
    """
    if ledger is not None:
        files = [save / f"{case.name}_{kind}.nii.gz" for case in cases for kind in ("img", "lab", "pred")]
        ledger.refuse_foreign([*files, ledger.folder / TABLE])
    rows = []
    for number, case in enumerate(cases, start=1):
        label = predict(case)
        try:
            truth = read_label(case.label, reader, reader.open(case.image)).values
        except Fault as fault:
            raise DatasetError(f"case {case.name}: {fault}") from fault
        truth = np.minimum(truth, 1) if binary else truth
        channels = np.searchsorted(numbers, truth).clip(max=len(numbers) - 1)
        channels[np.asarray(numbers)[channels] != truth] = len(numbers)  # a class that the model does not know
        found = score(label, channels, (1, 1, 1), len(numbers), "paper")[:-1]
        rows += [{"model": model, "case": case.name, **row, "class": numbers[row["class"]]} for row in found]
        log.info(
            "%s, %d of %d: %s, Dice %.4f", model, number, len(cases), case.name, np.mean([r["dice"] for r in found])
        )
        if save is not None:
            save_prediction(save, case, np.asarray(numbers)[label], truth, ledger, reader)
    return rows


def save_prediction(
    folder: Path, case: Case, label: np.ndarray, truth: np.ndarray, ledger: Ledger, reader: ScanReader
) -> None:
    """Write ``{case}_img``, ``_lab`` and ``_pred`` as NIfTI: in the scan's own geometry or, for HDF5, as published.

    As published: spacing 1, origin 0; the last axis of the array is the first axis of the file.
    """
    arrays, image = {"lab": truth, "pred": label}, reader.volume(case.image)[0].numpy()
    if format_of(case.image).has_geometry:
        for kind, array in {"img": image, **arrays}.items():
            write = write_image if kind == "img" else write_label
            with ledger.writing(folder / f"{case.name}_{kind}.nii.gz") as aside:
                write(aside, array, case.image, reader.grid(case.image))
        return
    for kind, array in {"img": image, **{kind: _narrow(array) for kind, array in arrays.items()}}.items():
        _write(sitk.GetImageFromArray(array), folder / f"{case.name}_{kind}.nii.gz", ledger)


def _narrow(label: np.ndarray) -> np.ndarray:
    """A label as uint8, as published; as uint16 if its class numbers need it."""
    return label.astype(np.uint8 if label.max() < 256 else np.uint16)


def _write(image: sitk.Image, path: Path, ledger: Ledger) -> None:
    with ledger.writing(path) as aside:
        sitk.WriteImage(image, str(aside))


def summary(rows: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation of the four measures over all rows: (4,) each."""
    values = np.array([[row[measure.name] for measure in PAPER] for row in rows])
    return values.mean(0), values.std(0)


def table(rows: Sequence[dict]) -> str:
    """One line for each case and class, then mean ± standard deviation over all lines; distances in voxels."""
    names = [measure.title for measure in PAPER]
    lines = [f"{'case':28}{'class':>6}" + "".join(f"{name:>12}" for name in names)]
    digits = [4 if measure.better == "higher" else 2 for measure in PAPER]
    for row in rows:
        cells = "".join(f"{row[measure.name]:12.{n}f}" for measure, n in zip(PAPER, digits))
        lines.append(f"{row['case']:28}{row['class']:6}{cells}")
    means, deviations = summary(rows)
    ends = [f"{mean:.{n}f} ± {deviation:.{n}f}" for mean, deviation, n in zip(means, deviations, digits)]
    return "\n".join(
        [
            *lines,
            "mean ± standard deviation over all rows, distances in voxels:",
            *(f"  {name:10}{end}" for name, end in zip(names, ends)),
        ]
    )


def final_test(
    dataset_dir: str | Path,
    weights: Path | None,
    run: Path | None,
    method: str = "mt",
    test_list: str = "test.txt",
    save: Path | None = None,
    device: str = "cpu",
    pseudonyms: str | Path | None = None,
) -> str:
    """Run the published test on a checkpoint (``weights``), or on each round of a ``run``, and return a table.

    ``save``: folder for image, truth and prediction of each case, and for ``test.csv``, one row per case and class.
    ``pseudonyms``: file of names to use in place of case names.

    Raises:
        DatasetError, UserError, FileNotFoundError: the list, data, checkpoint or run cannot be used, or the run is one
            under pseudonyms and no key is given.
    """
    if run is not None:
        protect_names(RunFolder(run), pseudonyms)
    if save is not None and pseudonyms is not None:
        refuse_key_in(save, pseudonyms)
    cases = listed_cases(dataset_dir, test_list)
    cases, _ = renamed(pseudonyms, [case.name for case in cases], cases, ())
    if weights is not None:
        network, classes = published_network(weights, method)
        models = iter([(Path(weights).name, published_predictor(network, device), list(range(classes)), ScanReader())])
    else:
        models = run_predictors(run, device)
    binary = run is not None and RunFolder(run).read_record()["settings"].get("binary_label", False)
    ledger = None if save is None else Ledger(save, "test")
    texts, rows = [], []
    for name, predict, numbers, reader in models:
        folder = None if save is None else (save if weights is not None else save / name.replace(" ", "_"))
        found = score_cases(predict, cases, numbers, name, folder, ledger, reader, binary)
        rows += found
        texts.append(f"{name}, {len(cases)} case{'' if len(cases) == 1 else 's'} of {test_list}\n{table(found)}")
    if ledger is not None:
        with ledger.writing(ledger.folder / TABLE) as aside:
            write_rows(aside, COLUMNS, rows)
    return "\n\n".join(texts)
