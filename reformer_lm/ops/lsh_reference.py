"""The oracle: exactly causal LSH attention, one query at a time.

Slow and obvious on purpose. Every backend is tested against it, outputs and gradients.
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
        memory: keys [H, M, D], already normalised, and values [H, M, D_v] that every token sees.

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
                if not seen and memory is None:
                    rows.append(torch.zeros_like(v_BHTD[b, h, t]) if shifted else v_BHTD[b, h, t])
                    continue
                sources = [s + 1 for s in seen] if shifted else seen
                seen_keys, seen_values = keys[b, h, seen], v_BHTD[b, h, sources]
                if memory is not None:
                    seen_keys = torch.cat((seen_keys, memory[0][h]))
                    seen_values = torch.cat((seen_values, memory[1][h]))
                weights = torch.softmax(scale * seen_keys @ qk_BHTD[b, h, t], dim=-1)
                rows.append(weights @ seen_values)
    return torch.stack(rows).view(batch, heads, tokens, v_BHTD.shape[-1])
