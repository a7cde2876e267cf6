"""Attention of new tokens over those that a cache remembers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reformer_lm.cache import CachedContext
from reformer_lm.layers.heads import AttentionReplay, HeadGroup, mask_of_extra, memory_of
from reformer_lm.layers.sequence import SequenceInfo

if TYPE_CHECKING:
    from reformer_lm.layers.attention import LSHSelfAttention


@torch.no_grad()
def attend_from_cache(layer: LSHSelfAttention, x: Tensor, info: SequenceInfo) -> Tensor:
    """Attends from new tokens, which then join the cache. No gradients flow.

    The first tokens of all, a prompt, go through the same attention as in training; later ones through the rings.

    Args:
        layer: the attention layer.
        x: hidden states [B, T, hidden_size] of the new tokens.
        info: with ``cache`` and ``counts``.

    Returns:
        Merged heads [B, T, H * D_v], before the output projection.
    """
    assert info.cache is not None
    state, counts = info.cache.layers[layer.layer_index], info.counts
    state.prepare(x.shape[0], x.device)
    is_prompt = x.shape[1] > 1 and state.get_seq_length() == 0
    heads = layer.project(x, info)
    if state.context is not None:
        # The first tokens were given one, which was projected then: nobody looks at these vectors again.
        heads = heads._replace(extra=state.context.extra)
        info = replace(info, context=state.context.extra[0], context_mask=state.context.mask)
    elif info.context is not None and heads.extra is not None:
        state.context = CachedContext(heads.extra, mask_of_extra(heads.extra, info))
    replay = AttentionReplay()
    merged = layer.attend(heads, info, replay, dropout_p=0.0) if is_prompt else None
    border = layer.local_heads
    parts = []
    if state.local is not None:
        q, keys = layer.local_queries_and_keys(heads.query_key[:, :border], heads.local_key, info)
        values = heads.value[:, :border]
        if is_prompt:
            state.local.fill(keys, values, counts)
        else:
            parts.append(state.local.attend(q, keys, values, counts))
    if state.lsh is not None:
        shared, values = heads.query_key[:, border:], heads.value[:, border:]
        num_buckets = layer.config.buckets_per_round
        assert num_buckets is not None
        buckets = layer.hash(shared, num_buckets, info, replay, HeadGroup(border, layer.heads))
        rotated = layer.rotate(shared, info)
        if is_prompt:
            state.lsh.fill(rotated, values, buckets, counts)
        else:
            memory = memory_of(heads.extra, info.context is not None)
            parts.append(state.lsh.attend(rotated, values, buckets, counts, memory, mask_of_extra(heads.extra, info)))
    if merged is not None:
        return merged
    return torch.cat(parts, dim=1).transpose(1, 2).flatten(2)
