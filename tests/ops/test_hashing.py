"""Hashing and sorting: deterministic, prefix-stable, independent of the global random state."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reformer_lm.ops.hashing import (
    factorize_buckets,
    hash_next,
    hash_vectors,
    sample_rotations,
    sort_by_bucket,
    stack_rotations,
)


def test_hash_is_the_argmax_of_the_projection_and_its_negative() -> None:
    x = torch.randn(2, 3, 50, 8, dtype=torch.float64)
    (rotation,) = sample_rotations(3, 8, 4, (6,), seed=1)
    buckets = hash_vectors(x, (rotation,))
    for b, h, r, t in [(0, 0, 0, 0), (1, 2, 3, 49), (0, 1, 2, 17), (1, 0, 1, 30)]:
        projected = x[b, h, t] @ rotation[h, :, r].double()
        assert buckets[b, h, r, t] == torch.cat((projected, -projected)).argmax()


def test_factorised_hash_combines_two_smaller_ones() -> None:
    x = torch.randn(1, 2, 40, 8)
    rotations = sample_rotations(2, 8, 3, (4, 6), seed=2)
    first, second = (hash_vectors(x, (rotation,)).long() for rotation in rotations)
    assert torch.equal(hash_vectors(x, rotations).long(), first * 6 + second)


@given(st.integers(1, 4000).map(lambda half: 2 * half))
def test_factors_are_even_and_cover_the_number(num_buckets: int) -> None:
    factors = factorize_buckets(num_buckets)
    assert all(factor % 2 == 0 for factor in factors)
    assert math.prod(factors) >= num_buckets
    assert max(factors) <= 128 or num_buckets > 128 * 128
    # Rounding up a product again changes nothing, so a saved configuration loads as it is.
    assert factorize_buckets(math.prod(factors)) == factors


@pytest.mark.parametrize("num_buckets", [0, 1, 7, -2])
def test_odd_numbers_of_buckets_are_refused(num_buckets: int) -> None:
    with pytest.raises(ValueError, match="even"):
        factorize_buckets(num_buckets)


def test_more_buckets_than_int16_holds() -> None:
    x = torch.randn(1, 1, 2000, 16)
    factors = factorize_buckets(65536)
    buckets = hash_vectors(x, sample_rotations(1, 16, 1, factors, seed=0))
    assert buckets.dtype == torch.int32
    assert int(buckets.min()) >= 0
    assert int(buckets.max()) < math.prod(factors)
    assert int(buckets.max()) > 32767


def test_rotations_neither_read_nor_change_the_global_random_state() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = sample_rotations(2, 4, 2, (8,), seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    second = sample_rotations(2, 4, 2, (8,), seed=5)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], sample_rotations(2, 4, 2, (8,), seed=6)[0])


def test_zero_vectors_hash_without_nan() -> None:
    buckets = hash_vectors(torch.zeros(1, 1, 5, 4), sample_rotations(1, 4, 2, (4,), seed=0))
    assert torch.equal(buckets, torch.zeros_like(buckets))


def test_pieces_of_a_long_sequence_hash_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 100, 8, dtype=torch.float64)
    rotations = sample_rotations(2, 8, 2, (8,), seed=0)
    whole = hash_vectors(x, rotations)
    monkeypatch.setattr("reformer_lm.ops.hashing._MAX_PROJECTION_ELEMENTS", 2 * 2 * 4 * 7)
    assert torch.equal(hash_vectors(x, rotations), whole)


def test_hash_is_taken_in_float32_under_autocast() -> None:
    x = torch.randn(1, 2, 500, 16)
    rotations = sample_rotations(2, 16, 2, (32,), seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = hash_vectors(x, rotations)
    assert torch.equal(inside, hash_vectors(x, rotations))


@given(
    batch=st.integers(1, 4),
    heads=st.integers(1, 3),
    rounds=st.integers(1, 4),
    factors=st.lists(st.integers(1, 9).map(lambda half: 2 * half), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 2**31),
)
def test_one_vector_hashes_as_among_many(
    batch: int, heads: int, rounds: int, factors: tuple[int, ...], seed: int
) -> None:
    x = torch.randn(batch, heads, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[0, 0, 0] = 0
    rotations = sample_rotations(heads, 8, rounds, factors, seed)
    expected = hash_vectors(x, rotations)
    for t in range(5):
        found = hash_next(x[:, :, t : t + 1], stack_rotations(rotations))
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected[..., t : t + 1])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_sorted_order_start_and_inverse(buckets: list[int]) -> None:
    order, inverse, start = sort_by_bucket(torch.tensor(buckets, dtype=torch.int16))
    expected = sorted(range(len(buckets)), key=lambda t: (buckets[t], t))
    assert order.tolist() == expected
    assert order[inverse].tolist() == list(range(len(buckets)))
    in_order = [buckets[t] for t in expected]
    assert start.tolist() == [in_order.index(bucket) for bucket in in_order]
