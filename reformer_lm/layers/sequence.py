"""What every layer knows of the sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from reformer_lm.cache import LSHCache
from reformer_lm.layers.positions import rotary_factors


@dataclass(frozen=True)
class SequenceInfo:
    """What every layer knows of the sequence besides the hidden states.

    Attributes:
        position_ids: int64 [B or 1, T].
        mask: optional bool [B, T], True for real tokens, which come first in each row. Needed in chunked mode only: in
            causal mode padding stands behind the last real token, where nothing real can see it.
        documents: optional int64 [B, T], constant over each document; tokens see their own document only.
        attention_mask: optional bool [B or 1, T, T], True where a query may see a key; chunked mode only.
        context: optional [B, C, hidden_size], vectors of another sequence that every token sees.
        context_mask: optional bool [B, C], False for padding of the context.
        hash_step: number of the training step with ``rehash="step"``, else None (fixed rotations).
        cache: the tokens before these, which they then join; None where these are the first and none will follow.
        counts: int64 [B], with a cache: how many of the T tokens are real in each row, the first ones.
    """

    position_ids: Tensor
    mask: Tensor | None = None
    documents: Tensor | None = None
    attention_mask: Tensor | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None
    hash_step: int | None = None
    cache: LSHCache | None = None
    counts: Tensor | None = None
    _rotary: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, repr=False)
    _rows: list[tuple[Tensor, int, Tensor | None]] = field(default_factory=list, repr=False)

    def rotary(self, dim: int, dtype: torch.dtype) -> Tensor:
        """`rotary_factors` of these positions for vectors of a dtype, computed once for all layers."""
        key = (dim, torch.promote_types(dtype, torch.float32))
        if key not in self._rotary:
            self._rotary[key] = rotary_factors(self.position_ids, *key)
        return self._rotary[key]

    def rows_by_length(self) -> list[tuple[Tensor, int, Tensor | None]]:
        """Rows that have as many tokens, and see as much of the context, as each other; found once for all layers.

        Returns:
            For each such group the rows (int64 [n]), how many tokens they have (at least 1), and the columns of the
            context that each sees (int64 [n, c]; None without a context).
        """
        if not self._rows:
            given = [mask for mask in (self.mask, self.context_mask) if mask is not None]
            device = given[0].device
            batch = given[0].shape[0]
            lengths = [self.position_ids.shape[1]] * batch if self.mask is None else self.mask.sum(dim=1).tolist()
            seen = self.context_mask
            if seen is None and self.context is not None:
                seen = torch.ones(self.context.shape[:2], dtype=torch.bool, device=device)
            counts = [0] * batch if seen is None else seen.sum(dim=1).tolist()
            # Columns that are seen first, in their order.
            order = None if seen is None else torch.sort(seen.byte(), dim=1, descending=True, stable=True).indices
            groups: dict[tuple[int, int], list[int]] = {}
            for row, key in enumerate(zip(lengths, counts, strict=True)):
                groups.setdefault(key, []).append(row)
            for (length, count), members in groups.items():
                rows = torch.tensor(members, device=device)
                if length:
                    self._rows.append((rows, length, None if order is None else order[rows, :count]))
        return self._rows
