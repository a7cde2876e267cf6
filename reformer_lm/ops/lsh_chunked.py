"""LSH attention over fixed chunks of the sorted order, as trax, reformer-pytorch and transformers do it.

All rounds stand in one long sorted order that is cut into chunks; a chunk attends to itself and to the chunk before
(the first one to the last). Contents are masked causally, but later tokens move the cuts between chunks, so an
output *does* depend on the future through the structure. It is here for weights trained that way, for parity
tests against those packages, and for bidirectional models; `reformer_lm.ops.lsh_attention` is the exactly causal one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reformer_lm.ops.keys import SELF_ATTENTION_BIAS, KeyNorm, normalize_keys, shift_values


def chunked_lsh_attention(
    qk_BHTD: Tensor,
    v_BHTD: Tensor,
    buckets_BHRT: Tensor,
    *,
    chunk_size: int,
    key_norm: KeyNorm = "unit",
    causal: bool = True,
    attend_across_buckets: bool = True,
    num_shifted_heads: int = 0,
    dropout_p: float = 0.0,
    mask_BT: Tensor | None = None,
) -> Tensor:
    """Chunked LSH attention with shared queries and keys.

    Args:
        qk_BHTD: shared query/key vectors [B, H, T, D]; T need not be a multiple of the chunk size.
        v_BHTD: values [B, H, T, D_v].
        buckets_BHRT: integer buckets [B, H, R, T] from `hash_vectors`.
        chunk_size: tokens per chunk.
        key_norm: see `normalize_keys`.
        causal: whether later tokens are masked.
        attend_across_buckets: whether a token sees other buckets of its two chunks (the peers' default).
        num_shifted_heads: the last so many heads read the value that followed each match; see `shift_values`.
        dropout_p: probability of dropping an attention weight.
        mask_BT: optional bool [B, T], True for real tokens, False for padding, which only attends to itself and is
            not attended to.

    Returns:
        [B, H, T, D_v].

    Source: Kitaev et al. 2020, section 2; masking and merging order as in reformer-pytorch's LSHAttention.
    """
    batch, heads, tokens, dim = qk_BHTD.shape
    rounds = buckets_BHRT.shape[2]
    padding = -tokens % chunk_size
    length = tokens + padding
    qk, v = qk_BHTD, shift_values(v_BHTD, num_shifted_heads)
    buckets = buckets_BHRT.long()
    real = mask_BT
    if padding:
        qk, v = (torch.nn.functional.pad(x, (0, 0, 0, padding)) for x in (qk, v))
        # Behind every bucket, so that the padding ends up in the last chunk of its round.
        buckets = torch.nn.functional.pad(buckets, (0, padding), value=int(buckets.max()) + 1)
        if real is None:
            real = torch.ones(batch, tokens, dtype=torch.bool, device=qk.device)
        real = torch.nn.functional.pad(real, (0, padding), value=False)

    # One order over all rounds: by (round, bucket, position).
    order = torch.sort(buckets, dim=-1, stable=True).indices
    position = order.flatten(2)
    inverse = torch.argsort(order, dim=-1) + torch.arange(rounds, device=order.device).unsqueeze(1) * length
    inverse = inverse.flatten(2)
    chunks = rounds * length // chunk_size

    def in_chunks(x: Tensor) -> Tensor:
        return x.unflatten(2, (chunks, chunk_size))

    def with_previous(x: Tensor) -> Tensor:
        return torch.cat((x, x.roll(1, dims=2)), dim=3)

    def gather(x: Tensor, index: Tensor) -> Tensor:
        return x.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))

    q = in_chunks(gather(qk, position))
    keys = with_previous(normalize_keys(q, key_norm))
    values = with_previous(in_chunks(gather(v, position)))
    q_position = in_chunks(position)
    k_position = with_previous(q_position)

    logits = (q @ keys.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(dim)
    forbidden = torch.zeros_like(logits, dtype=torch.bool)
    if causal:
        forbidden |= q_position.unsqueeze(-1) < k_position.unsqueeze(-2)
    if real is not None:
        # Padding sees nothing but itself either: what it becomes decides where the next layer sorts it.
        q_real = in_chunks(real.unsqueeze(1).expand(-1, heads, -1).gather(2, position))
        forbidden |= ~(q_real.unsqueeze(-1) & with_previous(q_real).unsqueeze(-2))
    itself = q_position.unsqueeze(-1) == k_position.unsqueeze(-2)
    if not attend_across_buckets:
        # Numbered through all rounds: the first chunk of a round looks back to the last one of the round before.
        through = buckets * rounds + torch.arange(rounds, device=buckets.device).unsqueeze(1)
        q_bucket = in_chunks(through.gather(3, order).flatten(2))
        forbidden |= q_bucket.unsqueeze(-1) != with_previous(q_bucket).unsqueeze(-2)
    lowest = torch.finfo(logits.dtype).min
    logits = logits.masked_fill(forbidden, lowest).masked_fill(itself, SELF_ATTENTION_BIAS)

    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    weights = torch.nn.functional.dropout(torch.exp(logits - lse), dropout_p)
    out = weights.to(values.dtype) @ values

    out = gather(out.flatten(2, 3), inverse).unflatten(2, (rounds, length))
    lse = lse.flatten(2).gather(2, inverse).unflatten(2, (rounds, length))
    share = torch.softmax(lse, dim=2).unsqueeze(-1)
    merged = (out * share).sum(dim=2)[:, :, :tokens]
    if num_shifted_heads:
        # No match in any round: the weights went to the token itself, which a shifted head must not read.
        matched = (lse > SELF_ATTENTION_BIAS / 2).any(dim=2)[:, :, :tokens]
        matched = matched.index_fill(1, torch.arange(heads - num_shifted_heads, device=qk.device), True)
        merged = merged * matched.unsqueeze(-1)
    return merged.to(v_BHTD.dtype)
