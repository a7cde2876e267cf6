"""A large table of values that a token reads a few of, found through products of two small sets of keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from reformer_lm.config import ReformerLMConfig
from reformer_lm.layers.feed_forward import TokenBlock
from reformer_lm.layers.linear import Linear

# Fixed in reformer-pytorch, which takes its product-key-memory package's defaults.
HEADS = 4
KEY_DIM = 128
VALUES_READ = 32


class ProductKeyMemory(TokenBlock):
    """Each of four heads reads the 32 of n * n values whose keys suit its query best.

    A value's key is a pair out of two sets of n half keys, so the best pairs are found among the best of each set.
    With queries of its two halves q1 and q2, a pair scores q1 k1 + q2 k2, and what is read is weighted by a softmax.

    Source: Lample et al. 2019 (arXiv 1907.05242), section 3; layer norm on the queries as in reformer-pytorch, since a
    batch norm would look at later tokens.
    """

    def __init__(self, config: ReformerLMConfig) -> None:
        super().__init__(config.ff_chunk_size)
        self.num_keys = config.product_keys
        self.queries = Linear(config.hidden_size, 2 * HEADS * KEY_DIM, bias=False)
        self.query_norm = nn.LayerNorm(KEY_DIM)
        self.keys = nn.Parameter(torch.randn(HEADS, self.num_keys, 2, KEY_DIM) / math.sqrt(KEY_DIM))
        self.values = nn.EmbeddingBag(self.num_keys**2, config.hidden_size, mode="sum")
        self.output_dropout = nn.Dropout(config.hidden_dropout_prob)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.queries.weight.dtype

    def _piece(self, x: Tensor) -> Tensor:
        # [B, T, 2, H, D]
        queries = self.query_norm(self.queries(x).unflatten(-1, (2, HEADS, KEY_DIM)))
        # [B, T, H, 2, n]
        scores = torch.einsum("btphd,hnpd->bthpn", queries, self.keys)
        best, index = scores.topk(min(VALUES_READ, self.num_keys), dim=-1)
        # Of the pairs of the best halves again the best, [B, T, H, k].
        pairs = (best[..., 0, :, None] + best[..., 1, None, :]).flatten(-2)
        places = (index[..., 0, :, None] * self.num_keys + index[..., 1, None, :]).flatten(-2)
        best, chosen = pairs.topk(best.shape[-1], dim=-1)
        weights = torch.softmax(best, dim=-1).to(self.values.weight.dtype)
        read = functional.embedding_bag(
            places.gather(-1, chosen).flatten(2).flatten(0, 1),
            self.values.weight,
            per_sample_weights=weights.flatten(2).flatten(0, 1),
            mode="sum",
        )
        return self.output_dropout(read.unflatten(0, x.shape[:2]))
