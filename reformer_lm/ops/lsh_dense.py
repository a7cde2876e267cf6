"""Exactly causal LSH attention of short sequences, as full attention with a bias.

Below some hundred tokens sorting costs more than it saves. Here the rounds in which a query meets a key are counted
pair by pair, [T, T]. A key met n times has n times its weight, which is log n added to its logit; one that is never met
has log 0. The rest is torch's own attention, forward and backward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from reformer_lm.ops.hashing import sort_by_bucket
from reformer_lm.ops.keys import KeyNorm, normalize_keys

# Up to so many tokens it is the faster way on a CPU. Measured with 2 threads of an AMD EPYC, 4 rounds, window 64, 4,096
# tokens in all: 5.9 ms against 18.2 at 32 tokens, 8.7 against 28.9 at 64, 21.0 against 21.4 at 192; with the backward
# pass 10.2 against 76.0, 14.7 against 81.6 and 28.1 against 63.7.
MAX_TOKENS = 192
# Pairs of tokens, of all rows and heads, that are counted at one time: 2^22 float32 are 16 MB.
_PAIRS = 1 << 22


def lsh_attention_dense(
    qk_BHTD: Tensor,
    v_BHTD: Tensor,
    buckets_BHRT: Tensor,
    *,
    window: int,
    key_norm: KeyNorm,
    num_shifted_heads: int = 0,
    allow_duplicates: bool = True,
) -> Tensor:
    """See `reformer_lm.ops.lsh_attention` for the semantics; time and memory grow with the square of T.

    Args:
        qk_BHTD: shared query/key vectors [B, H, T, D].
        v_BHTD: values [B, H, T, D_v], already shifted where a head shifts.
        buckets_BHRT: integer buckets [B, H, R, T].
        window: W.
        key_norm: see `normalize_keys`.
        num_shifted_heads: the last so many heads, which read nothing where they match nothing.
        allow_duplicates: whether a key met in several rounds counts once for each of them.

    Returns:
        [B, H, T, D_v] in the dtype of ``v_BHTD``.
    """
    batch, heads, tokens, dim = qk_BHTD.shape
    keys = normalize_keys(qk_BHTD, key_norm)
    step = max(1, _PAIRS // max(1, heads * tokens * tokens))
    parts = []
    for rows in (slice(begin, begin + step) for begin in range(0, max(batch, 1), step)):
        counts, matched = _count_meetings(buckets_BHRT[rows], window, allow_duplicates)
        bias = counts.to(torch.promote_types(qk_BHTD.dtype, torch.float32)).log_().to(qk_BHTD.dtype)
        out = scaled_dot_product_attention(
            qk_BHTD[rows], keys[rows], v_BHTD[rows], attn_mask=bias, scale=1.0 / math.sqrt(dim)
        )
        if num_shifted_heads:
            matched[:, : heads - num_shifted_heads] = True
            out = torch.where(matched.unsqueeze(-1), out, 0.0)
        parts.append(out)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.no_grad()
def _count_meetings(buckets: Tensor, window: int, allow_duplicates: bool) -> tuple[Tensor, Tensor]:
    """How often each query meets each key.

    Args:
        buckets: integers [B, H, R, T].
        window: W.
        allow_duplicates: False to count a key once at most.

    Returns:
        int16 [B, H, T, T] by query and key, where a token that meets no other meets itself; bool [B, H, T], which
        tokens meet any other.
    """
    batch, heads, rounds, tokens = buckets.shape
    ranks = None
    if tokens > window + 1:
        # How many of its bucket stand before each token; of those within the window the difference is at most W.
        order = sort_by_bucket(buckets)
        ranks = (order.inverse - order.start.gather(-1, order.inverse)).int()
    counts = torch.zeros(batch, heads, tokens, tokens, dtype=torch.int16, device=buckets.device)
    for index in range(rounds):
        of_round = buckets[:, :, index]
        met = of_round.unsqueeze(-1) == of_round.unsqueeze(-2)
        if ranks is not None:
            rank = ranks[:, :, index]
            met &= rank.unsqueeze(-1) - rank.unsqueeze(-2) <= window
        counts += met
    counts.tril_(-1)
    if not allow_duplicates:
        counts.clamp_(max=1)
    matched = counts.amax(dim=-1) > 0
    counts.diagonal(dim1=-2, dim2=-1).copy_(~matched)
    return counts, matched
