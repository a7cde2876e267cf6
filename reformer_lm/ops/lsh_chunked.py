"""LSH attention over fixed chunks of the sorted order, as trax, reformer-pytorch and transformers do it.

All rounds stand in one long sorted order that is cut into chunks; a chunk attends to itself and to the chunk before
(the first one to the last). Contents are masked causally, but later tokens move the cuts between chunks, so an
output *does* depend on the future through the structure. It is here for weights trained that way, for parity
tests against those packages, and for bidirectional models; `reformer_lm.ops.lsh_attention` is the exactly causal one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import dropout, pad
from torch.utils.checkpoint import checkpoint

from reformer_lm.ops.hashing import sort_by_bucket
from reformer_lm.ops.keys import SELF_ATTENTION_BIAS, KeyNorm, normalize_keys, shift_values
from reformer_lm.ops.shared_qk import check_inputs, check_masks

# Logits are held for so many elements at a time, but for at least one (batch, head) row.
_MAX_LOGITS = 1 << 26

# Keeps the logarithm finite where a pair is counted in no round; see `_Chunks.log_duplicates`.
_NO_COUNT = 1e-9


def chunked_lsh_attention(
    qk_BHTD: Tensor,
    v_BHTD: Tensor,
    buckets_BHRT: Tensor,
    *,
    chunk_size: int,
    key_norm: KeyNorm = "unit",
    causal: bool = True,
    attend_across_buckets: bool = True,
    allow_duplicates: bool = True,
    num_shifted_heads: int = 0,
    dropout_p: float = 0.0,
    mask_BT: Tensor | None = None,
    attention_mask_BTT: Tensor | None = None,
    documents_BT: Tensor | None = None,
    num_queries: int | None = None,
) -> Tensor:
    """Chunked LSH attention with shared queries and keys.

    Of the T vectors the first ``num_queries`` (t) are the sequence's own. Those behind them, learned memory and a
    context, are hashed and sorted with them and may be seen by all of them; they have no output.

    Args:
        qk_BHTD: shared query/key vectors [B, H, T, D]; T need not be a multiple of the chunk size.
        v_BHTD: values [B, H, T, D_v].
        buckets_BHRT: integer buckets [B, H, R, T] from `hash_vectors`, at least 0.
        chunk_size: tokens per chunk.
        key_norm: see `normalize_keys`. Logits are scaled by 1 / sqrt(D).
        causal: whether later tokens are hidden.
        attend_across_buckets: whether a token sees other buckets of its two chunks (the peers' default).
        allow_duplicates: whether a key met in several rounds counts once for each (the peers' default). Otherwise
            its weight is divided by their number, as the peers count: a key that stands with the query in no
            round's chunks, as one that the first chunk of a round finds in the last of the round before, is divided
            by 1e-9.
        num_shifted_heads: the last so many heads read the value that followed each match; see `shift_values`. They
            never read themselves (with no match their output is 0), nor a value that a mask hides from them. The
            vectors behind the sequence they read as they are.
        dropout_p: probability of dropping an attention weight.
        mask_BT: optional bool [B, T], True for real tokens, False for padding, which only attends to itself and is
            not attended to.
        attention_mask_BTT: optional bool [B or 1, t, t], True where a query (row) may see a key (column).
        documents_BT: optional integers [B, t]; a token sees only tokens of the same number.
        num_queries: t; None means T.

    Returns:
        [B, H, t, D_v].

    Raises:
        ValueError: shapes or types that do not fit, or shifted heads without causality.

    Source: Kitaev et al. 2020, section 2; masking and merging order as in reformer-pytorch's LSHAttention.
    """
    check_inputs(qk_BHTD, v_BHTD, num_shifted_heads, causal)
    batch, heads, tokens = qk_BHTD.shape[:3]
    queries = tokens if num_queries is None else num_queries
    _check_chunks(qk_BHTD, buckets_BHRT, chunk_size, queries)
    check_masks(batch, tokens, mask_BT, None, None)
    check_masks(batch, queries, None, attention_mask_BTT, documents_BT)
    values = shift_values(v_BHTD[:, :, :queries], num_shifted_heads)
    if queries < tokens:
        values = torch.cat((values, v_BHTD[:, :, queries:]), dim=2)
    settings = _Settings(
        # A longer chunk would hold nothing but padding besides.
        chunk_size=min(chunk_size, tokens),
        key_norm=key_norm,
        causal=causal,
        attend_across_buckets=attend_across_buckets,
        allow_duplicates=allow_duplicates,
        shifts=num_shifted_heads > 0,
        dropout_p=dropout_p,
        num_queries=queries,
        mask=mask_BT,
        attention_mask=_for_both_kinds_of_heads(attention_mask_BTT, num_shifted_heads > 0),
        documents=documents_BT,
    )
    row = torch.arange(batch * heads, device=qk_BHTD.device)
    rows = (
        qk_BHTD.flatten(0, 1),
        values.flatten(0, 1),
        buckets_BHRT.flatten(0, 1),
        row // heads,
        row % heads >= heads - num_shifted_heads,
    )
    length = tokens + -tokens % settings.chunk_size
    step = max(1, _MAX_LOGITS // (buckets_BHRT.shape[2] * length * 2 * settings.chunk_size))
    slices = list(zip(*(x.split(step) for x in rows), strict=True))
    if len(slices) > 1 and torch.is_grad_enabled() and (qk_BHTD.requires_grad or v_BHTD.requires_grad):
        # The graph would keep the logits of all slices.
        outs = [
            checkpoint(_attend, settings, *piece, use_reentrant=False, preserve_rng_state=dropout_p > 0)
            for piece in slices
        ]
    else:
        outs = [_attend(settings, *piece) for piece in slices]
    return torch.cat(outs).unflatten(0, (batch, heads))


def _check_chunks(qk: Tensor, buckets: Tensor, chunk_size: int, num_queries: int) -> None:
    batch, heads, tokens = qk.shape[:3]
    if buckets.dim() != 4 or (*buckets.shape[:2], buckets.shape[3]) != (batch, heads, tokens):
        raise ValueError(
            f"buckets must be [B, H, R, T] as qk {tuple(qk.shape)} is [B, H, T, D], got {tuple(buckets.shape)}"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if not 1 <= num_queries <= tokens:
        raise ValueError(f"num_queries must lie between 1 and the {tokens} vectors of qk, got {num_queries}")


def _for_both_kinds_of_heads(attention_mask: Tensor | None, shifts: bool) -> Tensor | None:
    """[B, t, t] -> [B, 1, t, t], or [B, 2, t, t] where a second mask holds for shifted heads.

    Those read the value behind a key, so both must be visible; a query may always read its own.
    """
    if attention_mask is None:
        return None
    if not shifts:
        return attention_mask.unsqueeze(1)
    behind = pad(attention_mask[:, :, 1:], (0, 1), value=True)
    behind.diagonal(-1, dim1=1, dim2=2).fill_(True)
    return torch.stack((attention_mask, attention_mask & behind), dim=1)


@dataclass(frozen=True)
class _Settings:
    """Arguments of `chunked_lsh_attention`; the masks are those of the whole batch."""

    chunk_size: int
    key_norm: KeyNorm
    causal: bool
    attend_across_buckets: bool
    allow_duplicates: bool
    shifts: bool
    dropout_p: float
    num_queries: int
    mask: Tensor | None
    attention_mask: Tensor | None
    documents: Tensor | None


class _Chunks:
    """The sorted order of N rows, all rounds in one, cut into C chunks of W places; a chunk sees the one before it.

    Attributes:
        buckets: int64 [N, R, T], T a multiple of W.
        order: int64 [N, R * T], the position that stands at each place, by (round, bucket, position).
        place: int64 [N, R, T], where each position stands in ``order`` in each round.
        count: C.
    """

    def __init__(self, buckets: Tensor, chunk_size: int) -> None:
        self.buckets = buckets
        self.chunk_size = chunk_size
        rounds, length = buckets.shape[1:]
        order, inverse, _ = sort_by_bucket(buckets)
        self.order = order.flatten(1)
        self.place = inverse + length * torch.arange(rounds, device=buckets.device).unsqueeze(1)
        self.count = rounds * length // chunk_size

    def take(self, x: Tensor) -> Tensor:
        """From the positions to the chunks: [N, T, ...] -> [N, C, W, ...]."""
        index = self.order if x.dim() == 2 else self.order.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return x.gather(1, index).unflatten(1, (self.count, self.chunk_size))

    def with_previous(self, x: Tensor) -> Tensor:
        """[N, C, W, ...] -> [N, C, 2W, ...]; a lone chunk has none before it."""
        return x if self.count == 1 else torch.cat((x, x.roll(1, dims=1)), dim=2)

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of queries and keys: [N, T] -> [N, C, W, 1] and [N, C, 1, 2W]."""
        x = self.take(x)
        return x.unsqueeze(3), self.with_previous(x).unsqueeze(2)

    def bucket_pairs(self) -> tuple[Tensor, Tensor]:
        """Buckets of queries and keys, numbered through all rounds: [N, C, W, 1] and [N, C, 1, 2W].

        The first chunk of a round looks back to the last one of the round before, whose buckets are others.
        """
        rounds, length = self.buckets.shape[1:]
        sorted_buckets = self.buckets.gather(2, self.order.unflatten(1, (rounds, length)))
        through = sorted_buckets * rounds + torch.arange(rounds, device=self.order.device).unsqueeze(1)
        x = through.flatten(1).unflatten(1, (self.count, self.chunk_size))
        return x.unsqueeze(3), self.with_previous(x).unsqueeze(2)

    def by_round(self, x: Tensor, tokens: int) -> Tensor:
        """Back to the first ``tokens`` positions: [N, C, W, D] -> [N, R, tokens, D]."""
        place = self.place[:, :, :tokens]
        index = place.flatten(1).unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return x.flatten(1, 2).gather(1, index).unflatten(1, place.shape[1:])

    def log_duplicates(self, same_bucket: bool, dtype: torch.dtype) -> Tensor:
        """Logarithm of the number of rounds whose chunks hold the key beside the query: [N, C, W, 2W].

        The first chunk of a round looks back into the round before, where it finds keys that no round counts.

        Args:
            same_bucket: whether only rounds count in which the two share their bucket.
            dtype: of the result.
        """
        chunk = self.place // self.chunk_size
        total: Tensor | None = None
        for r in range(chunk.shape[1]):
            of_query, of_key = self.pairs(chunk[:, r])
            together = (of_query == of_key).logical_or_(of_query == (of_key + 1) % self.count)
            if same_bucket:
                of_query, of_key = self.pairs(self.buckets[:, r])
                together &= of_query == of_key
            total = together.to(torch.int16) if total is None else total.add_(together)
        assert total is not None
        return total.to(dtype).add_(_NO_COUNT).log_()


def _attend(settings: _Settings, qk: Tensor, v: Tensor, buckets: Tensor, batch: Tensor, shifts: Tensor) -> Tensor:
    """Attention of N (batch, head) rows.

    Args:
        settings: of the call.
        qk: [N, T, D].
        v: values [N, T, D_v], already shifted where a head shifts.
        buckets: [N, R, T].
        batch: place of each row in the batch [N].
        shifts: whether the head of each row shifts [N].

    Returns:
        [N, t, D_v].
    """
    tokens, dim = qk.shape[1:]
    buckets = buckets.long()
    padding = -tokens % settings.chunk_size
    values = v
    if padding:
        qk, values = pad(qk, (0, 0, 0, padding)), pad(v, (0, 0, 0, padding))
        # Behind every bucket, so that the padding ends up in the last chunk of its round.
        last = buckets.amax(dim=-1, keepdim=True) + 1
        buckets = torch.cat((buckets, last.expand(-1, -1, padding)), dim=-1)
    chunks = _Chunks(buckets, settings.chunk_size)
    q = chunks.take(qk)
    keys = chunks.with_previous(normalize_keys(q, settings.key_norm))
    values = chunks.with_previous(chunks.take(values))

    logits = (q @ keys.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)).mul_(1.0 / math.sqrt(dim))
    if not settings.allow_duplicates:
        logits.sub_(chunks.log_duplicates(not settings.attend_across_buckets, logits.dtype))
    position = torch.arange(qk.shape[1], device=qk.device).expand(qk.shape[0], -1)
    of_query, of_key = chunks.pairs(position)
    forbidden = _forbidden(settings, chunks, of_query, of_key, batch, shifts, tokens)
    # Finite: beside the self-attention bias it vanishes all the same.
    logits.masked_fill_(forbidden, torch.finfo(logits.dtype).min)
    logits.masked_fill_(of_query == of_key, SELF_ATTENTION_BIAS)

    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    weights = torch.softmax(logits, dim=-1)
    if settings.dropout_p:
        weights = dropout(weights, settings.dropout_p)
    out = chunks.by_round(weights.to(values.dtype) @ values, settings.num_queries)
    lse = chunks.by_round(lse, settings.num_queries)
    merged = (out * torch.softmax(lse, dim=1)).sum(dim=1)
    if settings.shifts:
        # No match in any round: the weights went to the token itself, which a shifted head must not read.
        matched = (lse > SELF_ATTENTION_BIAS / 2).any(dim=1)
        merged = merged * (matched | ~shifts.view(-1, 1, 1))
    return merged.to(v.dtype)


def _forbidden(
    settings: _Settings, chunks: _Chunks, of_query: Tensor, of_key: Tensor, batch: Tensor, shifts: Tensor, tokens: int
) -> Tensor:
    """Which keys a query must not see, besides itself: bool [N, C, W, 2W].

    Args:
        settings: of the call.
        chunks: of T vectors and the padding behind them.
        of_query: positions of the queries [N, C, W, 1].
        of_key: positions of the keys [N, C, 1, 2W].
        batch: place of each row in the batch [N].
        shifts: whether the head of each row shifts [N].
        tokens: T.
    """
    own = settings.num_queries
    padding = chunks.buckets.shape[2] - tokens
    is_own = of_key < own
    # The vectors behind the sequence are never later.
    forbidden = of_query < of_key.masked_fill(~is_own, -1)
    if not settings.causal:
        forbidden.fill_(False)
    documents = None if settings.documents is None else settings.documents[batch]
    if documents is not None:
        left, right = chunks.pairs(pad(documents, (0, padding + tokens - own)))
        forbidden |= (left != right).logical_and_(is_own)
    if padding or settings.mask is not None or (settings.shifts and documents is not None):
        real = torch.ones(len(batch), tokens, dtype=torch.bool, device=batch.device)
        if settings.mask is not None:
            real = settings.mask[batch]
        readable = real
        if settings.shifts:
            readable = real & (_readable_behind(real, documents, own) | ~shifts.unsqueeze(1))
        real, _ = chunks.pairs(pad(real, (0, padding)))
        _, readable = chunks.pairs(pad(readable, (0, padding)))
        # Padding sees nothing but itself: what it becomes decides where the next layer sorts it.
        forbidden.logical_or_(~real).logical_or_(~readable)
    if not settings.attend_across_buckets:
        left, right = chunks.bucket_pairs()
        forbidden |= left != right
    if settings.attention_mask is not None:
        # One for the whole batch, or for both kinds of heads, stands there once.
        rows, kinds = (size - 1 for size in settings.attention_mask.shape[:2])
        row, kind = (x.view(-1, 1, 1, 1) for x in (batch.clamp(max=rows), shifts.long().clamp(max=kinds)))
        visible = settings.attention_mask[row, kind, of_query.clamp(max=own - 1), of_key.clamp(max=own - 1)]
        forbidden |= visible.logical_not_().logical_and_(is_own)
    return forbidden


def _readable_behind(real: Tensor, documents: Tensor | None, own: int) -> Tensor:
    """Whether the value that a shifted head reads for a key is real and of the key's document: bool [N, T]."""
    behind = torch.ones_like(real)
    behind[:, : own - 1] = real[:, 1:own]
    if documents is not None:
        behind[:, : own - 1] &= documents[:, 1:] == documents[:, :-1]
    return behind
