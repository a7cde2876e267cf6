"""Language models of known probabilities, and texts for them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import nn

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
HANZI = "甲乙丙丁山水云风花雪月春夏秋冬天地人"
PAD, UNKNOWN, END, NEWLINE, BEGIN = range(5)
FIRST, SECOND, THIRD, FOURTH = range(5, 9)


def random_texts(lengths: Sequence[int], seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return ["".join(HANZI[i] for i in torch.randint(len(HANZI), (length,), generator=generator)) for length in lengths]


class BigramModel(nn.Module):
    """A language model of known probabilities: row i holds those of the token after token i.

    After a token without a row, padding for one, nothing is possible, and the likelihood of what follows is
    nan. It remembers the shapes that it was asked for.
    """

    def __init__(self, rows: dict[int, dict[int, float]], size: int, window: int, dtype: torch.dtype) -> None:
        super().__init__()
        table = torch.zeros(size, size, dtype=torch.float64)
        for token, following in rows.items():
            for successor, probability in following.items():
                table[token, successor] = probability
        self.log_probabilities = table.log().to(dtype)
        self.config = SimpleNamespace(max_position_embeddings=window)
        self.shapes: list[tuple[int, int]] = []

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        assert input_ids.shape[1] <= self.config.max_position_embeddings
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.log_probabilities[input_ids])


def bigram(window: int = 16, dtype: torch.dtype = torch.float64) -> BigramModel:
    rows = {
        BEGIN: {FIRST: 1 / 2, SECOND: 1 / 4, THIRD: 1 / 4},
        FIRST: {SECOND: 1 / 8, FIRST: 1 / 2, END: 1 / 4, UNKNOWN: 1 / 8},
        SECOND: {FIRST: 1 / 2, THIRD: 1 / 2},
        THIRD: {THIRD: 1 / 16, FIRST: 7 / 16, NEWLINE: 1 / 2},
        NEWLINE: {FIRST: 1.0},
        UNKNOWN: {UNKNOWN: 1.0},
    }
    return BigramModel(rows, size=5 + len(HANZI), window=window, dtype=dtype)
