import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reformer_lm.corpus import EvaluationWindows, TokenStream, TokenWindows, window_order


def stream_of(count: int) -> TokenStream:
    return TokenStream([np.arange(count, dtype=np.uint16)])


def windows_of_gpt2_chinese(tokens: list[int], length: int, stride: int) -> list[list[int]]:
    """The loop of GPT2-Chinese's train.py."""
    start, samples = 0, []
    while start < len(tokens) - length:
        samples.append(tokens[start : start + length])
        start += stride
    if start < len(tokens):
        samples.append(tokens[max(len(tokens) - length, 0) :])
    return samples


@given(count=st.integers(1, 200), length=st.integers(1, 50), data=st.data())
def test_windows_are_those_of_gpt2_chinese(count: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    windows = TokenWindows(stream_of(count), length, stride)
    found = [window.tolist() for window in windows]
    assert found == windows_of_gpt2_chinese(list(range(count)), length, stride)
    assert len(found) == len(windows)


@given(count=st.integers(1, 300), length=st.integers(1, 50), stride=st.integers(1, 80))
def test_windows_have_one_length_and_reach_the_end(count: int, length: int, stride: int) -> None:
    windows = TokenWindows(stream_of(count), length, stride)
    assert {len(window) for window in windows} == {min(length, count)}
    assert windows[len(windows) - 1][-1] == count - 1
    if stride <= length:
        assert {int(token) for window in windows for token in window} == set(range(count))


def test_batch_stacks_windows_as_long_integers() -> None:
    windows = TokenWindows(stream_of(10), 4, 3)
    batch = windows.batch(np.array([2, 0]))
    assert batch.dtype == torch.int64
    assert batch.tolist() == [[6, 7, 8, 9], [0, 1, 2, 3]]


def test_windows_refuse_what_is_not_there() -> None:
    windows = TokenWindows(stream_of(10), 4, 3)
    with pytest.raises(IndexError, match="window 3 of 3"):
        windows[3]
    with pytest.raises(IndexError):
        windows[-1]
    with pytest.raises(ValueError, match="stride"):
        TokenWindows(stream_of(10), 4, 0)
    with pytest.raises(ValueError, match="at least 2"):
        EvaluationWindows(stream_of(10), 1)
    assert len(TokenWindows(stream_of(0), 4, 4)) == 0


@given(count=st.integers(0, 300), length=st.integers(2, 50))
def test_evaluation_predicts_each_token_but_the_first_exactly_once(count: int, length: int) -> None:
    windows = EvaluationWindows(stream_of(count), length)
    predicted = [int(token) for window in windows for token in window[1:]]
    assert predicted == list(range(1, count))
    assert windows.scored_tokens == len(predicted)
    assert all(2 <= len(window) <= length for window in windows)


@given(count=st.integers(0, 100), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_order_is_a_permutation_of_its_arguments_alone(count: int, seed: int, epoch: int) -> None:
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    order = window_order(count, seed, epoch)
    assert sorted(order) == list(range(count))
    np.random.seed(epoch)
    assert np.array_equal(order, window_order(count, seed, epoch))
    np.random.set_state(("MT19937", np.array(before[1], dtype=np.uint32), 624))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_order_changes_with_seed_and_epoch() -> None:
    orders = {tuple(window_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(sizes=st.lists(st.integers(0, 6), max_size=6), data=st.data())
def test_stream_reads_across_its_parts(sizes: list[int], data: st.DataObject) -> None:
    total = sum(sizes)
    whole = np.arange(total, dtype=np.uint16)
    stream = TokenStream(np.split(whole, np.cumsum(sizes)[:-1]) if sizes else [])
    assert len(stream) == total
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    assert stream.read(start, stop).tolist() == whole[start:stop].tolist()
    with pytest.raises(IndexError):
        stream.read(start, total + 1)
