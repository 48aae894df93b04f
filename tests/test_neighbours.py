"""Exact search against brute force in numpy; seeded clusters."""

import subprocess
import sys

import numpy as np
import pytest

from semisam_o1.neighbours import k_means, nearest


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nearest_is_brute_force(dtype):
    rng = np.random.default_rng(0)
    references, queries = (
        rng.standard_normal((200, 7)).astype(dtype),
        rng.standard_normal((50, 7)).astype(dtype),
    )
    squared = ((queries[:, None] - references[None]) ** 2).sum(-1)
    distance, index = nearest(references, queries, 5)
    assert distance.shape == index.shape == (50, 5)
    np.testing.assert_array_equal(index, squared.argsort(1)[:, :5])
    np.testing.assert_allclose(distance, np.sort(squared, 1)[:, :5], atol=1e-4)


def test_search_in_cells_finds_nearly_all_and_the_same_each_time():
    rng = np.random.default_rng(3)
    references = rng.standard_normal((4000, 6))
    queries = references[:300] + 0.05 * rng.standard_normal((300, 6))
    _, exact = nearest(references, queries, 5)
    distance, found = nearest(references, queries, 5, cells=32, probed=8)
    recall = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(exact, found)])
    assert 0.8 < recall < 1  # fewer were compared, and almost all were found
    assert (np.diff(distance, axis=1) >= 0).all()
    np.testing.assert_array_equal(found, nearest(references, queries, 5, cells=32, probed=8)[1])


def test_any_memory_layout_is_taken():
    references, queries = np.arange(24.0).reshape(3, 8)[:, ::2].T, np.arange(24.0).reshape(3, 8)[:, 1::2].T
    distance, index = nearest(references, queries, 1)
    # columns 2i and 2i + 1 differ by 1 in three entries, as do 2i + 1 and 2i + 2
    np.testing.assert_allclose(distance[:, 0], 3)
    assert all(i in (q, q + 1) for q, i in enumerate(index[:, 0]))


def test_fewer_references_than_asked_for_are_all_given():
    references = np.array([[0.0, 0], [3, 4], [1, 0]])
    distance, index = nearest(references, np.array([[0.0, 0]]), 10)
    assert index.tolist() == [[0, 2, 1]]
    assert distance.tolist() == [[0, 1, 25]]


def test_k_means_finds_the_middle_of_each_cluster():
    rng = np.random.default_rng(1)
    middles = np.array([[0.0, 0, 0], [10, 0, 0], [0, 10, 10]])
    vectors = np.concatenate([m + 0.1 * rng.standard_normal((40, 3)) for m in middles])
    centres = k_means(vectors, 3, seed=2)
    assert centres.shape == (3, 3)
    expected = vectors.reshape(3, 40, 3).mean(1)
    gaps = np.linalg.norm(centres[:, None] - expected[None], axis=-1)
    assert sorted(gaps.argmin(1)) == [0, 1, 2]
    np.testing.assert_allclose(gaps.min(1), 0, atol=1e-4)


def test_k_means_hangs_on_the_seed_alone():
    vectors = np.random.default_rng(3).standard_normal((300, 6))
    np.testing.assert_array_equal(k_means(vectors, 8, seed=5), k_means(vectors, 8, seed=5))
    assert not np.array_equal(k_means(vectors, 8, seed=5), k_means(vectors, 8, seed=6))


def test_never_more_centres_than_vectors():
    vectors = np.array([[1.0, 0], [0, 1]])
    centres = k_means(vectors, 5)
    assert sorted(centres.tolist()) == [[0, 1], [1, 0]]
    np.testing.assert_allclose(k_means(vectors, 1), [[0.5, 0.5]])


def test_k_means_beside_simpleitk():
    """Both are wrapped by SWIG and share its table of types; in a process of its own, as imports stay."""
    program = """
import numpy as np
from semisam_o1.neighbours import k_means
import SimpleITK
assert k_means(np.eye(2), 1).tolist() == [[0.5, 0.5]]
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
