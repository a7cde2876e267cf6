"""LSH attention that is exactly causal: the one entry to its backends.

In one hash round the tokens are sorted by (bucket, position). Token i of that order sees the ``window`` tokens
before it that share its bucket:

    allowed(i) = [max(first place of i's bucket, i - window), i)

These are the most recent earlier tokens with the same hash. No later token can change that set, so the output at t
is a function of the tokens up to t alone, in values *and* in structure. The rounds are merged exactly: one softmax
over the union of their keys. A token that finds nothing in any round attends to itself.

Source: Kitaev et al. 2020 (arXiv 2001.04451), section 2; the contiguous causal window replaces the paper's chunks
of the sorted order, whose boundaries later tokens can move.
"""

from __future__ import annotations

import logging
from typing import Literal, get_args

import torch
from torch import Tensor

from reformer_lm.ops.hashing import sort_by_bucket
from reformer_lm.ops.kept_attention import KeptAttention
from reformer_lm.ops.keys import KeyNorm, normalize_keys, shift_values
from reformer_lm.ops.lsh_dense import MAX_TOKENS, lsh_attention_dense
from reformer_lm.ops.lsh_reference import lsh_attention_reference
from reformer_lm.ops.lsh_torch import lsh_attention_torch

logger = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "dense", "torch", "flex"]


def lsh_attention(
    qk_BHTD: Tensor,
    v_BHTD: Tensor,
    buckets_BHRT: Tensor,
    *,
    window: int,
    key_norm: KeyNorm = "rms",
    num_shifted_heads: int = 0,
    dropout_p: float = 0.0,
    allow_duplicates: bool = True,
    documents_BT: Tensor | None = None,
    memory: tuple[Tensor, Tensor] | None = None,
    memory_mask_BM: Tensor | None = None,
    kept: KeptAttention | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Exactly causal LSH attention with shared queries and keys.

    Args:
        qk_BHTD: shared query/key vectors [B, H, T, D], any float type.
        v_BHTD: values [B, H, T, D_v].
        buckets_BHRT: integer buckets [B, H, R, T] from `hash_vectors`.
        window: W >= 1, the most recent earlier tokens of its bucket that a token sees in one round.
        key_norm: length of the keys, see `normalize_keys`. Logits are scaled by 1 / sqrt(D).
        num_shifted_heads: the last so many heads read, for a match at s, the value at s + 1. They never attend to
            themselves; with no match in any round their output is 0.
        dropout_p: probability of dropping an attention weight (0 in evaluation). Its mask is drawn from a seed
            taken from the global random state once per call.
        allow_duplicates: whether a key met in several rounds counts once for each of them (the peers' default), or
            once only (the N_ij of Kitaev et al. 2020, section 2).
        documents_BT: optional integers [B, T], the same within a document; tokens see their own document only. A
            document's tokens must stand together.
        memory: optional shared vectors [H, M, D] and values [H, M, D_v], or [B, H, M, D] and [B, H, M, D_v] where each
            row has its own, that every token sees besides its matches; no token then attends to itself.
        memory_mask_BM: optional bool [B, M], False for memory that a row does not see. A row that sees none attends as
            if there were none.
        kept: what is given empty comes back filled; given again with the same input, that costs no forward pass. The
            reference and dense backends leave it empty.
        backend: "torch" (any device), "dense" (any device, for short sequences; no dropout, no memory; keeps nothing),
            "flex" (CUDA; no dropout, no memory, duplicates counted), "reference" (the oracle, slow; no dropout), or
            "auto": flex where it can run, dense for up to some hundred tokens on a CPU, else torch. A debug log says
            which.

    Returns:
        [B, H, T, D_v] in the dtype of ``v_BHTD``.

    Raises:
        ValueError: shapes that do not fit, ``window`` < 1, an unknown backend, or one named that cannot run.
    """
    _check_shapes(qk_BHTD, v_BHTD, buckets_BHRT, window, num_shifted_heads)
    _check_extras(qk_BHTD, v_BHTD, documents_BT, memory, memory_mask_BM)
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend in ("auto", "flex"):
        obstacle = _flex_obstacle(qk_BHTD, v_BHTD, dropout_p, allow_duplicates, memory)
        if backend == "flex" and obstacle is not None:
            raise ValueError(f'backend="flex" {obstacle}: use backend="auto" or "torch"')
        if backend == "auto":
            backend = "flex" if obstacle is None else _without_flex(qk_BHTD, dropout_p, memory, kept)
            logger.debug("lsh_attention on %s: backend %s%s", qk_BHTD.device.type, backend,
                         f", since flex {obstacle}" if obstacle else "")  # fmt: skip
    if documents_BT is not None:
        # Sorted by (document, bucket): what lies in another document is another bucket.
        width = int(buckets_BHRT.max()) + 1 if buckets_BHRT.numel() else 1
        buckets_BHRT = buckets_BHRT + documents_BT.long()[:, None, None] * width
    if memory is not None:
        memory = (normalize_keys(memory[0], key_norm), memory[1])
    if backend == "reference":
        if dropout_p:
            raise ValueError('backend="reference" has no dropout: use backend="torch"')
        return lsh_attention_reference(
            qk_BHTD,
            v_BHTD,
            buckets_BHRT,
            window=window,
            key_norm=key_norm,
            num_shifted_heads=num_shifted_heads,
            allow_duplicates=allow_duplicates,
            memory=memory,
            memory_mask=memory_mask_BM,
        )
    values = shift_values(v_BHTD, num_shifted_heads)
    if backend == "dense":
        if dropout_p or memory is not None:
            raise ValueError('backend="dense" has neither dropout nor memory: use backend="torch"')
        return lsh_attention_dense(
            qk_BHTD,
            values,
            buckets_BHRT,
            window=window,
            key_norm=key_norm,
            num_shifted_heads=num_shifted_heads,
            allow_duplicates=allow_duplicates,
        )
    if kept is not None and kept.is_filled:
        order, matched = None, kept.matched
    else:
        order = sort_by_bucket(buckets_BHRT)
        places = torch.arange(order.start.shape[-1], device=order.start.device)
        matched = (order.start < places).gather(-1, order.inverse).any(dim=-2)
        if kept is not None:
            kept.matched = matched
    assert matched is not None
    # Without a match in any round a token reads itself; a head that reads what followed a match reads nothing.
    plain = torch.arange(v_BHTD.shape[1], device=v_BHTD.device) < v_BHTD.shape[1] - num_shifted_heads
    if backend == "flex":
        from reformer_lm.ops.lsh_flex import lsh_attention_flex

        out = lsh_attention_flex(qk_BHTD, values, order, window=window, key_norm=key_norm, kept=kept)
        return torch.where(matched.unsqueeze(-1), out, v_BHTD * plain.view(1, -1, 1, 1))
    alone = None
    if memory is None or memory_mask_BM is not None:
        reads_itself = ~matched & plain.view(1, -1, 1)
        if memory_mask_BM is not None:
            reads_itself &= ~memory_mask_BM.any(dim=1).view(-1, 1, 1)
        alone = reads_itself.flatten().nonzero().squeeze(1)
    return lsh_attention_torch(
        qk_BHTD,
        values,
        order,
        alone,
        window=window,
        key_norm=key_norm,
        dropout_p=dropout_p,
        allow_duplicates=allow_duplicates,
        memory=memory,
        memory_mask=memory_mask_BM,
        kept=kept,
    )


def _without_flex(
    qk: Tensor, dropout_p: float, memory: tuple[Tensor, Tensor] | None, kept: KeptAttention | None
) -> Backend:
    """The faster of the backends that run anywhere."""
    short = qk.device.type == "cpu" and qk.shape[2] <= MAX_TOKENS
    return "dense" if short and not dropout_p and memory is None and kept is None else "torch"


def _flex_obstacle(
    qk: Tensor, v: Tensor, dropout_p: float, allow_duplicates: bool, memory: tuple[Tensor, Tensor] | None
) -> str | None:
    """Why the flex backend cannot do this call, or None."""
    if qk.device.type != "cuda":
        # Said here too, so that a CPU never loads FlexAttention.
        return f"needs tensors on a CUDA device, and these are on {qk.device.type}"
    if not allow_duplicates:
        return "counts a key once for each round"
    if memory is not None:
        return "has no memory"
    from reformer_lm.ops.lsh_flex import flex_obstacle

    return flex_obstacle(qk, v, dropout_p)


def _check_shapes(qk: Tensor, v: Tensor, buckets: Tensor, window: int, num_shifted_heads: int) -> None:
    if qk.dim() != 4 or v.dim() != 4 or buckets.dim() != 4:
        raise ValueError(
            "expected qk [B, H, T, D], v [B, H, T, D_v] and buckets [B, H, R, T], "
            f"got {tuple(qk.shape)}, {tuple(v.shape)} and {tuple(buckets.shape)}"
        )
    batch, heads, tokens = qk.shape[:3]
    if v.shape[:3] != qk.shape[:3] or (buckets.shape[0], buckets.shape[1], buckets.shape[3]) != (batch, heads, tokens):
        raise ValueError(
            f"qk {tuple(qk.shape)}, v {tuple(v.shape)} and buckets {tuple(buckets.shape)} disagree "
            "in batch, heads or tokens"
        )
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not 0 <= num_shifted_heads <= heads:
        raise ValueError(f"num_shifted_heads must lie between 0 and the {heads} heads, got {num_shifted_heads}")


def _check_extras(
    qk: Tensor,
    v: Tensor,
    documents: Tensor | None,
    memory: tuple[Tensor, Tensor] | None,
    memory_mask: Tensor | None,
) -> None:
    batch, heads, tokens, dim = qk.shape
    if documents is not None and (documents.shape != (batch, tokens) or documents.is_floating_point()):
        raise ValueError(
            f"documents must be integers {(batch, tokens)}, got {tuple(documents.shape)} of {documents.dtype}"
        )
    if memory is not None:
        count = memory[0].shape[-2] if memory[0].dim() in (3, 4) else 0
        rows = (batch,) if memory[0].dim() == 4 else ()
        expected = (*rows, heads, count, dim), (*rows, heads, count, v.shape[-1])
        if count < 1 or tuple(m.shape for m in memory) != expected:
            raise ValueError(
                f"memory must be vectors [H, M, D] and values [H, M, D_v] with H={heads}, M >= 1, D={dim}, "
                f"D_v={v.shape[-1]}, or both with {batch} rows in front, got {tuple(memory[0].shape)} and "
                f"{tuple(memory[1].shape)}"
            )
    if memory_mask is not None and (
        memory is None or memory_mask.dtype != torch.bool or memory_mask.shape != (batch, memory[0].shape[-2])
    ):
        raise ValueError(
            f"memory_mask_BM must come with memory and be bool [{batch}, M], "
            f"got {memory_mask.dtype} {list(memory_mask.shape)}"
        )
