"""Nearest vectors: the only module that knows FAISS."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np


def nearest(
    references: np.ndarray, queries: np.ndarray, k: int, cells: int = 0, probed: int = 32, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` nearest of ``references`` (n, d) for each of ``queries`` (m, d).

    Exact where ``cells`` is 0; else the references are sorted into so many cells (IVF) and those of the nearest
    ``probed`` cells are compared, several times faster; what that misses is in docs/results/rounds.md.

    Returns squared Euclidean distances (m, k), ascending, and indices (m, k). Fewer references than k: all of them.
    """
    references, queries = (np.ascontiguousarray(vectors, np.float32) for vectors in (references, queries))
    index: Any = faiss.IndexFlatL2(references.shape[1])
    k = min(k, len(references))
    if cells and len(references) > 50 * cells:  # fewer are compared at once
        index = faiss.IndexIVFFlat(index, references.shape[1], cells)
        index.cp.seed, index.cp.niter, index.nprobe = seed + 1, 5, probed
        index.train(references)
    index.add(references)
    return index.search(queries, k)


def k_means(vectors: np.ndarray, k: int, seed: int = 0, iterations: int = 20) -> np.ndarray:
    """``k`` centres (k, d) of ``vectors`` (n, d), seeded; never more centres than vectors."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    clusters = faiss.Clustering(vectors.shape[1], min(k, len(vectors)))
    clusters.niter, clusters.seed, clusters.min_points_per_centroid = iterations, seed + 1, 1
    centres = faiss.IndexFlatL2(vectors.shape[1])
    clusters.train(vectors, centres)
    return centres.reconstruct_n(0, centres.ntotal)  # faiss.Kmeans reads them by a type that SimpleITK redefines
