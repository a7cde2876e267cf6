"""Cutting texts into windows, and windows into batches."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from reformer_lm.layers.linear import FEW_ROWS
from reformer_lm.scoring.batches import (
    LEAST_TOKENS,
    Window,
    cut_windows,
    padded_length,
    plan_batches,
    rows_to_run,
)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    extra=st.lists(st.integers(1, 300), max_size=40),
    batch_size=st.integers(1, 20),
)
def test_padding_depends_on_a_windows_own_length(lengths, extra, batch_size):
    def padded(all_lengths: Sequence[int]) -> dict[int, int]:
        windows = [Window(index, [0] * n, [0] * n, 0, n) for index, n in enumerate(all_lengths)]
        batches = plan_batches(windows, batch_size, longest=300)
        placed = [window.text_index for batch in batches for window in batch.windows]
        assert sorted(placed) == list(range(len(all_lengths)))
        for batch in batches:
            assert 1 <= len(batch.windows) <= batch_size
            assert max(len(window.inputs) for window in batch.windows) <= batch.length <= 300
        return {window.text_index: batch.length for batch in batches for window in batch.windows}

    alone = [padded([length])[0] for length in lengths]
    together = padded([*lengths, *extra])
    assert [together[index] for index in range(len(lengths))] == alone


@given(length=st.integers(1, 100_000))
def test_padding_is_little_and_to_a_multiple_of_four(length):
    padded = padded_length(length)
    assert length <= padded
    assert padded % 4 == 0
    assert padded - length < max(4, length / 8 + 1)


@given(rows=st.integers(1, 100), length=st.integers(1, 100))
def test_a_forward_pass_has_a_power_of_two_of_rows_and_never_few_tokens(rows, length):
    filled = rows_to_run(rows, length)
    assert filled.bit_count() == 1
    assert filled * length > FEW_ROWS
    assert filled < 2 * rows or filled * length < 2 * LEAST_TOKENS + length


@given(count=st.integers(1, 500), length=st.sampled_from([20, 64, 256, 1024, 4096]), batch_size=st.integers(4, 300))
def test_batches_of_one_length_waste_little(count, length, batch_size):
    windows = [Window(index, [0] * length, [0] * length, 0, length) for index in range(count)]
    batches = plan_batches(windows, batch_size, longest=4096)
    assert [w.text_index for batch in batches for w in batch.windows] == list(range(count))
    rows = [rows_to_run(len(batch.windows), length) for batch in batches]
    assert max(rows) <= max(4, min(batch_size, 4096 // length))
    assert (sum(rows) - count) * length < 512
    assert len(set(rows)) <= 8


def test_chunked_attention_is_never_padded():
    windows = [Window(0, [0] * length, [0] * length, 0, length) for length in (5, 7, 7, 20)]
    batches = plan_batches(windows, batch_size=4, longest=32, pad=False)
    assert [(len(batch.windows), batch.length) for batch in batches] == [(1, 5), (2, 7), (1, 20)]


@given(count=st.integers(0, 60), window=st.integers(1, 20), data=st.data())
def test_windows_score_every_token_once(count, window, data):
    context = data.draw(st.integers(1, window))
    sequence = list(range(100, 101 + count))
    windows = cut_windows(7, sequence, window, context)
    scored = [index for piece in windows for index in range(piece.first_scored, piece.end_scored)]
    assert scored == list(range(count))
    assert len(windows) == (0 if count == 0 else 1) or count > window
    for number, piece in enumerate(windows):
        assert piece.text_index == 7
        assert 1 <= len(piece.inputs) <= window
        assert [token + 1 for token in piece.inputs] == list(piece.targets)
        # The last target is the last scored token, and before the first there is the context asked for.
        assert piece.targets[-1] == sequence[piece.end_scored]
        unscored = len(piece.inputs) - (piece.end_scored - piece.first_scored)
        assert unscored == (0 if number == 0 else context - 1)
