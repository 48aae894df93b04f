"""Uncertainty, the published threshold and the published vote, by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy

from semisam_o1.refinement.votes import Voters, place_vectors, uncertain, volume_votes, vote_labels, voxel_votes
from semisam_o1.report.overlap import mean_dice
from semisam_o1.uncertainty import confidence, entropy


def test_entropy_by_hand():
    columns = [[0.5, 0.5, 0], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.8, 0.1, 0.1]]
    probabilities = torch.tensor(columns).T.reshape(3, 2, 2, 1)
    found = entropy(probabilities)
    assert found.shape == (2, 2, 1)
    by_hand = [math.log(2), 0, math.log(3), -(0.8 * math.log(0.8) + 0.2 * math.log(0.1))]
    np.testing.assert_allclose(found.flatten(), by_hand, atol=1e-6)
    drawn = torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)).softmax(0)
    np.testing.assert_allclose(entropy(drawn), scipy_entropy(drawn.numpy(), axis=0), atol=1e-5)


def test_only_below_the_quantile_is_certain():
    values = [0.1, 0.5, 0.3, 0.2, 0.4]
    # the 0.5 quantile is 0.3, and 0.3 < 0.3 does not hold
    assert uncertain(values, 0.5).tolist() == [False, True, True, False, True]
    # the 0.9 quantile lies between 0.4 and 0.5, at 0.46
    assert uncertain(values, 0.9).tolist() == [False, True, False, False, False]
    assert uncertain(values, 0.0).all()
    assert uncertain([0.2, 0.2, 0.2], 0.9).all()  # none is below: as published
    assert uncertain([0.2], 0.9).tolist() == [True]


def test_volume_votes_by_hand():
    descriptors = np.array([[1, 0], [0.6, 0.8], [0, 1], [-1, 0], [0.8, 0.6]])
    certain = np.array([True, True, True, True, False])
    query = np.array([0.8, 0.6])  # cosines 0.8, 0.96, 0.6, -0.8; the last, itself, is not certain
    index, weights = volume_votes(descriptors, certain, query, 3)
    assert index.tolist() == [1, 0, 2]
    np.testing.assert_allclose(weights, [0.96, 0.8, 0.6])
    index, weights = volume_votes(descriptors, certain, query, 4)
    assert index.tolist() == [1, 0, 2, 3]
    assert weights[3] == 0  # max(cosine, 0)


def test_fewer_certain_than_k_leave_the_label():
    certain = np.array([True, False, True])
    index, weights = volume_votes(np.eye(3), certain, np.eye(3)[1], 3)
    assert index.shape == weights.shape == (0,) and index.dtype.kind == "i"
    alike = np.ones(3) / np.sqrt(3)
    assert volume_votes(np.eye(3), certain, alike, 2)[0].tolist() == [0, 2]  # equals keep their order


def test_neighbours_that_are_opposed_leave_the_label():
    index, weights = volume_votes(-np.eye(3), np.array([True, False, True]), np.ones(3) / np.sqrt(3), 2)
    assert index.shape == weights.shape == (0,)


def test_vote_labels_by_hand():
    one, two, three = (torch.tensor(v).reshape(1, 2, 2) for v in ([0, 1, 2, 2], [0, 1, 1, 0], [1, 0, 1, 0]))
    found = vote_labels([one, two, three], [0.5, 0.4, 0.3], (1, 2, 2), 3)
    # class 0: .9 .3 0 .7, class 1: .3 .9 .7 0, class 2: 0 0 .5 .5
    assert found.tolist() == [[[0, 1], [1, 0]]]
    assert vote_labels([one, two, three], [0.8, 0.4, 0.3], (1, 2, 2), 3).tolist() == [[[0, 1], [2, 2]]]
    assert vote_labels([one, two], [0.5, 0], (1, 2, 2), 3).equal(one)


@pytest.mark.parametrize("shape", [(4, 6, 2), (1, 3, 5), (3, 2, 4)])
def test_neighbours_are_resized_by_nearest_neighbour(shape):
    label = torch.randint(0, 4, (2, 3, 4), generator=torch.Generator().manual_seed(1))
    rows = [[i * small // large for i in range(large)] for small, large in zip(label.shape, shape)]
    found = vote_labels([label], [1.0], shape, 4)
    np.testing.assert_array_equal(found, label.numpy()[np.ix_(*rows)])


def test_mean_dice_by_hand():
    one = torch.tensor([0, 1, 1, 2]).reshape(4, 1, 1)
    other = torch.tensor([1, 1, 0, 2]).reshape(4, 1, 1)
    assert mean_dice(one, other, 3) == pytest.approx((2 * 1 / 4 + 1) / 2)
    assert mean_dice(one, other, 4) == pytest.approx((2 * 1 / 4 + 1 + 1) / 3)  # neither has class 3
    assert mean_dice(one, torch.zeros_like(one), 3) == 0


def test_confidence_is_one_minus_the_share_of_the_largest_entropy():
    probabilities = torch.tensor([[0.5, 1.0, 0.9], [0.5, 0.0, 0.1]])
    by_hand = 1 + (0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)
    np.testing.assert_allclose(confidence(probabilities), [0, 1, by_hand], atol=1e-5)


def test_place_vectors_join_feature_and_weighted_position():
    tokens = torch.arange(4.0).reshape(2, 2, 1, 1)
    points = torch.tensor([[1.0, 2, 3], [4, 5, 6]]).reshape(2, 1, 1, 3)
    assert place_vectors(tokens, points, 0.5).tolist() == [[0, 2, 0.5, 1, 1.5], [1, 3, 2, 2.5, 3]]


def test_voxel_votes_by_hand():
    voters = Voters(
        torch.tensor([[0.0, 0], [1, 0], [3, 0]]),
        torch.tensor([[1.0, 0], [0.25, 0.75], [0, 1]]),
        torch.tensor([1.0, 0.5, 1]),
    )
    found = voxel_votes(voters, torch.tensor([[0.0, 0]]), 2)  # distances 0 and 1, their median 0.5
    near, far = 1.0, math.exp(-2) * 0.5
    np.testing.assert_allclose(found, [[(near + 0.25 * far) / (near + far), 0.75 * far / (near + far)]], rtol=1e-6)
    certain = voters._replace(confidence=torch.tensor([0.0, 0, 1]))
    np.testing.assert_allclose(voxel_votes(certain, torch.tensor([[0.0, 0], [2, 0]]), 3), [[0, 1], [0, 1]], atol=1e-6)
