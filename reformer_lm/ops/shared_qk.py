"""Full attention with shared queries and keys.

What LSH attention becomes with one bucket and an endless window: every token attends to the other tokens it may see,
and to itself only if there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from reformer_lm.ops.keys import KeyNorm, normalize_keys, shift_values

# Where masks are needed they are made for this many query rows at a time.
_QUERY_ROWS = 512


def shared_qk_attention(
    qk_BHTD: Tensor,
    v_BHTD: Tensor,
    *,
    key_norm: KeyNorm = "rms",
    num_shifted_heads: int = 0,
    dropout_p: float = 0.0,
    causal: bool = True,
    mask_BT: Tensor | None = None,
    attention_mask_BTT: Tensor | None = None,
    documents_BT: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    extra_mask_BE: Tensor | None = None,
) -> Tensor:
    """Every token attends to all others that it may see, and to itself only if there are none.

    Causal attention without masks, and each of several documents, goes through the kernel's own causal form; no
    T x T mask is made. Otherwise masks are made for some hundred query rows at a time.

    Args:
        qk_BHTD: shared query/key vectors [B, H, T, D].
        v_BHTD: values [B, H, T, D_v].
        key_norm: see `normalize_keys`. Logits are scaled by 1 / sqrt(D).
        num_shifted_heads: the last so many heads read the value that followed each match; see `shift_values`. They
            never read themselves (with no match their output is 0), nor a value that a mask hides from them.
        dropout_p: probability of dropping an attention weight.
        causal: whether later tokens are hidden.
        mask_BT: optional bool [B, T], True for real tokens, False for padding, which sees nothing but itself and is
            seen by nobody.
        attention_mask_BTT: optional bool [B or 1, T, T], True where a query (row) may see a key (column).
        documents_BT: optional integers [B, T], the same within a document; a token sees only its own document. Where
            a document's tokens stand together, as they should, that takes no mask.
        extra: optional shared vectors [B or 1, H, E, D] and values [B or 1, H, E, D_v] that every real token sees
            besides (learned memory, a context), whatever the other masks say. Shifted heads read them as they are.
        extra_mask_BE: optional bool [B, E], False for padding of the extra vectors.

    Returns:
        [B, H, T, D_v].

    Raises:
        ValueError: shapes or types that do not fit, or shifted heads without causality.

    Source: Kitaev et al. 2020, section 2, "shared-QK Transformer"; masks as in reformer-pytorch's FullQKAttention.
    """
    check_inputs(qk_BHTD, v_BHTD, num_shifted_heads, causal)
    batch, _, tokens = qk_BHTD.shape[:3]
    check_masks(batch, tokens, mask_BT, attention_mask_BTT, documents_BT)
    _check_extra(qk_BHTD, v_BHTD, extra, extra_mask_BE)
    settings = _Settings(key_norm, num_shifted_heads, dropout_p, causal)
    masks = _Masks(mask_BT, attention_mask_BTT, extra_mask_BE)
    if documents_BT is not None:
        begins = _documents_by_length(documents_BT)
        if begins is None:
            masks = replace(masks, documents=documents_BT)
        elif set(begins) != {tokens}:
            return _attend_by_document(qk_BHTD, v_BHTD, extra, masks, settings, begins)
    return _attend(qk_BHTD, v_BHTD, extra, masks, settings)


def check_inputs(qk: Tensor, v: Tensor, num_shifted_heads: int, causal: bool) -> None:
    """Checks what shared-QK attention of any kind is given.

    Args:
        qk: shared vectors [B, H, T, D].
        v: values [B, H, T, D_v].
        num_shifted_heads: how many of the last heads shift.
        causal: whether later tokens are hidden.

    Raises:
        ValueError: shapes that disagree, or an impossible number of shifted heads.
    """
    if qk.dim() != 4 or v.dim() != 4 or qk.shape[:3] != v.shape[:3]:
        raise ValueError(f"expected qk [B, H, T, D] and v [B, H, T, D_v], got {tuple(qk.shape)} and {tuple(v.shape)}")
    heads = qk.shape[1]
    if not 0 <= num_shifted_heads <= heads:
        raise ValueError(f"num_shifted_heads must lie between 0 and the {heads} heads, got {num_shifted_heads}")
    if num_shifted_heads and not causal:
        raise ValueError(
            f"num_shifted_heads={num_shifted_heads} needs causal=True: without it what follows a match can be the "
            "token itself; set num_shifted_heads=0"
        )


def check_masks(
    batch: int, tokens: int, mask: Tensor | None, attention_mask: Tensor | None, documents: Tensor | None
) -> None:
    """Checks the masks over a sequence's own tokens.

    Args:
        batch: B.
        tokens: T.
        mask: bool [B, T], or None.
        attention_mask: bool [B or 1, T, T], or None.
        documents: integers [B, T], or None.

    Raises:
        ValueError: another shape or type.
    """
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, tokens)):
        raise ValueError(f"mask_BT must be bool {[batch, tokens]}, got {mask.dtype} {list(mask.shape)}")
    if attention_mask is not None and (
        attention_mask.dtype != torch.bool or attention_mask.shape not in {(batch, tokens, tokens), (1, tokens, tokens)}
    ):
        raise ValueError(
            f"attention_mask_BTT must be bool {[batch, tokens, tokens]} (or with 1 in place of the batch), "
            f"got {attention_mask.dtype} {list(attention_mask.shape)}"
        )
    if documents is not None and (
        documents.is_floating_point() or documents.dtype == torch.bool or documents.shape != (batch, tokens)
    ):
        raise ValueError(
            f"documents_BT must be integers {[batch, tokens]}, got {documents.dtype} {list(documents.shape)}"
        )


def _check_extra(qk: Tensor, v: Tensor, extra: tuple[Tensor, Tensor] | None, extra_mask: Tensor | None) -> None:
    if extra is None:
        if extra_mask is not None:
            raise ValueError("extra_mask_BE is given without extra: leave it out, or give the vectors it masks")
        return
    length = extra[0].shape[2] if extra[0].dim() == 4 else -1
    for name, given, own in (("vectors", extra[0], qk), ("values", extra[1], v)):
        wanted = {(size, own.shape[1], length, own.shape[3]) for size in (1, own.shape[0])}
        if tuple(given.shape) not in wanted:
            raise ValueError(
                f"the extra {name} must be [{own.shape[0]} or 1, {own.shape[1]}, E, {own.shape[3]}], "
                f"got {list(given.shape)}"
            )
    if extra_mask is not None and (extra_mask.dtype != torch.bool or extra_mask.shape != (qk.shape[0], length)):
        raise ValueError(
            f"extra_mask_BE must be bool {[qk.shape[0], length]}, got {extra_mask.dtype} {list(extra_mask.shape)}"
        )


@dataclass(frozen=True)
class _Settings:
    key_norm: KeyNorm
    num_shifted_heads: int
    dropout_p: float
    causal: bool


@dataclass(frozen=True)
class _Masks:
    """Who may see whom, where that is not plain causality.

    Attributes:
        real: bool [B, T], False for padding.
        attention: bool [B or 1, T, T], by query and key.
        extra: bool [B, E], False for padding of the extra vectors.
        documents: integers [B, T]; only where the tokens of a document do not stand together.
    """

    real: Tensor | None
    attention: Tensor | None
    extra: Tensor | None
    documents: Tensor | None = None

    def given(self) -> bool:
        return any(mask is not None for mask in (self.real, self.attention, self.extra, self.documents))

    def own_keys(self, begin: int, end: int, keys: int, causal: bool, shifted: bool, device: torch.device) -> Tensor:
        """Which of the first ``keys`` tokens the queries begin..end may see: bool [B or 1, end - begin, keys].

        A shifted head reads the value *behind* a key, so both must be visible; a query may always read its own.
        """
        rows = torch.arange(begin, end, device=device).unsqueeze(1)
        columns = torch.arange(keys, device=device)
        allowed = (columns < rows if causal else columns != rows).unsqueeze(0)
        if self.attention is not None:
            attention = self.attention[:, begin:end]
            allowed = allowed & attention[:, :, :keys]
            if shifted:
                behind = pad(attention, (0, 1), value=True)[:, :, 1 : keys + 1]
                allowed = allowed & (behind | (columns + 1 == rows))
        if self.real is not None:
            allowed = allowed & self.real[:, None, :keys] & self.real[:, begin:end, None]
            if shifted:
                allowed = allowed & pad(self.real, (0, 1), value=True)[:, None, 1 : keys + 1]
        if self.documents is not None:
            allowed = allowed & (self.documents[:, begin:end, None] == self.documents[:, None, :keys])
            if shifted:
                same = self.documents[:, 1:] == self.documents[:, :-1]
                allowed = allowed & pad(same, (0, 1), value=True)[:, None, :keys]
        return allowed

    def extra_keys(self, begin: int, end: int, count: int, device: torch.device) -> Tensor:
        """Which extra vectors the queries begin..end may see: bool [B or 1, end - begin, E]."""
        allowed = torch.ones(1, end - begin, count, dtype=torch.bool, device=device)
        if self.extra is not None:
            allowed = allowed & self.extra.unsqueeze(1)
        if self.real is not None:
            allowed = allowed & self.real[:, begin:end, None]
        return allowed


def _attend(qk: Tensor, v: Tensor, extra: tuple[Tensor, Tensor] | None, masks: _Masks, settings: _Settings) -> Tensor:
    batch, heads, tokens, _ = qk.shape
    keys = normalize_keys(qk, settings.key_norm)
    values = shift_values(v, settings.num_shifted_heads)
    extras = 0
    if extra is not None and extra[0].shape[2]:
        extras = extra[0].shape[2]
        extra_keys, extra_values = normalize_keys(extra[0], settings.key_norm), extra[1]
        keys = torch.cat((extra_keys.expand(batch, -1, -1, -1), keys), dim=2)
        values = torch.cat((extra_values.expand(batch, -1, -1, -1), values), dim=2)
    # A token that sees nothing reads itself, or nothing where the head shifts.
    reads_itself = torch.arange(heads, device=v.device) < heads - settings.num_shifted_heads
    own = v * reads_itself.view(-1, 1, 1) if settings.num_shifted_heads else v
    # The causal form needs E - 1 queries in front that nobody asks for; with many of them masks are cheaper.
    if settings.causal and not masks.given() and extras <= tokens + 1:
        return _attend_causally(qk, keys, values, own, extras, settings)
    if not settings.num_shifted_heads:
        return _attend_in_blocks(qk, keys, values, own, extras, masks, settings, shifted=False)
    # What shifted heads may read is another question, with another mask.
    plain = heads - settings.num_shifted_heads
    parts = []
    for first, last in ((0, plain), (plain, heads)):
        if first < last:
            q, k, of_values, of_own = (x[:, first:last] for x in (qk, keys, values, own))
            parts.append(_attend_in_blocks(q, k, of_values, of_own, extras, masks, settings, shifted=first == plain))
    return torch.cat(parts, dim=1)


def _attend_causally(qk: Tensor, keys: Tensor, values: Tensor, own: Tensor, extras: int, settings: _Settings) -> Tensor:
    """Without any mask: "all extra vectors and all earlier tokens, not itself" as plain causal attention.

    Query t comes to stand at place E - 1 + t, behind E - 1 dummies, and the key of token s at place E + s: so it sees
    places 0 .. E - 1 + t, which are the extra vectors and the tokens 0 .. t - 1.
    """
    # The last token's key is seen by none.
    keys, values = keys[:, :, :-1], values[:, :, :-1]
    if extras:
        queries = pad(qk, (0, 0, extras - 1, 0))
    else:
        # The first token has nothing to see.
        queries = qk[:, :, 1:]
        if not queries.shape[2]:
            return own
    out = scaled_dot_product_attention(
        queries,
        keys,
        values,
        is_causal=True,
        dropout_p=settings.dropout_p,
        scale=1.0 / math.sqrt(qk.shape[-1]),
    )
    return out[:, :, extras - 1 :] if extras else torch.cat((own[:, :, :1], out), dim=2)


def _attend_in_blocks(
    qk: Tensor,
    keys: Tensor,
    values: Tensor,
    own: Tensor,
    extras: int,
    masks: _Masks,
    settings: _Settings,
    shifted: bool,
) -> Tensor:
    """With masks, made for some query rows at a time and once more in the backward pass."""
    tokens = qk.shape[2]

    def attend(begin: int, q: Tensor, k: Tensor, v: Tensor, fallback: Tensor) -> Tensor:
        end = begin + q.shape[2]
        to_own = masks.own_keys(begin, end, k.shape[2] - extras, settings.causal, shifted, q.device)
        to_extra = masks.extra_keys(begin, end, extras, q.device)
        rows = max(to_own.shape[0], to_extra.shape[0])
        allowed = torch.cat((to_extra.expand(rows, -1, -1), to_own.expand(rows, -1, -1)), dim=2).unsqueeze(1)
        # A row with nothing to see would give NaN: it may see everything here, and reads itself below.
        empty = ~allowed.any(dim=-1, keepdim=True)
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=allowed | empty,
            dropout_p=settings.dropout_p,
            scale=1.0 / math.sqrt(q.shape[-1]),
        )
        return torch.where(empty, fallback, out)

    run: Callable[..., Tensor] = attend
    if tokens > _QUERY_ROWS and torch.is_grad_enabled() and any(x.requires_grad for x in (qk, keys, values)):
        # The graph would keep the masks of all blocks.

        def run(*arguments: object) -> Tensor:
            return checkpoint(attend, *arguments, use_reentrant=False, preserve_rng_state=bool(settings.dropout_p))

    blocks = []
    for begin in range(0, tokens, _QUERY_ROWS):
        end = min(begin + _QUERY_ROWS, tokens)
        # Nothing behind the block is seen.
        seen = extras + (end if settings.causal else tokens)
        blocks.append(run(begin, qk[:, :, begin:end], keys[:, :, :seen], values[:, :, :seen], own[:, :, begin:end]))
    return torch.cat(blocks, dim=2)


def _documents_by_length(documents_BT: Tensor) -> dict[int, list[int]] | None:
    """Where documents begin, by their length: length -> places b * T + t. None where one is in several pieces."""
    begins: dict[int, list[int]] = {}
    tokens = documents_BT.shape[1]
    for index, row in enumerate(documents_BT.cpu()):
        names, lengths = torch.unique_consecutive(row, return_counts=True)
        if len(names.unique()) < len(names):
            return None
        begin = index * tokens
        for length in lengths.tolist():
            begins.setdefault(length, []).append(begin)
            begin += length
    return begins


def _attend_by_document(
    qk: Tensor,
    v: Tensor,
    extra: tuple[Tensor, Tensor] | None,
    masks: _Masks,
    settings: _Settings,
    documents: dict[int, list[int]],
) -> Tensor:
    """Each document by itself; those of one length are one batch."""
    batch, _, tokens, _ = qk.shape
    by_token_qk, by_token_v = (x.transpose(1, 2).flatten(0, 1) for x in (qk, v))
    pieces, places = [], []
    for length, begins in documents.items():
        place = torch.tensor(begins, device=qk.device).unsqueeze(1) + torch.arange(length, device=qk.device)
        row, position = place[:, 0] // tokens, place % tokens
        own_masks = _Masks(
            None if masks.real is None else masks.real.flatten()[place],
            _of_documents(masks.attention, row, position),
            None if masks.extra is None else masks.extra[row],
        )
        own_extra = None
        if extra is not None:
            own_extra = (_of_rows(extra[0], row), _of_rows(extra[1], row))
        out = _attend(
            by_token_qk[place].transpose(1, 2), by_token_v[place].transpose(1, 2), own_extra, own_masks, settings
        )
        pieces.append(out.transpose(1, 2).flatten(0, 1))
        places.append(place.flatten())
    order = torch.cat(places)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(batch * tokens, device=order.device))
    return torch.cat(pieces)[inverse].unflatten(0, (batch, tokens)).transpose(1, 2)


def _of_documents(attention: Tensor | None, row: Tensor, position: Tensor) -> Tensor | None:
    if attention is None:
        return None
    which = row if attention.shape[0] > 1 else torch.zeros_like(row)
    return attention[which.view(-1, 1, 1), position.unsqueeze(2), position.unsqueeze(1)]


def _of_rows(x: Tensor, row: Tensor) -> Tensor:
    return x[row] if x.shape[0] > 1 else x
