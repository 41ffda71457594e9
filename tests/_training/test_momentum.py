"""Momentum copies and the queue of keys, against plain arithmetic and a deque."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_medimb._training.momentum import KeyQueue, follow

# ---------------------------------------------------------------- follow


def layers(seed):
    """Linear layers with batch normalisation whose running means have moved."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    module(torch.randn(8, 3, dtype=torch.float64))
    return module


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def parameters(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.9, 1.0])
def test_copy_moves_a_share_of_the_way(share):
    copy, original = layers(0), layers(1)
    k, q = parameters(copy), parameters(original)
    follow(copy, original, share)
    for name, value in copy.named_parameters():
        expected = (1 - share) * k[name] + share * q[name]
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-15)
        if share in (0.0, 1.0):
            assert torch.equal(value, expected)


def test_original_and_gradients_stay_as_they_were():
    copy, original = layers(0), layers(1)
    before = state(original)
    follow(copy, original, 0.4)
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in copy.parameters())


def test_copy_owns_its_weights():
    copy, original = layers(0), layers(1)
    follow(copy, original, 1.0)
    before = parameters(copy)
    with torch.no_grad():
        original[0].weight += 1
    assert torch.equal(copy[0].weight, before["0.weight"])


def test_running_means_follow_only_if_asked():
    copy, original = layers(0), layers(1)
    original(torch.ones(4, 3, dtype=torch.float64))  # another count of batches
    k, q = state(copy), state(original)
    follow(copy, original, 0.25)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(copy.state_dict()[name], k[name])
    follow(copy, original, 0.25, buffers=True)
    for name in ("1.running_mean", "1.running_var"):
        expected = 0.75 * k[name] + 0.25 * q[name]
        torch.testing.assert_close(copy.state_dict()[name], expected, rtol=0, atol=1e-15)
    assert copy.state_dict()["1.num_batches_tracked"] == k["1.num_batches_tracked"]


# ---------------------------------------------------------------- queue


def held(queue):
    """Keys and labels of the places that are filled."""
    filled = queue.filled()
    return queue.keys[filled], queue.labels[filled]


def content(queue):
    """What the queue holds, as a sorted list of (label, key)."""
    keys, labels = held(queue)
    return sorted(zip(labels.tolist(), map(tuple, keys.tolist()), strict=True))


def numbered_keys(start, n):
    """Keys (i, -i), of class i mod 7."""
    number = torch.arange(start, start + n)
    return torch.stack([number, -number], dim=1).double(), number % 7


def filled_queue(n, size=5):
    queue = KeyQueue(size, 2).double()
    queue.push(*numbered_keys(0, n))
    return queue


def test_queue_starts_empty():
    queue = KeyQueue(5, 2)
    keys, labels = held(queue)
    assert len(held(queue)[0]) == 0
    assert keys.shape == (0, 2)
    assert labels.shape == (0,)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 30])
@pytest.mark.parametrize("pushes", [[3] * 6, [5] * 4, [1, 4, 2, 7, 1, 13, 3], [40, 2, 5, 0, 6]])
def test_queue_keeps_the_latest_keys_like_a_deque(size, pushes):
    queue, expected, n_seen = KeyQueue(size, 2).double(), deque(maxlen=size), 0
    for n in pushes:
        keys, labels = numbered_keys(n_seen, n)
        queue.push(keys, labels)
        expected.extend(zip(labels.tolist(), map(tuple, keys.tolist()), strict=True))
        n_seen += n
        assert len(held(queue)[0]) == len(expected)
        assert content(queue) == sorted(expected)


def test_labels_follow_their_keys_around_the_ring():
    queue, rng, n_seen = KeyQueue(6, 2).double(), np.random.default_rng(0), 0
    for n in rng.integers(1, 10, 40):
        queue.push(*numbered_keys(n_seen, n))
        n_seen += n
        keys, labels = held(queue)
        assert torch.equal(keys[:, 0].long() % 7, labels)
        assert torch.equal(keys[:, 0], -keys[:, 1])


def test_unlabelled_keys_are_all_of_one_class():
    queue = KeyQueue(4, 2).double()
    queue.push(numbered_keys(5, 2)[0])
    assert content(queue) == [(0, (5.0, -5.0)), (0, (6.0, -6.0))]


def test_queue_of_no_places_stays_empty():
    queue = KeyQueue(0, 2).double()
    queue.push(*numbered_keys(0, 3))
    assert len(held(queue)[0]) == 0
    assert content(queue) == []


def test_queue_copies_what_it_is_given():
    queue, (keys, labels) = KeyQueue(4, 2).double(), numbered_keys(0, 3)
    queue.push(keys, labels)
    before = content(queue)
    keys += 100
    labels += 100
    assert content(queue) == before


def test_no_gradient_enters_the_queue():
    queue, (keys, labels) = KeyQueue(4, 2).double(), numbered_keys(1, 3)
    keys = keys.requires_grad_()
    queue.push(2 * keys, labels)
    assert not held(queue)[0].requires_grad
    assert queue.keys.grad_fn is None


def test_queue_takes_keys_of_another_precision():
    queue, (keys, labels) = KeyQueue(4, 2), numbered_keys(0, 3)
    queue.push(keys, labels)
    assert held(queue)[0].dtype == torch.float32
    assert content(queue) == sorted(zip(labels.tolist(), map(tuple, keys.tolist()), strict=True))


def test_queue_trains_nothing():
    assert list(filled_queue(3).parameters()) == []


@pytest.mark.parametrize("n_before", [0, 3, 5, 7, 12])
def test_state_dict_round_trip_goes_on_in_the_same_place(n_before):
    queue = filled_queue(n_before)
    other = KeyQueue(5, 2).double()
    other.load_state_dict(queue.state_dict())
    assert len(held(other)[0]) == len(held(queue)[0])
    assert content(other) == content(queue)
    for one in (queue, other):
        one.push(*numbered_keys(n_before, 3))
    assert content(other) == content(queue)
    assert all(torch.equal(a, b) for a, b in zip(held(queue), held(other), strict=True))


def test_state_of_a_queue_survives_a_safe_file(tmp_path):
    queue = filled_queue(7)
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    other = KeyQueue(5, 2).double()
    other.load_state_dict(torch.load(tmp_path / "queue.pt", weights_only=True))
    assert content(other) == content(queue)
    assert other.n_seen == 7


def test_queue_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        KeyQueue(6, 2).double().load_state_dict(filled_queue(3).state_dict())
