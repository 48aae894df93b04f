"""Nearest neighbours of vectors. Only this module uses FAISS for searching."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np


def nearest(
    references: np.ndarray, queries: np.ndarray, k: int, cells: int = 0, probed: int = 32, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` nearest of ``references`` (n, d) for each of ``queries`` (m, d).

    The search is exact if ``cells`` is 0. Otherwise the references are divided into ``cells`` cells (IVF) and only the
    ``probed`` nearest cells are searched, which is several times faster; docs/results/rounds.md has its recall.

    Returns squared Euclidean distances (m, k), ascending, and indices (m, k). Fewer references than k: all of them.
    """
    references, queries = (np.ascontiguousarray(vectors, np.float32) for vectors in (references, queries))
    index: Any = faiss.IndexFlatL2(references.shape[1])
    k = min(k, len(references))
    if cells and len(references) > 50 * cells:  # with fewer references the exact search is fast
        index = faiss.IndexIVFFlat(index, references.shape[1], cells)
        index.cp.seed, index.cp.niter, index.nprobe = seed + 1, 5, probed
        index.train(references)
    index.add(references)
    return index.search(queries, k)


def k_means(vectors: np.ndarray, k: int, seed: int = 0, iterations: int = 20) -> np.ndarray:
    """``k`` k-means centres (k, d) of ``vectors`` (n, d), seeded; at most as many centres as vectors."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    clusters = faiss.Clustering(vectors.shape[1], min(k, len(vectors)))
    clusters.niter, clusters.seed, clusters.min_points_per_centroid = iterations, seed + 1, 1
    centres = faiss.IndexFlatL2(vectors.shape[1])
    clusters.train(vectors, centres)
    return centres.reconstruct_n(0, centres.ntotal)  # faiss.Kmeans reads them with a type that SimpleITK redefines
