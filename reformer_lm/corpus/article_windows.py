"""Windows that begin where articles begin, padded where these are short."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from reformer_lm.corpus.stream import TokenStream


class ArticleWindows(Dataset[Tensor]):
    """Windows of at most a length, none of which reaches from one article into the next, for training.

    An article of ``length`` tokens or fewer is one window. A longer one is cut like a stream of its own, as
    `TokenWindows` would: a window every ``stride`` tokens, the last one moved back so that it ends where the article
    ends. Memory: 16 bytes an article.

    Args:
        stream: The tokens, with the starts of its articles.
        length: Tokens per window, at least 1.
        stride: Tokens between the starts of neighbouring windows of an article, at least 1.
        pad_id: The token that fills up shorter windows of a batch.
    """

    def __init__(self, stream: TokenStream, length: int, stride: int, pad_id: int) -> None:
        if length < 1 or stride < 1:
            raise ValueError(f"length and stride must be at least 1, got {length} and {stride}")
        self.stream = stream
        self.stride = stride
        self.pad_id = pad_id
        self._starts = stream.all_article_starts()
        lengths = np.diff(self._starts, append=len(stream))
        self.length = min(length, int(lengths.max(initial=0)))
        # Rounded up: the rest of an article gets a window of its own.
        further = -(-np.maximum(lengths - length, 0) // stride)
        self._window_stops = np.cumsum(further + 1)

    def __len__(self) -> int:
        """Number of windows."""
        return int(self._window_stops[-1]) if len(self._window_stops) else 0

    def __getitem__(self, index: int) -> Tensor:
        """Tokens of window ``index``, without padding: LongTensor [1 to length]."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        article = int(np.searchsorted(self._window_stops, index, side="right"))
        start = int(self._starts[article])
        stop = int(self._starts[article + 1]) if article + 1 < len(self._starts) else len(self.stream)
        if stop - start > self.length:
            number = index - (int(self._window_stops[article - 1]) if article else 0)
            start = min(start + number * self.stride, stop - self.length)
            stop = start + self.length
        return torch.from_numpy(self.stream.read(start, stop).astype(np.int64))

    def batch(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Several windows as rows: LongTensor [len(indices), longest of them], padded at the end."""
        windows = [self[int(index)] for index in indices]
        return torch.nn.utils.rnn.pad_sequence(windows, batch_first=True, padding_value=self.pad_id)
