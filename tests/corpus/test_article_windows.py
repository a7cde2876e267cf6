import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reformer_lm.corpus import ArticleWindows, TokenStream, TokenWindows

PAD = 999


def stream_of(lengths: list[int], pieces: int = 1) -> TokenStream:
    """Articles of these lengths, tokens counted through, in some parts."""
    starts = np.cumsum([0, *lengths])
    tokens = np.arange(starts[-1], dtype=np.uint16)
    cuts = np.linspace(0, len(lengths), pieces + 1).astype(int)
    parts = [tokens[starts[first] : starts[last]] for first, last in zip(cuts[:-1], cuts[1:], strict=True)]
    article_starts = [
        starts[first:last].astype(np.int64) - starts[first] for first, last in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    return TokenStream(parts, article_starts)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    pieces=st.integers(1, 3),
    length=st.integers(1, 20),
    stride=st.integers(1, 25),
)
def test_each_article_is_cut_like_a_stream_of_its_own(
    lengths: list[int], pieces: int, length: int, stride: int
) -> None:
    windows = ArticleWindows(stream_of(lengths, pieces), length, stride, PAD)
    expected = []
    start = 0
    for size in lengths:
        article = TokenStream([np.arange(start, start + size, dtype=np.uint16)])
        expected += [window.tolist() for window in TokenWindows(article, length, stride)]
        start += size
    assert [window.tolist() for window in windows] == expected
    assert len(windows) == len(expected)
    assert windows.length == max(map(len, expected))
    assert windows.stride == stride


def test_batches_are_padded_at_the_end_to_their_longest() -> None:
    windows = ArticleWindows(stream_of([3, 1, 6]), 4, 4, PAD)
    assert [window.tolist() for window in windows] == [[0, 1, 2], [3], [4, 5, 6, 7], [6, 7, 8, 9]]
    batch = windows.batch(np.array([1, 0]))
    assert batch.dtype == torch.int64
    assert batch.tolist() == [[3, PAD, PAD], [0, 1, 2]]
    assert windows.batch([3, 1]).tolist() == [[6, 7, 8, 9], [3, PAD, PAD, PAD]]


def test_what_is_not_there_is_refused() -> None:
    windows = ArticleWindows(stream_of([3, 1, 6]), 4, 4, PAD)
    for index in (-1, 4):
        with pytest.raises(IndexError, match=f"window {index} of 4"):
            windows[index]
    with pytest.raises(ValueError, match="length and stride"):
        ArticleWindows(stream_of([3]), 0, 1, PAD)
    empty = ArticleWindows(TokenStream([], []), 4, 4, PAD)
    assert (len(empty), empty.length) == (0, 0)
