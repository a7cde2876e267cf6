"""The oracles: exactly causal and chunked LSH attention, one query at a time.

Slow and obvious on purpose. Every backend is tested against them, outputs and gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reformer_lm.ops.keys import KeyNorm, normalize_keys


def lsh_attention_reference(
    qk_BHTD: Tensor,
    v_BHTD: Tensor,
    buckets_BHRT: Tensor,
    *,
    window: int,
    key_norm: KeyNorm = "rms",
    num_shifted_heads: int = 0,
    allow_duplicates: bool = True,
    memory: tuple[Tensor, Tensor] | None = None,
    memory_mask: Tensor | None = None,
) -> Tensor:
    """Attention of every token over the earlier tokens that share its bucket; see `reformer_lm.ops.lsh_attention`.

    Args:
        qk_BHTD: shared query/key vectors [B, H, T, D].
        v_BHTD: values [B, H, T, D].
        buckets_BHRT: integer buckets [B, H, R, T].
        window: W, how many of the most recent earlier tokens of its bucket a token sees in one round.
        key_norm: see `normalize_keys`.
        num_shifted_heads: the last so many heads read the value that followed each match.
        allow_duplicates: whether a key met in several rounds counts once for each of them.
        memory: keys [H, M, D], already normalised, and values [H, M, D_v] that every token sees; or each with a row of
            its own per row of the batch.
        memory_mask: bool [B, M], False for memory that a row does not see.

    Returns:
        [B, H, T, D_v].
    """
    batch, heads, tokens, dim = qk_BHTD.shape
    keys = normalize_keys(qk_BHTD, key_norm)
    scale = 1.0 / math.sqrt(dim)
    rows = []
    for b in range(batch):
        for h in range(heads):
            shifted = h >= heads - num_shifted_heads
            for t in range(tokens):
                seen: list[int] = []
                for buckets in buckets_BHRT[b, h].tolist():
                    seen += [s for s in range(t) if buckets[s] == buckets[t]][-window:]
                if not allow_duplicates:
                    seen = sorted(set(seen))
                remembered = _memory_of(memory, memory_mask, b, h)
                if not seen and remembered is None:
                    rows.append(torch.zeros_like(v_BHTD[b, h, t]) if shifted else v_BHTD[b, h, t])
                    continue
                sources = [s + 1 for s in seen] if shifted else seen
                seen_keys, seen_values = keys[b, h, seen], v_BHTD[b, h, sources]
                if remembered is not None:
                    seen_keys = torch.cat((seen_keys, remembered[0]))
                    seen_values = torch.cat((seen_values, remembered[1]))
                weights = torch.softmax(scale * seen_keys @ qk_BHTD[b, h, t], dim=-1)
                rows.append(weights @ seen_values)
    return torch.stack(rows).view(batch, heads, tokens, v_BHTD.shape[-1])


def _memory_of(
    memory: tuple[Tensor, Tensor] | None, mask: Tensor | None, b: int, h: int
) -> tuple[Tensor, Tensor] | None:
    """Keys and values that one head of one row remembers, or None where there are none."""
    if memory is None:
        return None
    keys, values = ((m[b] if m.dim() == 4 else m)[h] for m in memory)
    if mask is None:
        return keys, values
    return (keys[mask[b]], values[mask[b]]) if mask[b].any() else None


def chunked_lsh_attention_reference(
    qk_BHTD: Tensor,
    v_BHTD: Tensor,
    buckets_BHRT: Tensor,
    *,
    chunk_size: int,
    key_norm: KeyNorm = "unit",
    causal: bool = True,
    mask_BT: Tensor | None = None,
) -> Tensor:
    """Attention over fixed chunks of the sorted order; see `reformer_lm.ops.chunked_lsh_attention`.

    All rounds stand in one order, each filled up to whole chunks. A token sees its own chunk and the one before it, the
    first chunk the last one; a key that it meets several times counts as often.

    Args:
        qk_BHTD: shared query/key vectors [B, H, T, D].
        v_BHTD: values [B, H, T, D_v].
        buckets_BHRT: integer buckets [B, H, R, T].
        chunk_size: tokens per chunk.
        key_norm: see `normalize_keys`.
        causal: whether later tokens are hidden.
        mask_BT: bool [B, T], False for padding, which sees itself only and is seen by nobody.

    Returns:
        [B, H, T, D_v].
    """
    batch, heads, tokens, dim = qk_BHTD.shape
    keys = normalize_keys(qk_BHTD, key_norm)
    size = min(chunk_size, tokens)
    real = torch.ones(batch, tokens, dtype=torch.bool) if mask_BT is None else mask_BT
    rows = []
    for b in range(batch):
        for h in range(heads):
            chunks: list[list[int]] = []
            for buckets in buckets_BHRT[b, h].tolist():
                order = sorted(range(tokens), key=lambda t, names=buckets: (names[t], t))  # type: ignore[misc]
                chunks += [order[begin : begin + size] for begin in range(0, tokens, size)]
            for t in range(tokens):
                seen: list[int] = []
                for index, chunk in enumerate(chunks):
                    if t in chunk and real[b, t]:
                        before = chunks[index - 1] if len(chunks) > 1 else []
                        seen += [s for s in (*chunk, *before) if s != t and real[b, s] and (s < t or not causal)]
                if not seen:
                    rows.append(v_BHTD[b, h, t])
                    continue
                weights = torch.softmax(keys[b, h, seen] @ qk_BHTD[b, h, t] / math.sqrt(dim), dim=-1)
                rows.append(weights @ v_BHTD[b, h, seen])
    return torch.stack(rows).view(batch, heads, tokens, v_BHTD.shape[-1])
