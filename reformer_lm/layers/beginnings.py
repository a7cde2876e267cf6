"""The first tokens of each sequence or document, which attend to everything before them."""

from __future__ import annotations

import torch
from torch import Tensor

from reformer_lm.layers.compaction import Compaction, document_positions


class BeginningsInFront:
    """The first ``threshold`` tokens of the sequence, or of each document, side by side.

    Attributes:
        documents: [B, L] for the tokens taken, or None.
        is_all: whether these are all the tokens.
    """

    def __init__(self, tokens: int, threshold: int, documents: Tensor | None) -> None:
        self.count = min(tokens, threshold)
        self.is_all = self.count == tokens
        self.order: Compaction | None = None
        self.documents = documents
        if documents is None or self.is_all:
            return
        order = Compaction(document_positions(tokens, documents, documents.device) < threshold)
        self.is_all = bool(order.real.all())
        if not self.is_all:
            self.order = order
            # Rows with fewer such tokens are filled up by a document that nobody reads.
            self.documents = order.pack(documents).masked_fill(~order.mask, int(documents.max()) + 1)

    def take(self, x: Tensor) -> Tensor:
        """[B, H, T, D] -> [B, H, L, D]."""
        if self.is_all:
            return x
        if self.order is None:
            return x[:, :, : self.count]
        return self.order.pack(x.transpose(1, 2).flatten(2)).unflatten(2, (x.shape[1], -1)).transpose(1, 2)

    def replace(self, x: Tensor, taken: Tensor) -> Tensor:
        """[B, H, T, D] with what was computed of the tokens taken, [B, H, L, D], in their places."""
        if self.order is None:
            return torch.cat((taken, x[:, :, self.count :]), dim=2)
        placed = self.order.unpack(taken.transpose(1, 2).flatten(2))
        placed = placed.unflatten(2, (x.shape[1], -1)).transpose(1, 2)
        return torch.where(self.order.real[:, None, :, None], placed, x)
