"""How the places of a hash round are laid out for FlexAttention, and which blocks of them hold allowed pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Places in a block of the mask. The kernels' own tiles, of 16 to 128 places, must divide it.
BLOCK = 128


class BlockLists(NamedTuple):
    """Which blocks hold an allowed pair, as FlexAttention takes it: int32, at most M listed for each of N blocks.

    Attributes:
        key_counts: [1, 1, N], for each block of queries how many blocks of keys it sees.
        keys: [1, 1, N, M], which.
        query_counts: [1, 1, N], for each block of keys how many blocks of queries see it.
        queries: [1, 1, N, M], which.
    """

    key_counts: Tensor
    keys: Tensor
    query_counts: Tensor
    queries: Tensor


def window_block_lists(blocks: int, blocks_per_row: int, window: int, device: torch.device) -> BlockLists:
    """Lists, for each block, itself and the blocks of its row that its window of ``window`` places reaches back to.

    Args:
        blocks: N, of all rows together.
        blocks_per_row: how many blocks a row takes; what is left at the end makes a row of its own.
        window: W, in places.
        device: where the lists are wanted.
    """
    # The first place of a block looks W places back, and nobody farther than a row. M = reach + 1 is compiled in: it
    # follows from the window, and where rows are shorter takes few values only, next to powers of two.
    reach = min(-(-window // BLOCK), 1 << max(0, blocks_per_row - 2).bit_length())
    own = torch.arange(blocks, dtype=torch.int32, device=device).view(1, 1, -1)
    row_begin = own - own % blocks_per_row
    first = torch.maximum(own - reach, row_begin)
    last = torch.minimum(own + reach, row_begin + blocks_per_row - 1).clamp_max_(blocks - 1)
    columns = torch.arange(reach + 1, dtype=torch.int32, device=device)
    # Behind its end a list repeats its last block: never read, and in any case a block that exists.
    keys = torch.minimum(first.unsqueeze(-1) + columns, own.unsqueeze(-1))
    queries = torch.minimum(own.unsqueeze(-1) + columns, last.unsqueeze(-1))
    # None of the four is a view: the compiler would go by the sizes of what it is a view of, too.
    return BlockLists(own - first + 1, keys, last - own + 1, queries)


class Layout:
    """How the n rows of a slice lie one behind the other, in N blocks of P places together.

    A row of T tokens is followed by filling up to whole blocks; filling stands for the row's first token, sees itself
    only, and nobody else sees it. There are never fewer than two blocks, since torch compiles apart for a size of one.

    Attributes:
        block_lists: see `window_block_lists`.
    """

    def __init__(self, rows: int, tokens: int, window: int, device: torch.device) -> None:
        # A window longer than the sequence means the sequence.
        self._tokens, self._window = tokens, min(window, tokens)
        blocks_per_row = -(-tokens // BLOCK)
        blocks = max(2, rows * blocks_per_row)
        self._place = torch.arange(blocks * BLOCK, device=device)
        self._place_in_row = self._place[: blocks_per_row * BLOCK].expand(rows, -1)
        self._row = torch.arange(rows, device=device).unsqueeze(1)
        self.block_lists = window_block_lists(blocks, blocks_per_row, window, device)

    def tokens_in(self, order: Tensor) -> Tensor:
        """For each place the token that stands there, in the rows laid end to end: [P] from order [n, T]."""
        index = torch.zeros_like(self._place_in_row, memory_format=torch.contiguous_format)
        index[:, : self._tokens] = order
        return self._fill_up(index + self._row * self._tokens, torch.zeros_like(self._place))

    def places_of(self, inverse: Tensor) -> Tensor:
        """For each token of the rows laid end to end its place: [n * T] from inverse [n, T]."""
        return (inverse + self._row * self._place_in_row.shape[1]).flatten()

    def lowest(self, start: Tensor) -> Tensor:
        """The first place that each place sees, itself where it sees no other: int32 [P] from start [n, T]."""
        lowest = self._place_in_row.clone(memory_format=torch.contiguous_format)
        lowest[:, : self._tokens] = torch.maximum(start, lowest[:, : self._tokens] - self._window)
        return self._fill_up(lowest + self._row * lowest.shape[1], self._place).int()

    def has_match(self, lowest: Tensor) -> Tensor:
        """Whether each place sees another than itself: bool [P]."""
        return lowest < self._place

    def _fill_up(self, x: Tensor, filling: Tensor) -> Tensor:
        return torch.cat((x.flatten(), filling[x.numel() :]))
