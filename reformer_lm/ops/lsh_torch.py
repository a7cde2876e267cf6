"""Exactly causal LSH attention in plain torch, for any device.

Per round the tokens are gathered into sorted order; there the attention is a sliding window with a per-row start,
done in blocks of W queries against the 2W keys of their own block and the one before. On the CPU a block goes
through torch's flash kernel, elsewhere (and with dropout) through matrix products. Work is cut into slices of
(batch, head) rows, so that nothing of size [rounds, T, 2W] is ever held for all heads.

The backward pass stores no graph. Because the merged attention is one softmax over the union of the rounds, the
gradient of each round is the flash-attention backward pass called with the *merged* output and logsumexp.
Source: Dao et al. 2022 (arXiv 2205.14135), appendix B.2, for delta = rowsum(dO * O) and P = exp(S - L).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer_lm.ops.hashing import SortedBuckets
from reformer_lm.ops.keys import SELF_ATTENTION_BIAS, KeyNorm, normalize_keys

# Elements of one gathered tensor [rows, T, D] in a slice: on a CPU small enough to stay near the cache, on an
# accelerator large enough to fill it.
_SLICE_ELEMENTS = {"cpu": 1 << 19}
_SLICE_ELEMENTS_ELSEWHERE = 1 << 25

# The logsumexp of a round without a match: finite, so that no NaN arises, and without weight in the merge.
_NO_WEIGHT = -1e30

_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


class _Settings(NamedTuple):
    window: int
    key_norm: KeyNorm
    dropout_p: float
    seed: int


def lsh_attention_torch(
    qk_BHTD: Tensor,
    v_BHTD: Tensor,
    order: SortedBuckets,
    has_match: Tensor,
    *,
    window: int,
    key_norm: KeyNorm,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of the tokens that match any; see `reformer_lm.ops.lsh_attention` for the semantics.

    Args:
        qk_BHTD: shared query/key vectors [B, H, T, D].
        v_BHTD: values [B, H, T, D_v], already shifted where a head shifts.
        order: from `sort_by_bucket`, each [B, H, R, T].
        has_match: bool [B, H, R, T] in sorted order, whether an earlier token shares the bucket.
        window: W.
        key_norm: see `normalize_keys`.
        dropout_p: probability of dropping an attention weight.

    Returns:
        [B, H, T, D_v] in the dtype of ``v_BHTD``. Rows of tokens without a match in any round are finite but
        meaningless, and their gradient must be 0: the caller puts something else in their place.
    """
    # A seed of its own lets forward and backward pass draw the same dropout mask without storing it.
    seed = int(torch.randint(2**62, (), device="cpu")) if dropout_p else 0
    # A window longer than the sequence means the sequence.
    settings = _Settings(min(window, qk_BHTD.shape[2]), key_norm, dropout_p, seed)
    return _LSHAttention.apply(qk_BHTD, v_BHTD, order.order, order.inverse, order.start, has_match, settings)


class _LSHAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qk: Tensor,
        v: Tensor,
        order: Tensor,
        inverse: Tensor,
        start: Tensor,
        has_match: Tensor,
        settings: _Settings,
    ) -> Tensor:
        batch, heads, tokens, _ = qk.shape
        rows = batch * heads
        rounds = order.shape[2]
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        wide = torch.promote_types(v.dtype, torch.float32)
        logsumexp = torch.empty(rows, tokens, dtype=wide, device=v.device)
        flat_qk, flat_v, flat_out = qk.flatten(0, 1), v.flatten(0, 1), out.view(rows, tokens, -1)
        flat_order, flat_inverse = order.flatten(0, 1), inverse.flatten(0, 1)
        flat_start, flat_match = start.flatten(0, 1), has_match.flatten(0, 1)
        with torch.autocast(device_type=qk.device.type, enabled=False):
            for index, piece in enumerate(_slices(qk)):
                q, values = flat_qk[piece], flat_v[piece]
                keys = normalize_keys(q, settings.key_norm)
                merged: Tensor | None = None
                total: Tensor | None = None
                for r in range(rounds):
                    block = _SortedBlocks(q, keys, values, flat_order[piece, r], flat_start[piece, r], settings)
                    o, lse = block.forward(_generator(settings, r, index, qk.device))
                    lse = lse.masked_fill(~flat_match[piece, r], _NO_WEIGHT)
                    places = flat_inverse[piece, r]
                    o, lse = _gather_rows(o, places), lse.gather(1, places)
                    if merged is None or total is None:
                        merged, total = o.to(wide), lse
                    else:
                        union = torch.logaddexp(total, lse)
                        merged = merged * (total - union).exp().unsqueeze(-1)
                        merged = merged + o * (lse - union).exp().unsqueeze(-1)
                        total = union
                assert merged is not None and total is not None
                flat_out[piece] = merged.to(v.dtype)
                # Where nothing matched, any finite value does; 0 makes every weight of the backward pass vanish.
                logsumexp[piece] = total.masked_fill(total < _NO_WEIGHT / 2, 0.0)
        # Sorting again in the backward pass would cost more time than 32-bit copies of the order cost memory.
        ctx.save_for_backward(qk, v, out, logsumexp, order.int(), start.int())
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        qk, v, out, logsumexp, order, start = ctx.saved_tensors
        settings: _Settings = ctx.settings
        rounds = order.shape[2]
        grad_qk = torch.empty_like(qk, memory_format=torch.contiguous_format)
        grad_v = torch.empty_like(v, memory_format=torch.contiguous_format)
        flat_qk, flat_v, flat_out = qk.flatten(0, 1), v.flatten(0, 1), out.flatten(0, 1)
        flat_grad = grad_out.to(v.dtype).flatten(0, 1)
        flat_order, flat_start = order.flatten(0, 1), start.flatten(0, 1)
        flat_grad_qk, flat_grad_v = grad_qk.view_as(flat_qk), grad_v.view_as(flat_v)
        wide = logsumexp.dtype
        with torch.autocast(device_type=qk.device.type, enabled=False):
            for index, piece in enumerate(_slices(qk)):
                q, values, o, do = flat_qk[piece], flat_v[piece], flat_out[piece], flat_grad[piece]
                with torch.enable_grad():
                    leaf = q.detach().requires_grad_()
                    keys_with_graph = normalize_keys(leaf, settings.key_norm)
                keys = keys_with_graph.detach()
                sums = [torch.zeros(t.shape, dtype=wide, device=t.device) for t in (q, keys, values)]
                for r in range(rounds):
                    places = flat_order[piece, r].long()
                    block = _SortedBlocks(q, keys, values, places, flat_start[piece, r].long(), settings)
                    grads = block.backward(
                        _gather_rows(do, places),
                        _gather_rows(o, places),
                        logsumexp[piece].gather(1, places),
                        _generator(settings, r, index, qk.device),
                    )
                    for total, grad in zip(sums, grads, strict=True):
                        # Each position stands once in the order, so this adds every row exactly once.
                        _add_rows(total, places, grad)
                grad_q, grad_keys, grad_values = sums
                (through_keys,) = torch.autograd.grad(keys_with_graph, leaf, grad_keys.to(keys.dtype))
                flat_grad_qk[piece] = (grad_q + through_keys).to(qk.dtype)
                flat_grad_v[piece] = grad_values.to(v.dtype)
        return grad_qk, grad_v, None, None, None, None, None


def _slices(qk: Tensor) -> Iterator[slice]:
    batch, heads, tokens, dim = qk.shape
    budget = _SLICE_ELEMENTS.get(qk.device.type, _SLICE_ELEMENTS_ELSEWHERE)
    step = max(1, budget // max(1, tokens * dim))
    for begin in range(0, batch * heads, step):
        yield slice(begin, begin + step)


def _generator(settings: _Settings, round_index: int, slice_index: int, device: torch.device) -> torch.Generator | None:
    if not settings.dropout_p:
        return None
    return torch.Generator(device).manual_seed(settings.seed + 1_000_003 * slice_index + round_index)


def _gather_rows(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x [n, T, D] in the order of places [n, T]."""
    n, tokens, dim = x.shape
    offsets = torch.arange(n, device=x.device).unsqueeze(1) * tokens
    return x.reshape(n * tokens, dim).index_select(0, (places + offsets).flatten()).view(n, -1, dim)


def _add_rows(total: Tensor, places: Tensor, rows: Tensor) -> None:
    """total[n, places[n, i]] += rows[n, i], in place."""
    n, tokens, dim = total.shape
    offsets = torch.arange(n, device=total.device).unsqueeze(1) * tokens
    total.view(n * tokens, dim).index_add_(0, (places + offsets).flatten(), rows.reshape(-1, dim).to(total.dtype))


class _SortedBlocks:
    """One round of one slice of rows, in sorted order and in blocks of W queries against 2W keys.

    Attributes:
        q: [n, blocks, W, D].
        k: [n, blocks, 2W, D], an overlapping view.
        v: [n, blocks, 2W, D_v], likewise.
        bias: [n, blocks, W, 2W]; 0 where allowed, -5e4 on the token itself (which keeps a row without a match finite
            and is exactly 0 after the softmax in any other), -inf elsewhere.
    """

    def __init__(
        self, q: Tensor, keys: Tensor, values: Tensor, places: Tensor, start: Tensor, settings: _Settings
    ) -> None:
        window = settings.window
        n, tokens, dim = q.shape
        self.blocks = -(-tokens // window)
        self.tokens = tokens
        self.padding = self.blocks * window - tokens
        self.scale = 1.0 / math.sqrt(dim)
        self.settings = settings
        self.q = self._in_blocks(_gather_rows(q, places))
        self.k = self._with_previous_block(_gather_rows(keys, places))
        self.v = self._with_previous_block(_gather_rows(values, places))
        self.bias = self._bias(start, q.dtype)

    def _in_blocks(self, x: Tensor) -> Tensor:
        """[n, T, D] -> [n, blocks, W, D], zeros behind the last token."""
        padded = torch.nn.functional.pad(x, (0, 0, 0, self.padding)) if self.padding else x
        return padded.unflatten(1, (self.blocks, self.settings.window))

    def _with_previous_block(self, x: Tensor) -> Tensor:
        """[n, T, D] -> [n, blocks, 2W, D] without copying a block twice."""
        window = self.settings.window
        padded = torch.nn.functional.pad(x, (0, 0, window, self.padding))
        n, length, dim = padded.shape
        return padded.as_strided(
            (n, self.blocks, 2 * window, dim), (length * dim, window * dim, dim, 1), padded.storage_offset()
        )

    def _fold(self, grad: Tensor) -> Tensor:
        """The transpose of `_with_previous_block`: [n, blocks, 2W, D] -> [n, T, D]."""
        window = self.settings.window
        folded = grad[:, :, window:].contiguous()
        folded[:, :-1] += grad[:, 1:, :window]
        return folded.flatten(1, 2)[:, : self.tokens]

    def _bias(self, start: Tensor, dtype: torch.dtype) -> Tensor:
        window = self.settings.window
        device = start.device
        # Tokens of the padding see themselves only; nobody sees them.
        place = torch.arange(self.blocks * window, device=device)
        if self.padding:
            tail = place[self.tokens :].expand(start.shape[0], -1)
            start = torch.cat((start, tail), dim=1)
        lowest = torch.maximum(start, place - window).unflatten(1, (self.blocks, window))
        # Column 0 of a block's keys is the first place of the block before it.
        first_column = lowest - (torch.arange(self.blocks, device=device).unsqueeze(1) - 1) * window
        column = torch.arange(2 * window, device=device)
        own = torch.arange(window, 2 * window, device=device).unsqueeze(1)
        shape = torch.zeros(window, 2 * window, dtype=dtype, device=device)
        shape.masked_fill_(column == own, SELF_ATTENTION_BIAS).masked_fill_(column > own, -math.inf)
        return torch.where(column < first_column.unsqueeze(-1), -math.inf, shape)

    def _uses_flash(self) -> bool:
        # The kernel wants one head dimension for queries and values, and knows no dropout.
        return (
            _FLASH is not None
            and _FLASH_BACKWARD is not None
            and self.q.device.type == "cpu"
            and not self.settings.dropout_p
            and self.q.shape[-1] == self.v.shape[-1]
        )

    def _keep(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Dropout factors: 0, or 1 / (1 - p)."""
        keep = 1.0 - self.settings.dropout_p
        return torch.empty_like(like).bernoulli_(keep, generator=generator).div_(keep)

    def _logits(self) -> Tensor:
        wide = torch.promote_types(self.q.dtype, torch.float32)
        return (self.q @ self.k.transpose(-1, -2)).to(wide) * self.scale + self.bias

    def forward(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Output [n, T, D_v] and logsumexp [n, T] (float32 or wider), both in sorted order."""
        if self._uses_flash():
            assert _FLASH is not None
            out, lse = _FLASH(self.q, self.k, self.v, 0.0, False, attn_mask=self.bias, scale=self.scale)
        else:
            logits = self._logits()
            lse = torch.logsumexp(logits, dim=-1)
            weights = torch.exp(logits - lse.unsqueeze(-1))
            if generator is not None:
                weights = weights * self._keep(weights, generator)
            out = weights.to(self.v.dtype) @ self.v
        return out.flatten(1, 2)[:, : self.tokens], lse.flatten(1, 2)[:, : self.tokens]

    def backward(
        self, grad_out: Tensor, out: Tensor, lse: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, keys and values [n, T, .] in sorted order.

        Args:
            grad_out: [n, T, D_v], gradient of the merged output, sorted.
            out: [n, T, D_v], the merged output, sorted.
            lse: [n, T], the merged logsumexp, sorted.
            generator: replays the dropout mask of the forward pass.
        """
        grad_out, out = self._in_blocks(grad_out), self._in_blocks(out)
        lse = self._in_blocks(lse.unsqueeze(-1)).squeeze(-1)
        if self._uses_flash():
            assert _FLASH_BACKWARD is not None
            grad_q, grad_k, grad_v = _FLASH_BACKWARD(
                grad_out,
                self.q,
                self.k,
                self.v,
                out,
                lse,
                0.0,
                False,
                attn_mask=self.bias,
                scale=self.scale,
            )
        else:
            logits = self._logits()
            weights = torch.exp(logits - lse.unsqueeze(-1))
            delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
            grad_weights = (grad_out @ self.v.transpose(-1, -2)).to(lse.dtype)
            kept = weights
            if generator is not None:
                factors = self._keep(weights, generator)
                kept, grad_weights = weights * factors, grad_weights * factors
            grad_v = kept.to(grad_out.dtype).transpose(-1, -2) @ grad_out
            grad_logits = (weights * (grad_weights - delta) * self.scale).to(self.q.dtype)
            grad_q, grad_k = grad_logits @ self.k, grad_logits.transpose(-1, -2) @ self.q
        return grad_q.flatten(1, 2)[:, : self.tokens], self._fold(grad_k), self._fold(grad_v)
