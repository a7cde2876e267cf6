"""The feed-forward block, worked off in pieces of the sequence."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from reformer_lm.config import ReformerLMConfig
from reformer_lm.layers.linear import Linear, ResidualLinear

_ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}
_GATED = {"geglu": "gelu", "swiglu": "silu", "reglu": "relu"}


class TokenBlock(nn.Module):
    """A block that works on each token alone, and so on any piece of a sequence.

    Args:
        chunk_size: tokens per piece; 0 for all at once.
    """

    def __init__(self, chunk_size: int) -> None:
        super().__init__()
        self.chunk_size = chunk_size

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of its weights."""
        raise NotImplementedError

    def pieces(self, tokens: int) -> list[slice]:
        """The pieces of a sequence that are worked off one after the other."""
        step = self.chunk_size or tokens
        return [slice(begin, min(begin + step, tokens)) for begin in range(0, tokens, step)]

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, hidden_size] to [B, T, hidden_size], ``ff_chunk_size`` tokens at a time.

        With more than one piece, a graph keeps no inner activations: the backward pass computes each piece again.
        """
        pieces = self.pieces(x.shape[1])
        if len(pieces) == 1:
            return self._piece(x)
        run = functools.partial(checkpoint, self._piece, use_reentrant=False) if x.requires_grad else self._piece
        return torch.cat([run(x[:, tokens]) for tokens in pieces], dim=1)

    def _piece(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class FeedForward(TokenBlock):
    """Two linear layers with an activation between, optionally gated.

    The gated forms compute activation(a) * b with [a, b] = the first layer's output, which is twice as wide.

    Source: Kitaev et al. 2020, section 3, "Chunking"; Shazeer 2020 (arXiv 2002.05202) for the gated forms.
    """

    def __init__(self, config: ReformerLMConfig) -> None:
        super().__init__(config.ff_chunk_size)
        assert config.intermediate_size is not None
        self.gated = config.ff_activation in _GATED
        self.activation = _ACTIVATIONS[_GATED.get(config.ff_activation, config.ff_activation)]
        self.inner = Linear(config.hidden_size, config.intermediate_size * (2 if self.gated else 1))
        self.output = ResidualLinear(config.intermediate_size, config.hidden_size)
        self.inner_dropout = nn.Dropout(config.activation_dropout)
        self.output_dropout = nn.Dropout(config.hidden_dropout_prob)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.inner.weight.dtype

    def _piece(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
            x = self.activation(x) * gate
        else:
            x = self.activation(x)
        return self.output_dropout(self.output(self.inner_dropout(x)))
