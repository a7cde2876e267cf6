"""Exactly causal LSH attention through torch's compiled FlexAttention, for CUDA.

Per round the tokens are gathered into sorted order. There attention is a sliding window with a start of its own for
each place: place i sees the places from max(start of its bucket, i - W) to i - 1. FlexAttention takes that as a mask
read from a tensor, and as lists of the blocks that hold any allowed pair. Those are known (a block and the few before
it), so they are written down, not searched for.

The (batch, head) rows lie one behind the other in a single sequence of P places, N blocks, each row filled up to whole
blocks. So one size only changes from call to call, and the kernels are compiled once for all lengths and batches; and
no block holds two rows, so that a row's result does not depend on its company.

The backward pass stores no graph. The merged output is o = sum_r w_r o_r with w_r = exp(l_r - L), L = logsumexp_r l_r.
Hence dw_r = w_r (dl_r - sum_s w_s dl_s), and

    do = sum_r w_r do_r + sum_r w_r (o_r - o) dl_r

A round receives the gradient w_r * grad_o for its output and w_r * grad_o . (o_r - o) for its logsumexp. It is computed
once more, differentiated, and forgotten before the next.

Source: Dong et al. 2024 (arXiv 2412.05496), FlexAttention; Dao et al. 2022 (arXiv 2205.14135), appendix B, for the
backward pass by recomputation.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from reformer_lm.ops.hashing import SortedBuckets
from reformer_lm.ops.kept_attention import KeptAttention
from reformer_lm.ops.keys import KeyNorm, normalize_keys
from reformer_lm.ops.lsh_flex_blocks import BLOCK, BlockLists, Layout

# Head dimensions: tensor cores want 16 at least, and up to these the kernels' tiles fit the shared memory of every
# device (found by compiling them for compute capability 8.0, 8.6, 9.0 and 12.0). Of the greater ones some fit on some.
_SMALLEST_DIM = 16
_LARGEST_DIM = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 64}

# The oldest devices that torch tests FlexAttention on (Ampere).
_LOWEST_CAPABILITY = (8, 0)

# Elements of one gathered tensor [P, D]: enough to fill an accelerator, and far below 2^31, so that the kernels are not
# compiled again for 64-bit indices.
_SLICE_ELEMENTS = 1 << 26

# Kernels are compiled per type, head dimensions and pass (forward only, or with a backward pass). After 8 torch would
# stop compiling a function; so many a process can reach, but not these.
_MOST_VARIANTS = 64

# The logsumexp of a round without a match: finite, so that no NaN arises, and without weight in the merge.
_NO_WEIGHT = -1e30


def flex_obstacle(qk: Tensor, v: Tensor, dropout_p: float) -> str | None:
    """Why `lsh_attention_flex` cannot run for these tensors.

    Args:
        qk: shared query/key vectors [B, H, T, D].
        v: values [B, H, T, D_v].
        dropout_p: probability of dropping an attention weight.

    Returns:
        A phrase to follow "the flex backend", such as "has no attention dropout"; None when nothing is in the way.
    """
    if qk.device.type != "cuda":
        return f"needs tensors on a CUDA device, and these are on {qk.device.type}"
    if qk.dtype not in _LARGEST_DIM:
        return f"takes float16, bfloat16 or float32, not {str(qk.dtype).removeprefix('torch.')}"
    if v.dtype != qk.dtype:
        return f"takes queries and values of one type, not {qk.dtype} and {v.dtype}"
    for dim in (qk.shape[-1], v.shape[-1]):
        if not _SMALLEST_DIM <= dim <= _LARGEST_DIM[qk.dtype]:
            return f"takes head dimensions from {_SMALLEST_DIM} to {_LARGEST_DIM[qk.dtype]} in {qk.dtype}, not {dim}"
    if dropout_p:
        return "has no attention dropout"
    if torch.version.hip is None and torch.cuda.get_device_capability(qk.device) < _LOWEST_CAPABILITY:
        return "needs a device of compute capability {}.{} or more".format(*_LOWEST_CAPABILITY)
    return _compiler_obstacle()


@functools.cache
def _compiler_obstacle() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which compiles its kernels"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "needs a C compiler (gcc, clang, or one named by CC), with which triton builds what starts its kernels"
    # Without compilation FlexAttention would form all logits.
    if "1" in (os.environ.get("TORCH_COMPILE_DISABLE"), os.environ.get("TORCHDYNAMO_DISABLE")):
        return "needs torch.compile, which TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE switches off"
    return None


def lsh_attention_flex(
    qk_BHTD: Tensor,
    v_BHTD: Tensor,
    order: SortedBuckets | None,
    *,
    window: int,
    key_norm: KeyNorm,
    kept: KeptAttention | None = None,
) -> Tensor:
    """Attention of the tokens that match any; see `reformer_lm.ops.lsh_attention` for the semantics.

    Args:
        qk_BHTD: shared query/key vectors [B, H, T, D]; `flex_obstacle` says what is possible.
        v_BHTD: values [B, H, T, D_v], already shifted where a head shifts.
        order: from `sort_by_bucket`, each [B, H, R, T]; None where ``kept`` has been filled.
        window: W.
        key_norm: see `normalize_keys`.
        kept: filled by the first call with it, and used by the second.

    Returns:
        [B, H, T, D_v] in the dtype of ``v_BHTD``. Rows of tokens without a match in any round are 0, and no gradient
        flows from them: the caller puts something else in their place.
    """
    places = (None, None, None) if order is None else (order.order, order.inverse, order.start)
    return _LSHAttention.apply(qk_BHTD, v_BHTD, *places, window, key_norm, kept)


class _LSHAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qk: Tensor,
        v: Tensor,
        order: Tensor | None,
        inverse: Tensor | None,
        start: Tensor | None,
        window: int,
        key_norm: KeyNorm,
        kept: KeptAttention | None,
    ) -> Tensor:
        ctx.window, ctx.key_norm = window, key_norm
        if kept is not None and kept.out is not None:
            ctx.save_for_backward(qk, v, kept.out, kept.logsumexp, kept.order, kept.start)
            return kept.out.detach()
        assert order is not None and inverse is not None and start is not None
        batch, heads, tokens, _ = qk.shape
        wide = torch.promote_types(v.dtype, torch.float32)
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        logsumexp = torch.empty(batch * heads, tokens, dtype=wide, device=v.device)
        flat_qk, flat_v, flat_out = qk.flatten(0, 1), v.flatten(0, 1), out.flatten(0, 1)
        flat_order, flat_inverse, flat_start = order.flatten(0, 1), inverse.flatten(0, 1), start.flatten(0, 1)
        with torch.autocast(device_type=qk.device.type, enabled=False):
            for piece in _slices(qk, v):
                q, values = flat_qk[piece], flat_v[piece]
                keys = normalize_keys(q, key_norm)
                layout = Layout(q.shape[0], tokens, window, qk.device)
                merged = torch.zeros(values.shape, dtype=wide, device=v.device)
                total = merged.new_full(values.shape[:2], _NO_WEIGHT)
                for r in range(order.shape[2]):
                    index = layout.tokens_in(flat_order[piece, r])
                    lowest = layout.lowest(flat_start[piece, r])
                    o, lse = _attend_round(_gathered(index, q, keys, values), lowest, layout.block_lists)
                    lse = lse.to(wide).masked_fill_(~layout.has_match(lowest), _NO_WEIGHT)
                    places = layout.places_of(flat_inverse[piece, r])
                    o, lse = (x.index_select(0, places).unflatten(0, (-1, tokens)) for x in (o, lse))
                    union = torch.logaddexp(total, lse)
                    merged.mul_((total - union).exp_().unsqueeze(-1))
                    merged.addcmul_(o.to(wide), (lse - union).exp_().unsqueeze(-1))
                    total = union
                # Where nothing matched, the rounds gave the tokens' own values, which the caller decides on. Any finite
                # logsumexp does there: these places carry no weight in the backward pass.
                nothing = total < _NO_WEIGHT / 2
                flat_out[piece] = merged.masked_fill_(nothing.unsqueeze(-1), 0.0).to(v.dtype)
                logsumexp[piece] = total.masked_fill_(nothing, 0.0)
        # Sorting again in the backward pass would cost more time than 32-bit copies of the order cost memory.
        order, start = order.int(), start.int()
        ctx.save_for_backward(qk, v, out, logsumexp, order, start)
        if kept is not None:
            kept.fill(out, logsumexp, order, start)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        qk, v, out, logsumexp, order, start = ctx.saved_tensors
        grad_qk = torch.empty_like(qk, memory_format=torch.contiguous_format)
        grad_v = torch.empty_like(v, memory_format=torch.contiguous_format)
        flat_qk, flat_v, flat_out, flat_grad = (x.flatten(0, 1) for x in (qk, v, out, grad_out.to(v.dtype)))
        flat_order, flat_start = order.flatten(0, 1), start.flatten(0, 1)
        flat_grad_qk, flat_grad_v = grad_qk.flatten(0, 1), grad_v.flatten(0, 1)
        with torch.autocast(device_type=qk.device.type, enabled=False):
            for piece in _slices(qk, v):
                q, values = flat_qk[piece], flat_v[piece]
                with torch.enable_grad():
                    leaf = q.detach().to(logsumexp.dtype).requires_grad_()
                    keys_with_graph = normalize_keys(leaf, ctx.key_norm)
                keys = keys_with_graph.detach().to(qk.dtype)
                layout = Layout(q.shape[0], qk.shape[2], ctx.window, qk.device)
                sums = [torch.zeros(x.shape, dtype=leaf.dtype, device=x.device) for x in (q, keys, values)]
                for r in range(order.shape[2]):
                    order_now = flat_order[piece, r].long()
                    index = layout.tokens_in(order_now)
                    grads = _round_gradients(
                        _gathered(index, q, keys, values),
                        _gathered(index, flat_grad[piece], flat_out[piece], logsumexp[piece].unsqueeze(-1)),
                        layout.lowest(flat_start[piece, r].long()),
                        layout,
                    )
                    places = layout.places_of(_inverse(order_now))
                    for total, grad in zip(sums, grads, strict=True):
                        total.add_(grad.index_select(0, places).view(total.shape))
                grad_q, grad_keys, grad_values = sums
                (through_keys,) = torch.autograd.grad(keys_with_graph, leaf, grad_keys)
                flat_grad_qk[piece] = grad_q.add_(through_keys).to(qk.dtype)
                flat_grad_v[piece] = grad_values.to(v.dtype)
        return grad_qk, grad_v, None, None, None, None, None, None


def _round_gradients(
    inputs: tuple[Tensor, ...], merged: tuple[Tensor, ...], lowest: Tensor, layout: Layout
) -> tuple[Tensor, ...]:
    """Gradients of a round's inputs.

    Args:
        inputs: the queries, keys and values in sorted order, [P, .] each.
        merged: in sorted order, too, the gradient of the merged output [P, D_v], that output [P, D_v], and the merged
            logsumexp [P, 1].
        lowest: [P], from `Layout.lowest`.
        layout: where the rows lie.
    """
    leaves = tuple(x.requires_grad_() for x in inputs)
    with torch.enable_grad():
        o, lse = _attend_round(leaves, lowest, layout.block_lists)
    with torch.no_grad():
        grad_out, out, logsumexp = merged
        weights = (lse.to(logsumexp.dtype).unsqueeze(-1) - logsumexp).exp_()
        # A place without a match (filling, too) had no part in the merge; the exponential may have overflowed there.
        weights.masked_fill_(~layout.has_match(lowest).unsqueeze(-1), 0.0)
        grad_o = (weights * grad_out).to(o.dtype)
        # From the rounded gradient: the kernel subtracts grad_o . o_r, and what must remain of it is grad_o . o.
        grad_lse = (grad_o.to(weights.dtype) * (o.to(weights.dtype) - out)).sum(dim=-1)
    return torch.autograd.grad((o, lse), leaves, (grad_o, grad_lse.to(lse.dtype)))


def _slices(qk: Tensor, v: Tensor) -> Iterator[slice]:
    batch, heads, tokens, dim = qk.shape
    step = max(1, _SLICE_ELEMENTS // max(1, tokens * max(dim, v.shape[-1])))
    for begin in range(0, batch * heads, step):
        yield slice(begin, begin + step)


def _inverse(order: Tensor) -> Tensor:
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _gathered(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Of tensors [n, T, .] the tokens ``index`` [P] of the rows laid end to end: [P, .]."""
    return tuple(x.flatten(0, 1).index_select(0, index) for x in tensors)


def _attend_round(inputs: tuple[Tensor, ...], lowest: Tensor, block_lists: BlockLists) -> tuple[Tensor, Tensor]:
    """Attention of every place over the places from its lowest to the one before it, or to itself if that is all.

    Args:
        inputs: queries [P, D], keys [P, D] and values [P, D_v].
        lowest: int32 [P], the first place each place sees.
        block_lists: where allowed pairs lie.

    Returns:
        Output [P, D_v] in the dtype of the values and logsumexp [P] (base e), in float32 or wider.
    """
    # Loaded only where it is needed: it takes a second, and the CPU never comes here.
    from torch._dynamo import config, mark_static

    # Only the number of places changes from call to call.
    for x in inputs:
        mark_static(x, 1)
    mark_static(block_lists.keys, 3)
    mark_static(block_lists.queries, 3)
    with config.patch(recompile_limit=_MOST_VARIANTS):
        return _compiled()(*inputs, lowest, *block_lists)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    # The whole function or an error: falling back to eager FlexAttention would form all logits.
    return torch.compile(_sliding_window, dynamic=True, fullgraph=True)


def _sliding_window(
    q: Tensor, keys: Tensor, values: Tensor, lowest: Tensor,
    key_counts: Tensor, key_blocks: Tensor, query_counts: Tensor, query_blocks: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # A multiple of BLOCK to the compiler, too, which so leaves out the kernels' checks for the end of the sequence.
    places = key_counts.shape[2] * BLOCK

    def allowed(batch: Tensor, head: Tensor, place: Tensor, seen: Tensor) -> Tensor:
        first = lowest[place]
        # A place whose lowest is itself sees itself: no row is empty, so that no logsumexp is infinite.
        return (seen >= first) & (seen < torch.maximum(place, first + 1))

    block_mask = BlockMask(
        seq_lengths=(places, places),
        kv_num_blocks=key_counts,
        kv_indices=key_blocks,
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=query_counts,
        q_indices=query_blocks,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=allowed,
    )
    out, stats = flex_attention(
        q.view(1, 1, places, q.shape[1]),
        keys.view(1, 1, places, keys.shape[1]),
        values.view(1, 1, places, values.shape[1]),
        block_mask=block_mask,
        scale=1.0 / math.sqrt(q.shape[1]),
        return_aux=AuxRequest(lse=True),
    )
    assert stats.lse is not None
    return out.view(values.shape), stats.lse.view(lowest.shape)
