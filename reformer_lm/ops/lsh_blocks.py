"""One hash round in sorted order, cut into blocks of queries with the keys they may see.

The rows of a slice stand end to end: W places of filling, then each row's tokens in sorted order, filled up to whole
blocks. A block of Q queries sees the W places before it and itself, K = W + Q places, so the keys of all blocks are one
overlapping view of the gathered tensor. What a block sees of the row before its own, or of the filling, is masked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from reformer_lm.ops.keys import SELF_ATTENTION_BIAS

# Queries in a block: fewer waste less on masked keys, more make larger matrix products.
QUERIES_PER_BLOCK = 64

# A logsumexp (base 2, like the logits) below this says that a token met only itself.
NO_MATCH = SELF_ATTENTION_BIAS / 2


# Most elements of a table of masks that is worth keeping; see `_mask_table`.
_LARGEST_TABLE = 1 << 22


class SortedRound:
    """The layout of one round of a slice of n rows.

    Args:
        order: int64 [n, T], positions in sorted order.
        start: int64 [n, T], first place of each place's bucket.
        window: W.
        earlier: the rounds before this one, where keys they already gave do not count again.

    Attributes:
        index: int64 [W + n * L], for each place the token that stands there, in the rows laid end to end; L is T filled
            up to whole blocks.
        places: n * L.
    """

    def __init__(self, order: Tensor, start: Tensor, window: int, earlier: tuple[SortedRound, ...] = ()) -> None:
        self.window = window
        self.earlier = earlier
        self.rows, self.tokens = order.shape
        # Not more queries than tokens; the power of two keeps matrix products aligned.
        self.queries_per_block = min(QUERIES_PER_BLOCK, 1 << (self.tokens - 1).bit_length())
        self.keys_per_block = window + self.queries_per_block
        self.blocks_per_row = -(-self.tokens // self.queries_per_block)
        self.length = self.blocks_per_row * self.queries_per_block
        self.blocks = self.rows * self.blocks_per_row
        self.places = self.rows * self.length
        device = order.device
        row_begin = torch.arange(self.rows, device=device).unsqueeze(1) * self.tokens
        self._place = torch.arange(self.length, device=device)
        filling = self.length - self.tokens
        absolute = order + row_begin
        if filling:
            # Filling stands for the row's first token, sees itself only, and nobody sees it.
            absolute = torch.cat((absolute, row_begin.expand(-1, filling)), dim=1)
            start = torch.cat((start, self._place[self.tokens :].expand(self.rows, -1)), dim=1)
        self.index = torch.cat((absolute.new_zeros(window), absolute.flatten()))
        # First place that each place may see.
        self.lowest = torch.maximum(start, self._place - window).flatten()
        self._by_token_cache: tuple[Tensor, Tensor] | None = None

    def back(self, inverse: Tensor) -> Tensor:
        """For each token, in the rows laid end to end, its place: int64 [n * T], from ``inverse`` [n, T]."""
        begin = torch.arange(self.rows, device=inverse.device).unsqueeze(1) * self.length
        return (inverse + begin).flatten()

    def by_token(self) -> tuple[Tensor, Tensor]:
        """Place, and first place that may be seen, of each token in the rows laid end to end, [n * T] each."""
        if self._by_token_cache is None:
            index = self.index[self.window :].view(self.rows, self.length)[:, : self.tokens].flatten()
            place, lowest = torch.empty_like(index), torch.empty_like(index)
            place[index] = self._place[: self.tokens].expand(self.rows, -1).flatten()
            lowest[index] = self.lowest.view(self.rows, self.length)[:, : self.tokens].flatten()
            self._by_token_cache = (place, lowest)
        return self._by_token_cache

    def groups(self, logit_elements: int) -> Iterator[BlockGroup]:
        """Cuts the blocks into groups of about so many logits."""
        step = max(1, logit_elements // (self.queries_per_block * self.keys_per_block))
        for begin in range(0, self.blocks, step):
            yield BlockGroup(self, begin, min(begin + step, self.blocks))


class BlockGroup:
    """Some neighbouring blocks of a round, c of them, with the W places before them.

    Attributes:
        index: int64 [W + c * Q], the tokens at these places.
        places: where the queries of the group stand among those of the round.
    """

    def __init__(self, sorted_round: SortedRound, begin: int, end: int) -> None:
        self.round, self.begin, self.count = sorted_round, begin, end - begin
        self.window = sorted_round.window
        q = self.queries_per_block = sorted_round.queries_per_block
        self.keys_per_block = sorted_round.keys_per_block
        self.places = slice(begin * q, end * q)
        self.index = sorted_round.index[begin * q : end * q + self.window]

    def gather(self, x: Tensor) -> Tensor:
        """Rows of x [n * T, D] in sorted order: [W + c * Q, D]."""
        return x.index_select(0, self.index)

    def of_queries(self, x: Tensor) -> Tensor:
        """Entries of x [n * T] for the queries: [c, Q]."""
        return x.index_select(0, self.index[self.window :]).view(self.count, -1)

    def queries(self, gathered: Tensor) -> Tensor:
        """[W + c * Q, D] (columns of a wider tensor) -> [c, Q, D], a view."""
        return self._view(gathered, self.window, self.queries_per_block)

    def keys(self, gathered: Tensor) -> Tensor:
        """[W + c * Q, D] (columns of a wider tensor) -> [c, K, D], an overlapping view."""
        return self._view(gathered, 0, self.keys_per_block)

    def _view(self, x: Tensor, first: int, length: int) -> Tensor:
        """[c, length, D]: for each block the rows from ``first`` on."""
        stride = x.stride(0)
        return x.as_strided(
            (self.count, length, x.shape[1]),
            (self.queries_per_block * stride, stride, 1),
            x.storage_offset() + first * stride,
        )

    def set_keys(self, total: Tensor, grad: Tensor) -> None:
        """The transpose of `keys`: total [W + c * Q, D] becomes the sum of grad [c, K, D] over the blocks."""
        total[: self.window] = 0.0
        # Each row is first written by the block it belongs to; the rows before a block belong to others.
        self._view(total, self.window, self.queries_per_block).copy_(grad[:, self.window :])
        for end in range(self.window, 0, -self.queries_per_block):
            begin = max(0, end - self.queries_per_block)
            self._view(total, begin, end - begin).add_(grad[:, begin:end])

    def bias(self, dtype: torch.dtype) -> Tensor:
        """What is added to the logits, in base 2: [c, Q, K].

        0 where allowed; -5e4 on the token itself, which keeps a row without a match finite and is exactly 0
        after the softmax in any other; -inf elsewhere.
        """
        q, k, window = self.queries_per_block, self.keys_per_block, self.window
        device = self.index.device
        block = torch.arange(self.begin, self.begin + self.count, device=device)
        # Column 0 of a block's keys stands W places before its first query.
        first_place = (block % self.round.blocks_per_row * q - window).unsqueeze(1)
        lowest = self.round.lowest[self.places].view(self.count, q) - first_place
        if q * (k + 1) * k <= _LARGEST_TABLE:
            # Copying rows of a table is several times faster than comparing every column.
            row = lowest + torch.arange(0, q * (k + 1), k + 1, device=device)
            bias = _mask_table(window, q, dtype, device).index_select(0, row.flatten()).view(-1, q, k)
        else:
            columns = torch.arange(k, device=device)
            bias = torch.where(columns < lowest.unsqueeze(-1), -math.inf, _triangle(window, q, dtype, device))
        for other in self.round.earlier:
            bias.masked_fill_(self._given_by(other), -math.inf)
        return bias

    def _given_by(self, other: SortedRound) -> Tensor:
        """Which pairs another round already has, bool [c, Q, K]."""
        place, lowest = other.by_token()
        keys = self.keys(place.index_select(0, self.index).unsqueeze(1)).transpose(1, 2)
        own, first = self.of_queries(place).unsqueeze(-1), self.of_queries(lowest).unsqueeze(-1)
        # Strictly before: the token itself is masked by its own rule.
        return (keys >= first) & (keys < own)


def _triangle(window: int, queries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The part of the bias that is the same in every block, [Q, K]: no later token, and itself only if need be."""
    column = torch.arange(window + queries, device=device)
    own = torch.arange(window, window + queries, device=device).unsqueeze(1)
    bias = torch.zeros(queries, window + queries, dtype=dtype, device=device)
    bias.masked_fill_(column == own, SELF_ATTENTION_BIAS)
    return bias.masked_fill_(column > own, -math.inf)


@functools.lru_cache(maxsize=8)
def _mask_table(window: int, queries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every row that a bias can have: [Q * (K + 1), K], by query and the first column it may see."""
    keys = window + queries
    column = torch.arange(keys, device=device)
    hidden = column < torch.arange(keys + 1, device=device).unsqueeze(1)
    table = _triangle(window, queries, dtype, device).unsqueeze(1).expand(-1, keys + 1, -1)
    return table.masked_fill(hidden, -math.inf).flatten(0, 1)
