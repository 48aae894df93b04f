"""Recall and time of the approximate search (IVF), compared with the exact search.

    python -m benchmarks neighbours [FEATURES] [--places 1200000]

FEATURES: the folder ``features`` of a run, whose tokens are searched; by default synthetic vectors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import faiss
import h5py
import numpy as np

from semisam_o1.neighbours import nearest

QUERIES, K = 1000, 15
CELLS, PROBED = 1024, (1, 4, 8, 16, 32)  # VoxelVotes uses 1024 and 32


def options(parser) -> None:
    parser.add_argument("features", nargs="?", type=Path, metavar="FEATURES")
    parser.add_argument("--places", type=int, default=1_200_000)


def stored(folder: Path, places: int) -> np.ndarray:
    """Up to ``places`` tokens (n, C) from a feature store, the same number from each scan."""
    files = sorted(folder.glob("*.h5"))
    draw, found = np.random.default_rng(0), []
    for path in files:
        with h5py.File(path, "r") as file:
            tokens = file["tokens"][()].reshape(len(file["tokens"]), -1).T
        found.append(tokens[draw.permutation(len(tokens))[: -(-places // len(files))]].astype(np.float32))
    return np.concatenate(found)[:places]


def made_up(places: int) -> np.ndarray:
    """Vectors (n, 32) on a curved six-dimensional surface with noise, similar to tokens of similar scans."""
    draw = np.random.default_rng(0)
    sheet = np.sin(draw.standard_normal((places, 6)) @ draw.standard_normal((6, 32)))
    return (sheet + 0.05 * draw.standard_normal(sheet.shape)).astype(np.float32)


def run(options) -> None:
    vectors = stored(options.features, options.places) if options.features else made_up(options.places)
    vectors = vectors[np.random.default_rng(1).permutation(len(vectors))]
    queries, places = vectors[:QUERIES], vectors[QUERIES:]
    print(f"\n{QUERIES} queries of {places.shape[1]} numbers, {len(places)} places, the {K} nearest")
    print(f"{'':24}{'recall':>8}{'of it the first':>17}{'seconds, index made anew':>26}")
    exact = line("exact", lambda: nearest(places, queries, K)[1])
    cells = min(CELLS, len(places) // 51)
    for probed in PROBED:
        line(f"IVF, {probed} of {cells} cells", lambda: nearest(places, queries, K, cells, probed)[1], exact)
    line("rival: HNSW, 16 links", lambda: linked(places, queries), exact)


def linked(places: np.ndarray, queries: np.ndarray) -> np.ndarray:
    graph = faiss.IndexHNSWFlat(places.shape[1], 16)
    graph.add(places)
    return graph.search(queries, K)[1]


def line(name: str, search: Callable[[], np.ndarray], exact: np.ndarray | None = None) -> np.ndarray:
    """Print a row of the table; returns the indices found, (queries, K)."""
    began = time.perf_counter()
    found = search()
    took = time.perf_counter() - began
    exact = found if exact is None else exact
    recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(exact, found)])
    print(f"{name:24}{recall:8.3f}{np.mean(exact[:, 0] == found[:, 0]):17.3f}{took:26.1f}", flush=True)
    return found
