"""Windowed (local) attention in blocks, through torch's scaled_dot_product_attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


def local_attention(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    *,
    window: int,
    exact_window: bool = True,
    causal: bool = True,
    self_bias: float = 0.0,
    dropout_p: float = 0.0,
    mask_BT: Tensor | None = None,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """Attention over the last ``window`` tokens and, without causality, over as many of the next ones.

    Args:
        q_BHTD: queries [B, H, T, D].
        k_BHTD: keys [B, H, T, D].
        v_BHTD: values [B, H, T, D_v].
        window: number of tokens seen, the token itself included. It is also the block length.
        exact_window: True: token i sees j with i - window < j <= i. False: token i sees its own block up to i and
            the whole block before, as the local-attention package does (between ``window`` and 2 ``window`` tokens).
        causal: whether later tokens are hidden. If not, exactly token i sees j with abs(i - j) < window; in blocks it
            sees all of its own block, the block before and the block behind.
        self_bias: added to a token's logit with itself (-5e4 with shared queries and keys).
        dropout_p: probability of dropping an attention weight.
        mask_BT: optional bool [B, T], True where a token may be attended to; a token with nothing to attend to
            attends to itself.
        documents_BT: optional integers [B, T], the same within a document; tokens see their own document only.

    Returns:
        [B, H, T, D_v].
    """
    batch, heads, tokens, dim = q_BHTD.shape
    window = min(window, tokens)
    blocks = -(-tokens // window)
    padding = blocks * window - tokens
    scale = 1.0 / math.sqrt(dim)
    # With causality the padding, which stands behind the last token, is hidden from every real one.
    q, k, v = (pad(x.flatten(0, 1), (0, 0, 0, padding)) for x in (q_BHTD, k_BHTD, v_BHTD))
    q_blocks = q.unflatten(1, (blocks, window))
    allowed, bias = _window_mask(window, exact_window, causal, self_bias, q)
    keys_allowed: Tensor | None = None
    if mask_BT is None and not causal:
        mask_BT = torch.ones(batch, tokens, dtype=torch.bool, device=q.device)
    if mask_BT is not None:
        keys_allowed = pad(mask_BT, (0, padding), value=False)
        keys_allowed = keys_allowed.unsqueeze(1).expand(-1, heads, -1).flatten(0, 1)
    documents: Tensor | None = None
    if documents_BT is not None:
        documents = pad(documents_BT, (0, padding), value=-1).unsqueeze(1).expand(-1, heads, -1).flatten(0, 1)

    if not causal:
        # [n, blocks, 3W, D]: each block's keys with those of the blocks around it; nobody stands beyond the ends.
        k_triples, v_triples = (
            pad(x, (0, 0, window, window)).unfold(1, 3 * window, window).transpose(-1, -2) for x in (k, v)
        )
        assert keys_allowed is not None
        keys_triples = pad(keys_allowed, (window, window), value=False).unfold(1, 3 * window, window)
        document_triples = None
        if documents is not None:
            document_triples = pad(documents, (window, window), value=-1).unfold(1, 3 * window, window)
        out = _attend(
            q_blocks, k_triples, v_triples, allowed, bias, keys_triples, document_triples, dropout_p, scale, window
        )
        return out.flatten(1, 2)[:, :tokens].unflatten(0, (batch, heads))
    # The first block has no block before it.
    first = _attend(
        q_blocks[:, :1],
        k[:, None, :window],
        v[:, None, :window],
        allowed[:, window:],
        bias[:, window:],
        None if keys_allowed is None else keys_allowed[:, None, :window],
        None if documents is None else documents[:, None, :window],
        dropout_p,
        scale,
        0,
    )
    if blocks == 1:
        out = first
    else:
        # [n, blocks - 1, 2W, D]: each block's keys with those of the block before it, an overlapping view.
        k_pairs, v_pairs = (x.unfold(1, 2 * window, window).transpose(-1, -2) for x in (k, v))
        keys_pairs = None if keys_allowed is None else keys_allowed.unfold(1, 2 * window, window)
        document_pairs = None if documents is None else documents.unfold(1, 2 * window, window)
        rest = _attend(
            q_blocks[:, 1:], k_pairs, v_pairs, allowed, bias, keys_pairs, document_pairs, dropout_p, scale, window
        )
        out = torch.cat((first, rest), dim=1)
    return out.flatten(1, 2)[:, :tokens].unflatten(0, (batch, heads))


def _window_mask(
    window: int, exact_window: bool, causal: bool, self_bias: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Which keys each of W queries may see, and the bias on them.

    The 2W keys are the block before and the own block; without causality the block behind follows.
    """
    keys = (2 if causal else 3) * window
    column = torch.arange(keys, device=like.device)
    own = torch.arange(window, 2 * window, device=like.device).unsqueeze(1)
    allowed = (column <= own) if causal else torch.ones(window, keys, dtype=torch.bool, device=like.device)
    if exact_window:
        allowed = allowed & (column > own - window) & (column < own + window)
    bias = torch.zeros(window, keys, dtype=like.dtype, device=like.device)
    bias.masked_fill_(column == own, self_bias)
    return allowed, bias


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    bias: Tensor,
    keys_allowed: Tensor | None,
    documents: Tensor | None,
    dropout_p: float,
    scale: float,
    own_begin: int,
) -> Tensor:
    """Attention of blocks of W queries, the first of which stands at place ``own_begin`` among its block's keys."""
    full = bias.masked_fill(~allowed, -math.inf)
    if keys_allowed is not None:
        # A token always keeps itself, or a fully masked row would be NaN.
        own = torch.arange(full.shape[0], device=q.device).unsqueeze(1) + own_begin
        itself = torch.arange(full.shape[1], device=q.device) == own
        full = torch.where(keys_allowed.unsqueeze(2) | itself, full, -math.inf)
    if documents is not None:
        of_queries = documents[..., own_begin : own_begin + full.shape[-2]]
        same = of_queries.unsqueeze(-1) == documents.unsqueeze(-2)
        full = full.masked_fill(~same, -math.inf)
    if full.dim() == 2:
        full = full.expand(1, 1, -1, -1)
    return scaled_dot_product_attention(q, k, v, attn_mask=full, dropout_p=dropout_p, scale=scale)
