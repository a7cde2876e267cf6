"""Cut a stream of tokens into the windows that a model sees.

Training takes windows by a stride, in GPT2-Chinese's way, in an order that depends on seed and epoch alone.
Evaluation takes windows that score every token exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from reformer_lm.corpus.stream import TokenStream


class TokenWindows(Dataset[Tensor]):
    """Windows of equal length over a token stream, for training.

    Window ``i`` starts at token ``i * stride``; the last one is moved back so that it ends where the stream
    ends, so no token is left out (unless a stride above ``length`` skips some on purpose). A stream shorter
    than one window gives one short window.

    Args:
        stream: The tokens.
        length: Tokens per window, at least 1.
        stride: Tokens between the starts of neighbouring windows, at least 1. ``length`` gives no overlap;
            less shows each token several times per epoch, with different context.
    """

    def __init__(self, stream: TokenStream, length: int, stride: int) -> None:
        if length < 1 or stride < 1:
            raise ValueError(f"length and stride must be at least 1, got {length} and {stride}")
        self.stream = stream
        self.length = min(length, len(stream))
        self.stride = stride

    def __len__(self) -> int:
        """Number of windows."""
        if not self.length:
            return 0
        # Rounded up: the rest of the stream gets a window of its own.
        return -(-(len(self.stream) - self.length) // self.stride) + 1

    def start(self, index: int) -> int:
        """Position in the stream of the first token of window ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return min(index * self.stride, len(self.stream) - self.length)

    def __getitem__(self, index: int) -> Tensor:
        """Tokens of window ``index``: LongTensor [length]."""
        start = self.start(index)
        return _as_tensor(self.stream.read(start, start + self.length))

    def batch(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Several windows as rows: LongTensor [len(indices), length]."""
        return torch.stack([self[int(index)] for index in indices])


class EvaluationWindows(Dataset[Tensor]):
    """Windows that predict every token of a stream exactly once, but for the first, which nothing precedes.

    A model predicts the tokens of a window from the second on. So neighbours share one token: the last of one
    window, already scored, is the first context of the next. The last window may be shorter.

    Args:
        stream: The tokens.
        length: Tokens per window, at least 2.
    """

    def __init__(self, stream: TokenStream, length: int) -> None:
        if length < 2:
            raise ValueError(f"length must be at least 2 (one token of context and one to predict), got {length}")
        self.stream = stream
        self.length = length

    @property
    def scored_tokens(self) -> int:
        """Number of tokens that get a prediction."""
        return max(len(self.stream) - 1, 0)

    def __len__(self) -> int:
        """Number of windows."""
        return -(-self.scored_tokens // (self.length - 1))

    def __getitem__(self, index: int) -> Tensor:
        """Tokens of window ``index``: LongTensor [2 to length]."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * (self.length - 1)
        return _as_tensor(self.stream.read(start, min(start + self.length, len(self.stream))))


def window_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Order in which an epoch visits its windows.

    A function of its arguments alone: no global random state is read or moved, so a resumed run finds its
    place.

    Args:
        count: Number of windows.
        seed: The run's seed, 0 or more.
        epoch: Number of the epoch, counted from 0.

    Returns:
        A permutation of ``range(count)``, int64 [count].
    """
    return np.random.default_rng([seed, epoch]).permutation(count)


def _as_tensor(tokens: np.ndarray) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64))
