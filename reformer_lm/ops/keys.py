"""Keys of shared query/key attention, and the self-attention penalty that goes with them."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

KeyNorm = Literal["rms", "rms_eps", "unit"]

# Added to a token's logit with itself, so that it attends to itself only when it has no other choice. Finite in
# float16; exp(-5e4) is exactly 0 in every float type, so beside any real match the self term vanishes exactly.
# Source: Kitaev et al. 2020, section 2, "Causal masking for shared-QK attention"; value as in trax.
SELF_ATTENTION_BIAS = -5e4

# Vectors shorter than this are divided by it instead of by their length.
_MIN_LENGTH = 1e-6
# Of "rms_eps"; value as in trax and transformers.
_RMS_EPSILON = 1e-6


def normalize_keys(x: Tensor, key_norm: KeyNorm) -> Tensor:
    """Turns shared vectors into keys of constant length.

    Args:
        x: [..., D].
        key_norm: "rms" gives length sqrt(D): a logit is |q| cos. "rms_eps" gives that length but for 1e-6 that is
            added to the mean square, so that short vectors stay shorter (trax and transformers). "unit" gives length 1
            (reformer-pytorch: a softmax sqrt(D) times flatter).

    Returns:
        Keys [..., D] in the dtype of ``x``; zero vectors stay zero.

    Raises:
        ValueError: an unknown ``key_norm``.
    """
    if key_norm not in get_args(KeyNorm):
        raise ValueError(f"key_norm must be one of {', '.join(get_args(KeyNorm))}, got {key_norm!r}")
    length = math.sqrt(x.shape[-1]) if key_norm == "rms" else 1.0
    # The squared sum would overflow in float16.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if key_norm == "rms_eps":
        return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + _RMS_EPSILON)).to(x.dtype)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(_MIN_LENGTH)
    return (wide * (length / norm)).to(x.dtype)


def shift_values(v_BHTD: Tensor, num_shifted_heads: int) -> Tensor:
    """Lets the last heads read, where they match position s, the value of position s + 1.

    Like an induction head, such a head reads what *followed* its match. It stays causal: s < t gives s + 1 <= t.
    The last position is given a zero value that no token reads.

    Args:
        v_BHTD: values [B, H, T, D].
        num_shifted_heads: how many of the last heads shift.

    Returns:
        Values [B, H, T, D].
    """
    if not num_shifted_heads:
        return v_BHTD
    plain, shifted = v_BHTD.split([v_BHTD.shape[1] - num_shifted_heads, num_shifted_heads], dim=1)
    shifted = torch.nn.functional.pad(shifted[:, :, 1:], (0, 0, 0, 1))
    return torch.cat((plain, shifted), dim=1)
