"""One long sequence of token ids, kept in several arrays that may be memory-mapped files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np


class TokenStream:
    """The articles of a corpus, joined end to end.

    Args:
        parts: Arrays of token ids, in order; their concatenation is the stream. They are never copied whole,
            so memory-mapped files stay on disk.
        article_starts: For each part, where its articles start, counted from the start of that part.
    """

    def __init__(self, parts: Sequence[np.ndarray], article_starts: Sequence[np.ndarray] | None = None) -> None:
        self._parts = list(parts)
        self._starts = [0, *accumulate(len(part) for part in self._parts)]
        self._article_starts = list(article_starts) if article_starts is not None else []

    def __len__(self) -> int:
        """Number of tokens."""
        return self._starts[-1]

    @property
    def num_articles(self) -> int:
        """Number of articles."""
        return sum(len(starts) for starts in self._article_starts)

    def article_start(self, index: int) -> int:
        """Position in the stream of the first token of article ``index``."""
        remaining = index
        for part_start, starts in zip(self._starts, self._article_starts, strict=False):
            if 0 <= remaining < len(starts):
                return part_start + int(starts[remaining])
            remaining -= len(starts)
        raise IndexError(f"article {index} of {self.num_articles}")

    def all_article_starts(self) -> np.ndarray:
        """Positions in the stream of the first tokens of all articles: int64 [articles]."""
        parts = [starts + part for part, starts in zip(self._starts, self._article_starts, strict=False)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Copy the tokens ``start`` to ``stop`` (exclusive) out of the stream.

        Args:
            start: First position, 0 or more.
            stop: One past the last position, at most ``len(self)``.

        Returns:
            Array [stop - start] in the stream's own integer type.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        pieces = []
        part = bisect_right(self._starts, start) - 1
        while start < stop:
            taken = self._parts[part][start - self._starts[part] : stop - self._starts[part]]
            pieces.append(taken)
            start += len(taken)
            part += 1
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
