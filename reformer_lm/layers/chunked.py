"""The LSH heads of one layer over fixed chunks of the sorted order (``lsh_mask="chunked"``)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reformer_lm.layers.heads import AttentionReplay, HeadGroup, mask_of_extra
from reformer_lm.layers.sequence import SequenceInfo
from reformer_lm.ops.lsh_chunked import chunked_lsh_attention
from reformer_lm.ops.shared_qk import shared_qk_attention

if TYPE_CHECKING:
    from reformer_lm.layers.attention import LSHSelfAttention


def attend_in_chunks(
    layer: LSHSelfAttention,
    shared: Tensor,
    v: Tensor,
    extra: tuple[Tensor, Tensor] | None,
    info: SequenceInfo,
    replay: AttentionReplay,
    dropout_p: float,
    lsh: HeadGroup,
) -> Tensor:
    """Attention of a group of LSH heads; sequences up to ``full_attention_threshold`` get full attention.

    Args:
        layer: the attention layer.
        shared: query/key vectors [B, H, T, D], without positions.
        v: values [B, H, T, D_v].
        extra: see `Projections`.
        info: positions, masks and step.
        replay: of these heads; an empty one is filled.
        dropout_p: probability of dropping an attention weight.
        lsh: which heads these are.

    Returns:
        [B, H, T, D_v].
    """
    rotated = layer.rotate(shared, info)
    # Without learned memory a mask that hides nothing is none.
    if layer.config.sorts_padding or (info.mask is None and info.context_mask is None):
        return _attend(layer, (shared, rotated, v), extra, info, replay, dropout_p, lsh)
    tokens, extras = shared.shape[2], 0 if extra is None else extra[0].shape[2]
    out = v.new_zeros(v.shape)
    kept: Tensor | None = replay.buckets
    pieces: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows, length, context in info.rows_by_length():
        seen = None
        if extra is not None:
            learned = extras - (0 if info.context is None else info.context.shape[1])
            columns = torch.arange(learned, device=rows.device).expand(len(rows), -1)
            seen = columns if context is None else torch.cat((columns, context + learned), dim=1)
            if seen.shape[1] == 0:
                seen = None
        own_extra = None
        if extra is not None and seen is not None:
            index = seen[:, None, :, None]
            own_extra = (
                extra[0][rows].gather(2, index.expand(-1, extra[0].shape[1], -1, extra[0].shape[3])),
                extra[1][rows].gather(2, index.expand(-1, extra[1].shape[1], -1, extra[1].shape[3])),
            )
        # Where each vector of the group stands among all T + E: the columns of its buckets.
        places = torch.arange(length, device=rows.device).expand(len(rows), -1)
        if seen is not None:
            places = torch.cat((places, seen + tokens), dim=1)
        index = places[:, None, None, :]
        own = AttentionReplay()
        if kept is not None:
            own.buckets = kept[rows].gather(3, index.expand(-1, kept.shape[1], kept.shape[2], -1))
        parts = (shared[rows, :, :length], rotated[rows, :, :length], v[rows, :, :length])
        out[rows, :, :length] = _attend(layer, parts, own_extra, _of_rows(info, rows, length), own, dropout_p, lsh)
        if kept is None and own.buckets is not None:
            pieces.append((rows, index, own.buckets))
    if pieces:
        replay.buckets = _collected(pieces, shared.shape[0], tokens + extras)
    return out


def _of_rows(info: SequenceInfo, rows: Tensor, length: int) -> SequenceInfo:
    """What a layer knows of some rows of one length, none of which has padding."""
    pairs = info.attention_mask
    if pairs is not None:
        pairs = (pairs[rows] if pairs.shape[0] > 1 else pairs)[:, :length, :length]
    documents = None if info.documents is None else info.documents[rows, :length]
    return replace(info, mask=None, documents=documents, attention_mask=pairs, context=None, context_mask=None)


def _collected(pieces: list[tuple[Tensor, Tensor, Tensor]], batch: int, columns: int) -> Tensor:
    """Buckets of groups of rows in one tensor [B, H, R, columns]; padding stands behind every bucket."""
    heads, rounds = pieces[0][2].shape[1:3]
    last = max(int(buckets.max()) for _, _, buckets in pieces) + 1
    wide = torch.int32 if any(buckets.dtype == torch.int32 for _, _, buckets in pieces) else pieces[0][2].dtype
    collected = torch.full((batch, heads, rounds, columns), last, dtype=wide, device=pieces[0][2].device)
    for rows, index, buckets in pieces:
        of_rows = collected[rows].scatter_(3, index.expand(-1, heads, rounds, -1), buckets.to(wide))
        collected[rows] = of_rows
    return collected


def _attend(
    layer: LSHSelfAttention,
    parts: tuple[Tensor, Tensor, Tensor],
    extra: tuple[Tensor, Tensor] | None,
    info: SequenceInfo,
    replay: AttentionReplay,
    dropout_p: float,
    lsh: HeadGroup,
) -> Tensor:
    config = layer.config
    shared, rotated, v = parts
    tokens = shared.shape[2]
    extra_mask = mask_of_extra(extra, info)
    length = tokens + (0 if extra is None else extra[0].shape[2])
    if length <= config.full_attention_threshold:
        # Unrotated, as reformer-pytorch has it.
        return shared_qk_attention(
            shared,
            v,
            key_norm=config.key_norm,
            num_shifted_heads=layer.shifted_of(lsh),
            dropout_p=dropout_p,
            causal=layer.causal,
            mask_BT=info.mask,
            attention_mask_BTT=info.attention_mask,
            documents_BT=info.documents,
            extra=extra,
            extra_mask_BE=extra_mask,
        )
    # reformer-pytorch's rule: as many buckets as the current length has chunks.
    num_buckets = config.buckets_per_round or max(2, 2 * -(-length // (2 * config.bucket_size)))
    mask = info.mask
    if extra is not None:
        # They are hashed and sorted with the tokens, behind which they stand.
        shared, rotated = (torch.cat((x, extra[0]), dim=2) for x in (shared, rotated))
        v = torch.cat((v, extra[1]), dim=2)
        if mask is not None or extra_mask is not None:
            real = shared.new_ones(shared.shape[0], length, dtype=torch.bool)
            if mask is not None:
                real[:, :tokens] = mask
            if extra_mask is not None:
                real[:, tokens:] = extra_mask
            mask = real
    buckets = layer.hash(shared, num_buckets, info, replay, lsh)
    return chunked_lsh_attention(
        rotated,
        v,
        buckets,
        chunk_size=config.bucket_size,
        key_norm=config.key_norm,
        causal=layer.causal,
        attend_across_buckets=config.attend_across_buckets,
        allow_duplicates=config.allow_duplicate_attention,
        num_shifted_heads=layer.shifted_of(lsh),
        dropout_p=dropout_p,
        mask_BT=mask,
        attention_mask_BTT=info.attention_mask,
        documents_BT=info.documents,
        num_queries=tokens,
    )
