"""LSH attention that is exactly causal: the one entry to its backends.

In one hash round the tokens are sorted by (bucket, position). Token i of that order sees the ``window`` tokens
before it that share its bucket:

    allowed(i) = [max(first place of i's bucket, i - window), i)

These are the most recent earlier tokens with the same hash. No later token can change that set, so the output at t
is a function of the tokens up to t alone, in values *and* in structure. The rounds are merged exactly: one softmax
over the union of their keys, a key met in two rounds counting twice. A token that finds nothing in any round attends
to itself.

Source: Kitaev et al. 2020 (arXiv 2001.04451), section 2; the contiguous causal window replaces the paper's chunks
of the sorted order, whose boundaries later tokens can move.
"""

from __future__ import annotations

import logging
from typing import Literal, get_args

import torch
from torch import Tensor

from reformer_lm.ops.hashing import sort_by_bucket
from reformer_lm.ops.keys import KeyNorm, shift_values
from reformer_lm.ops.lsh_reference import lsh_attention_reference
from reformer_lm.ops.lsh_torch import lsh_attention_torch

logger = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "torch"]


def lsh_attention(
    qk_BHTD: Tensor,
    v_BHTD: Tensor,
    buckets_BHRT: Tensor,
    *,
    window: int,
    key_norm: KeyNorm = "rms",
    num_shifted_heads: int = 0,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Exactly causal LSH attention with shared queries and keys.

    Args:
        qk_BHTD: shared query/key vectors [B, H, T, D], any float type.
        v_BHTD: values [B, H, T, D_v].
        buckets_BHRT: integer buckets [B, H, R, T] from `hash_vectors`.
        window: W >= 1, the most recent earlier tokens of its bucket that a token sees in one round.
        key_norm: length of the keys, see `normalize_keys`. Logits are scaled by 1 / sqrt(D).
        num_shifted_heads: the last so many heads read, for a match at s, the value at s + 1. They never attend to
            themselves; with no match in any round their output is 0.
        dropout_p: probability of dropping an attention weight (0 in evaluation). Its mask is drawn from a seed
            taken from the global random state once per call.
        backend: "torch" (any device), "reference" (the oracle, slow), or "auto", which picks by device.

    Returns:
        [B, H, T, D_v] in the dtype of ``v_BHTD``.

    Raises:
        ValueError: shapes that do not fit, ``window`` < 1, an unknown backend, or dropout with "reference".
    """
    _check_shapes(qk_BHTD, v_BHTD, buckets_BHRT, window, num_shifted_heads)
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend == "auto":
        backend = "torch"
        logger.debug("lsh_attention: backend %s on %s", backend, qk_BHTD.device.type)
    if backend == "reference":
        if dropout_p:
            raise ValueError('backend="reference" has no dropout: use backend="torch"')
        return lsh_attention_reference(
            qk_BHTD,
            v_BHTD,
            buckets_BHRT,
            window=window,
            key_norm=key_norm,
            num_shifted_heads=num_shifted_heads,
        )
    order = sort_by_bucket(buckets_BHRT)
    # Whether a place has an earlier one of its bucket, per round.
    places = torch.arange(order.start.shape[-1], device=order.start.device)
    has_match = order.start < places
    out = lsh_attention_torch(
        qk_BHTD,
        shift_values(v_BHTD, num_shifted_heads),
        order,
        has_match,
        window=window,
        key_norm=key_norm,
        dropout_p=dropout_p,
    )
    # Without a match in any round a token reads itself; a head that reads what followed a match reads nothing.
    matched = has_match.gather(-1, order.inverse).any(dim=-2).unsqueeze(-1)
    own = v_BHTD
    if num_shifted_heads:
        plain = torch.arange(v_BHTD.shape[1], device=v_BHTD.device) < v_BHTD.shape[1] - num_shifted_heads
        own = v_BHTD * plain.view(1, -1, 1, 1)
    return torch.where(matched, out, own)


def _check_shapes(qk: Tensor, v: Tensor, buckets: Tensor, window: int, num_shifted_heads: int) -> None:
    if qk.dim() != 4 or v.dim() != 4 or buckets.dim() != 4:
        raise ValueError(
            "expected qk [B, H, T, D], v [B, H, T, D_v] and buckets [B, H, R, T], "
            f"got {tuple(qk.shape)}, {tuple(v.shape)} and {tuple(buckets.shape)}"
        )
    batch, heads, tokens = qk.shape[:3]
    if v.shape[:3] != qk.shape[:3] or (buckets.shape[0], buckets.shape[1], buckets.shape[3]) != (batch, heads, tokens):
        raise ValueError(
            f"qk {tuple(qk.shape)}, v {tuple(v.shape)} and buckets {tuple(buckets.shape)} disagree "
            "in batch, heads or tokens"
        )
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not 0 <= num_shifted_heads <= heads:
        raise ValueError(f"num_shifted_heads must lie between 0 and the {heads} heads, got {num_shifted_heads}")
