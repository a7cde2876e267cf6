"""Full causal attention with shared queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from reformer_lm.ops.keys import KeyNorm, normalize_keys, shift_values


def shared_qk_attention(
    qk_BHTD: Tensor,
    v_BHTD: Tensor,
    *,
    key_norm: KeyNorm = "rms",
    num_shifted_heads: int = 0,
    dropout_p: float = 0.0,
    mask_BT: Tensor | None = None,
) -> Tensor:
    """Every token attends to all earlier ones, and to itself only if there are none.

    That is what LSH attention becomes with one bucket and an endless window. "All earlier ones but not itself" is
    plain causal attention of tokens 1.. over keys 0..T-2, so no T x T mask is made.

    Args:
        qk_BHTD: shared query/key vectors [B, H, T, D].
        v_BHTD: values [B, H, T, D_v].
        key_norm: see `normalize_keys`.
        num_shifted_heads: the last so many heads read the value that followed each match; see `shift_values`.
        dropout_p: probability of dropping an attention weight.
        mask_BT: optional bool [B, T], True where a token may be attended to.

    Returns:
        [B, H, T, D_v].

    Source: Kitaev et al. 2020, section 2, "shared-QK Transformer".
    """
    tokens, dim = qk_BHTD.shape[2:]
    heads = v_BHTD.shape[1]
    values = shift_values(v_BHTD, num_shifted_heads)
    # The first token has no earlier one: it reads itself, or nothing where the head shifts.
    first = values[:, :, :1]
    if num_shifted_heads:
        reads = (torch.arange(heads, device=values.device) < heads - num_shifted_heads).view(1, -1, 1, 1)
        first = first * reads
    if tokens == 1:
        return first
    q, k, v = qk_BHTD[:, :, 1:], normalize_keys(qk_BHTD[:, :, :-1], key_norm), values[:, :, :-1]
    scale = 1.0 / math.sqrt(dim)
    if mask_BT is None:
        rest = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p, scale=scale)
    else:
        causal = torch.ones(tokens - 1, tokens - 1, dtype=torch.bool, device=q.device).tril()
        allowed = causal & mask_BT[:, None, None, :-1]
        # A token with no earlier unmasked one would give NaN; padding before it is then as good as nothing to read.
        empty = ~allowed.any(dim=-1, keepdim=True)
        rest = scaled_dot_product_attention(q, k, v, attn_mask=allowed | empty, dropout_p=dropout_p, scale=scale)
        own = values[:, :, 1:] if not num_shifted_heads else values[:, :, 1:] * reads
        rest = torch.where(empty, own, rest)
    return torch.cat((first, rest), dim=2)
