"""What stands around a block of the residual stack: a norm before it and a gate behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reformer_lm.config import ReformerLMConfig


class ScaleNorm(nn.Module):
    """Scales vectors to one learned length. Source: Nguyen and Salazar 2019 (arXiv 1910.05895), section 2."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] to [..., D]."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(self.eps)
        return x / norm * self.weight


class FinalNorm(nn.LayerNorm):
    """The layer norm behind the last layer; a class of its own because of its initial scales.

    Where the output matrix is the token embedding, they start at +1 or -1 at random. With +1 alone the residual
    streams, which begin as the token's own embedding, would have its greatest product with that token: the model would
    start by predicting each token to follow itself.
    """


class ReZeroGate(nn.Module):
    """A learned factor that starts at 0. Source: Bachlechner et al. 2020 (arXiv 2003.04887), section 3."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] to [..., D]."""
        return x * self.weight


def make_norm(config: ReformerLMConfig) -> nn.Module:
    """The norm in front of a block: layer norm, scale norm, or nothing with ReZero."""
    if config.norm_type == "layernorm":
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    if config.norm_type == "scalenorm":
        return ScaleNorm(config.layer_norm_eps)
    return nn.Identity()


def make_gate(config: ReformerLMConfig) -> nn.Module:
    """The gate behind a block: a ReZero gate, or nothing."""
    return ReZeroGate() if config.norm_type == "rezero" else nn.Identity()
