"""Exactly causal LSH attention in plain torch, for any device.

Per round the tokens are gathered into sorted order; there the attention is a sliding window with a per-row start,
done in blocks of queries against the window before them and themselves. Work is cut twice: into slices of (batch, head)
rows, so that nothing of size [rounds, T, 2W] is ever held for all heads, and inside a slice into groups of blocks whose
logits stay in the cache.

The backward pass stores no graph. Because the merged attention is one softmax over the union of the rounds, the
gradient of each round is the flash-attention backward pass called with the *merged* output and logsumexp.
Source: Dao et al. 2022 (arXiv 2205.14135), appendix B.2, for delta = rowsum(dO * O) and P = exp(S - L).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer_lm.ops.hashing import SortedBuckets
from reformer_lm.ops.kept_attention import KeptAttention
from reformer_lm.ops.keys import KeyNorm, normalize_keys
from reformer_lm.ops.lsh_slice import NO_WEIGHT, Memory, Settings, Slice

# Elements of one gathered tensor [rows, T, D] in a slice: on a CPU small enough to stay near the cache, on an
# accelerator large enough to fill it.
_SLICE_ELEMENTS = {"cpu": 1 << 19}
_SLICE_ELEMENTS_ELSEWHERE = 1 << 25


def lsh_attention_torch(
    qk_BHTD: Tensor,
    v_BHTD: Tensor,
    order: SortedBuckets | None,
    alone: Tensor | None,
    *,
    window: int,
    key_norm: KeyNorm,
    dropout_p: float = 0.0,
    allow_duplicates: bool = True,
    memory: tuple[Tensor, Tensor] | None = None,
    memory_mask: Tensor | None = None,
    kept: KeptAttention | None = None,
) -> Tensor:
    """See `reformer_lm.ops.lsh_attention` for the semantics.

    Args:
        qk_BHTD: shared query/key vectors [B, H, T, D].
        v_BHTD: values [B, H, T, D_v], already shifted where a head shifts.
        order: from `sort_by_bucket`, each [B, H, R, T]; None where ``kept`` has been filled.
        alone: optional int64, which of the B * H * T tokens read their own value, since they match none in any round.
            Others without a match read nothing.
        window: W.
        key_norm: see `normalize_keys`.
        dropout_p: probability of dropping an attention weight.
        allow_duplicates: whether a key met in several rounds counts once for each of them.
        memory: keys [H, M, D] and values [H, M, D_v] that every token sees; or each with its own for every row of the
            batch.
        memory_mask: optional bool [B, M], False for memory that a row does not see.
        kept: filled by the first call with it, and used by the second.

    Returns:
        [B, H, T, D_v] in the dtype of ``v_BHTD``.
    """
    # A seed of its own lets forward and backward pass draw the same dropout mask without storing it.
    seed = int(torch.randint(2**62, (), device="cpu")) if dropout_p else 0
    # A window longer than the sequence means the sequence.
    settings = Settings(min(window, qk_BHTD.shape[2]), key_norm, dropout_p, seed, allow_duplicates)
    memory_keys, memory_values = (None, None) if memory is None else memory
    places = (None, None, None) if order is None else (order.order, order.inverse, order.start)
    return _LSHAttention.apply(qk_BHTD, v_BHTD, memory_keys, memory_values, *places, alone, memory_mask, settings, kept)


class _LSHAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qk: Tensor,
        v: Tensor,
        memory_keys: Tensor | None,
        memory_values: Tensor | None,
        order: Tensor | None,
        inverse: Tensor | None,
        start: Tensor | None,
        alone: Tensor | None,
        memory_mask: Tensor | None,
        settings: Settings,
        kept: KeptAttention | None,
    ) -> Tensor:
        ctx.settings, ctx.memory_mask = settings, memory_mask
        if kept is not None and kept.out is not None:
            ctx.save_for_backward(
                qk, v, memory_keys, memory_values, kept.out, kept.logsumexp, kept.order, kept.start, alone
            )
            return kept.out.detach()
        assert order is not None and start is not None
        batch, heads, tokens, _ = qk.shape
        rows = batch * heads
        wide = torch.promote_types(qk.dtype, torch.float32)
        out = torch.empty(*v.shape, dtype=v.dtype, device=v.device)
        logsumexp = torch.empty(rows, tokens, dtype=wide, device=v.device)
        # Sorting again in the backward pass would cost more time than 32-bit copies of the order cost memory.
        order, start = order.int(), start.int()
        flat_out = out.view(rows, tokens, -1)
        with torch.autocast(device_type=qk.device.type, enabled=False):
            for piece in _pieces(qk, v, memory_keys, memory_values, memory_mask, order, start, inverse, settings):
                merged, total = piece.forward()
                # Where nothing matched, the rounds gave the token's own value. Any finite logsumexp does there; 0 makes
                # every weight of the backward pass vanish.
                nothing = total < NO_WEIGHT / 2
                flat_out[piece.rows] = merged.masked_fill_(nothing.unsqueeze(-1), 0.0)
                logsumexp[piece.rows] = total.masked_fill_(nothing, 0.0)
        if alone is not None:
            out.view(-1, v.shape[-1])[alone] = v.reshape(-1, v.shape[-1]).index_select(0, alone)
        ctx.save_for_backward(qk, v, memory_keys, memory_values, out, logsumexp, order, start, alone)
        if kept is not None:
            kept.fill(out, logsumexp, order, start)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        qk, v, memory_keys, memory_values, out, logsumexp, order, start, alone = ctx.saved_tensors
        settings: Settings = ctx.settings
        batch, heads = qk.shape[:2]
        grad_qk = torch.empty_like(qk, memory_format=torch.contiguous_format)
        grad_v = torch.empty_like(v, memory_format=torch.contiguous_format)
        flat_grad_qk, flat_grad_v = grad_qk.flatten(0, 1), grad_v.flatten(0, 1)
        flat_out, flat_grad = out.flatten(0, 1), grad_out.to(v.dtype).flatten(0, 1)
        wide = logsumexp.dtype
        grad_memory: list[Tensor] | None = None
        if memory_keys is not None and memory_values is not None:
            grad_memory = [
                torch.empty(batch * heads, *m.shape[-2:], dtype=wide, device=m.device)
                for m in (memory_keys, memory_values)
            ]
        with torch.autocast(device_type=qk.device.type, enabled=False):
            for piece in _pieces(qk, v, memory_keys, memory_values, ctx.memory_mask, order, start, None, settings):
                rows = piece.rows
                grad_q, grad_keys, grad_values, of_memory = piece.backward(
                    flat_grad[rows], flat_out[rows], logsumexp[rows]
                )
                with torch.enable_grad():
                    leaf = piece.q.detach().requires_grad_()
                    keys = normalize_keys(leaf, settings.key_norm)
                (through_keys,) = torch.autograd.grad(keys, leaf, grad_keys.to(keys.dtype))
                flat_grad_qk[rows] = (grad_q + through_keys).to(qk.dtype)
                flat_grad_v[rows] = grad_values.to(v.dtype)
                if grad_memory is not None and of_memory is not None:
                    grad_memory[0][rows], grad_memory[1][rows] = of_memory
        if alone is not None:
            of_own = flat_grad.reshape(-1, v.shape[-1]).index_select(0, alone)
            flat_grad_v.view(-1, v.shape[-1]).index_add_(0, alone, of_own)
        grad_memory_keys = grad_memory_values = None
        if grad_memory is not None:
            rows_of_memory = [g.unflatten(0, (batch, heads)) for g in grad_memory]
            # Without a dimension for it every row of the batch sees the same memory.
            grad_memory_keys, grad_memory_values = (
                (g if m.dim() == 4 else g.sum(0)).to(m.dtype)
                for g, m in zip(rows_of_memory, (memory_keys, memory_values), strict=True)
            )
        return grad_qk, grad_v, grad_memory_keys, grad_memory_values, None, None, None, None, None, None, None


def _pieces(
    qk: Tensor,
    v: Tensor,
    memory_keys: Tensor | None,
    memory_values: Tensor | None,
    memory_mask: Tensor | None,
    order: Tensor,
    start: Tensor,
    inverse: Tensor | None,
    settings: Settings,
) -> Iterator[Slice]:
    batch, heads, tokens, dim = qk.shape
    budget = _SLICE_ELEMENTS.get(qk.device.type, _SLICE_ELEMENTS_ELSEWHERE)
    step = max(1, budget // max(1, tokens * dim))
    flat_qk, flat_v, flat_order, flat_start = (x.flatten(0, 1) for x in (qk, v, order, start))
    flat_inverse = None if inverse is None else inverse.flatten(0, 1)
    for index, begin in enumerate(range(0, batch * heads, step)):
        rows = slice(begin, min(begin + step, batch * heads))
        memory = None
        if memory_keys is not None and memory_values is not None:
            row = torch.arange(rows.start, rows.stop, device=qk.device)
            keys, values = (
                m.flatten(0, 1)[rows] if m.dim() == 4 else m[row % heads] for m in (memory_keys, memory_values)
            )
            memory = Memory(keys, values, None if memory_mask is None else memory_mask[row // heads])
        yield Slice(
            rows,
            index,
            flat_qk[rows],
            flat_v[rows],
            flat_order[rows],
            flat_start[rows],
            None if flat_inverse is None else flat_inverse[rows],
            memory,
            settings,
        )
