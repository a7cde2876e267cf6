"""Where the real tokens of a padded or packed batch stand."""

from __future__ import annotations

import torch
from torch import Tensor


def document_positions(tokens: int, document_ids: Tensor | None, device: torch.device) -> Tensor:
    """Positions that count from 0, in each document anew.

    Args:
        tokens: T.
        document_ids: int64 [B, T], the same within a document, or None.
        device: where they are needed.

    Returns:
        int64 [B or 1, T].
    """
    positions = torch.arange(tokens, device=device).unsqueeze(0)
    if document_ids is None:
        return positions
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return positions - torch.where(begins, positions, 0).cummax(dim=1).values


class Compaction:
    """Moves the real tokens of each row to its front, and back.

    The model is causal, so what stands behind the last real token cannot reach any of them: with the padding there,
    every row is computed as if it were alone.
    """

    def __init__(self, real: Tensor) -> None:
        self.real = real
        self.longest = max(1, int(real.sum(dim=1).max()))
        # Stable: real tokens first, each kind in its own order.
        order = torch.sort(real.to(torch.uint8), dim=1, descending=True, stable=True).indices
        self.order = order[:, : self.longest]
        self.mask = real.gather(1, self.order)

    @staticmethod
    def of(attention_mask: Tensor | None) -> Compaction | None:
        """None where nothing is masked."""
        if attention_mask is None:
            return None
        real = attention_mask != 0
        return None if bool(real.all()) else Compaction(real)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, longest row, ...]."""
        order = self.order if x.dim() == 2 else self.order.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return x.expand(self.real.shape[0], *x.shape[1:]).gather(1, order)

    def pack_pairs(self, x: Tensor) -> Tensor:
        """[B or 1, T, T] -> [B, longest row, longest row]."""
        x = x.expand(self.real.shape[0], -1, -1)
        rows = x.gather(1, self.order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return rows.gather(2, self.order.unsqueeze(1).expand(-1, rows.shape[1], -1))

    def unpack(self, x: Tensor) -> Tensor:
        """[B, longest row, D] -> [B, T, D], zeros at the padding."""
        batch, tokens = self.real.shape
        x = x * self.mask.unsqueeze(-1)
        index = self.order.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return x.new_zeros(batch, tokens, x.shape[-1]).scatter(1, index, x)

    def unpack_weights(self, x: Tensor) -> Tensor:
        """Attention weights [B, H, longest row, S] -> [B, H, T, S + T - longest row], zeros at the padding.

        What follows the tokens among the keys (memory, a context) stays behind them.
        """
        batch, tokens = self.real.shape
        heads, behind = x.shape[1], x.shape[3] - self.longest
        x = x * self.mask[:, None, :, None]
        of_keys = torch.cat((self.order, torch.arange(behind, device=x.device).expand(batch, -1) + tokens), dim=1)
        # Columns of padding hold what a mask hides from real tokens: nothing.
        wide = x.new_zeros(batch, heads, self.longest, tokens + behind)
        wide.scatter_(3, of_keys[:, None, None, :].expand(-1, heads, self.longest, -1), x)
        index = self.order[:, None, :, None].expand(-1, heads, -1, tokens + behind)
        return x.new_zeros(batch, heads, tokens, tokens + behind).scatter_(2, index, wide)
