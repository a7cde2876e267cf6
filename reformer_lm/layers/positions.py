"""Position embeddings: axial, absolute and sinusoidal ones, and rotary angles."""

from __future__ import annotations

import torch
from axial_positional_embedding import AxialPositionalEmbedding
from torch import Tensor, nn
from torch.nn import functional

from reformer_lm.config import ReformerLMConfig

_ROTARY_BASE = 10_000.0


class PositionTable(nn.Embedding):
    """A learned vector per position; a class of its own because it is initialised otherwise than tokens."""


class PositionEmbedding(nn.Module):
    """What is added to the token embeddings; nothing with rotary positions or none.

    Axial embeddings (Kitaev et al. 2020, section 4.1) give a grid position (row, column) one vector for the row and
    one for the column, so that a million positions need two thousand vectors. The parameters are those of the
    axial-positional-embedding package; only the rows of positions that are present are formed.
    """

    def __init__(self, config: ReformerLMConfig) -> None:
        super().__init__()
        self.position_type = config.position_type
        width = config.embedding_size or config.hidden_size
        self.width = width
        if config.position_type == "axial":
            assert config.axial_shape is not None
            dims = None if config.axial_dims is None else tuple(config.axial_dims)
            self.axial = AxialPositionalEmbedding(width, tuple(config.axial_shape), dims)
        elif config.position_type == "absolute":
            self.absolute = PositionTable(config.max_position_embeddings, width)

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Embeds positions.

        Args:
            position_ids: int64 [B or 1, T].
            dtype: of the result where it is not learned.

        Returns:
            [B or 1, T, embedding_size], or None with rotary positions or none.
        """
        if self.position_type == "axial":
            row, column = (weight.flatten(0, -2) for weight in self.axial.weights)
            columns = column.shape[0]
            # Not row[index]: its backward pass adds up in an order that changes from run to run on several threads.
            parts = (
                functional.embedding(position_ids // columns, row),
                functional.embedding(position_ids % columns, column),
            )
            return parts[0] + parts[1] if self.axial.summed else torch.cat(parts, dim=-1)
        if self.position_type == "absolute":
            return self.absolute(position_ids)
        if self.position_type == "sinusoidal":
            sin, cos = rotary_angles(position_ids, self.width, dtype)
            return torch.cat((sin, cos), dim=-1)
        return None


def rotary_frequencies(dim: int, device: torch.device | None = None) -> Tensor:
    """What the angle of each pair of channels grows by from one position to the next, float64 [dim / 2]."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    return _ROTARY_BASE**-exponent


def rotary_angles(position_ids: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sines and cosines of the rotary angles.

    Args:
        position_ids: int64 [..., T].
        dim: even width of the rotated vectors.
        dtype: of the result.

    Returns:
        sin and cos, each [..., T, dim / 2].

    Source: Su et al. 2021 (arXiv 2104.09864), section 3.2.
    """
    # In float32 the angle of position 1,000,000 would be off by 0.06 radians; only its sine may be rounded.
    angle = position_ids.unsqueeze(-1).to(torch.float64) * rotary_frequencies(dim, position_ids.device)
    return angle.sin().to(dtype), angle.cos().to(dtype)


def rotary_factors(position_ids: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The rotations of `apply_rotary`, as complex numbers of length 1.

    Args:
        position_ids: int64 [B or 1, T].
        dim: even width of the rotated vectors.
        dtype: of their real and imaginary part, float32 or float64.

    Returns:
        Complex [B or 1, 1, T, dim / 2].
    """
    sin, cos = rotary_angles(position_ids, dim, dtype)
    return torch.complex(cos, sin).unsqueeze(1)


def apply_rotary(x: Tensor, factors: Tensor) -> Tensor:
    """Rotates neighbouring pairs of channels by the angle of their position.

    Args:
        x: [B, H, T, D].
        factors: from `rotary_factors`.

    Returns:
        [B, H, T, D] in the dtype of ``x``.
    """
    # A pair as a complex number: one product, where four and two sums would go over strided halves.
    pairs = torch.view_as_complex(x.to(factors.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factors).flatten(-2).to(x.dtype)
