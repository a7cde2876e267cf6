"""Watching the attention of a model at work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reformer_lm.layers.attention import LSHSelfAttention
from reformer_lm.layers.heads import AttentionReplay, Projections
from reformer_lm.layers.sequence import SequenceInfo
from reformer_lm.ops.hashing import sort_by_bucket


@dataclass(frozen=True)
class AttentionRecord:
    """What one layer did in one forward pass.

    Positions count real tokens: padding, wherever it stood, is behind them.

    Attributes:
        layer_index: which layer.
        buckets: int64 [B, H_lsh, R, T], or None where nothing was hashed (local heads only, or full attention). With
            memory or context in chunked mode these follow the tokens.
        order: int64 [B, H_lsh, R, T], positions in sorted order, or None likewise.
        weights: [B, H, T, S], the share of the value at s in the output at t, local heads first; None for inputs
            longer than asked for. S is T, or more with learned memory or a context, which follow the tokens (of local
            heads those columns are 0). A head with value shift that matches s reads the value at s + 1: its weight
            stands in column s + 1. Rows sum to 1, but for shifted heads without a match, which read nothing.
    """

    layer_index: int
    buckets: Tensor | None
    order: Tensor | None
    weights: Tensor | None


@contextlib.contextmanager
def record_attention(model: nn.Module, max_weights_tokens: int = 1024) -> Iterator[list[AttentionRecord]]:
    """Records buckets, sorted order and attention weights of each layer.

        with record_attention(model) as records:
            model(input_ids)
        records[0].weights  # of the first layer

    Outputs and gradients of the model do not change, nor does the random state. Weights hold T x T numbers per head and
    cost as much to compute: meant for looking at short inputs. They are those without attention dropout.

    Args:
        model: a model of this package, or any module that contains its layers.
        max_weights_tokens: inputs with more tokens get no weights; 0 for none at all.

    Yields:
        A list that grows by one `AttentionRecord` per layer and forward pass, in the order of computation.

    Raises:
        ValueError: the model has no layer of this package.

    Source: what reformer-pytorch's Recorder gives.
    """
    layers = [module for module in model.modules() if isinstance(module, LSHSelfAttention)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention layer of reformer_lm to record")
    records: list[AttentionRecord] = []

    def record(module: nn.Module, arguments: tuple[Any, ...], result: tuple[Tensor, Sequence[AttentionReplay]]) -> None:
        assert isinstance(module, LSHSelfAttention)
        x, info = arguments[:2]
        # The reversible backward pass runs each layer again, with the buckets of the first time.
        if len(arguments) > 2 and arguments[2] is not None:
            return
        found = [replay.buckets for replay in result[1] if replay.buckets is not None]
        buckets = torch.cat(found, dim=1) if found else None
        records.append(_record(module, x.detach(), info, buckets, max_weights_tokens))

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _record(
    layer: LSHSelfAttention, x: Tensor, info: SequenceInfo, buckets: Tensor | None, max_weights_tokens: int
) -> AttentionRecord:
    weights = None
    if x.shape[1] <= max_weights_tokens:
        # Each position's value is its own unit vector: the output then lists the weights.
        heads = layer.project(x, info)
        weights = layer.attend(_with_unit_values(heads), info, AttentionReplay(buckets), dropout_p=0.0)
        weights = weights.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    if buckets is None:
        return AttentionRecord(layer.layer_index, None, None, weights)
    keys = buckets.long()
    if info.documents is not None and layer.exact:
        # As lsh_attention sorts them.
        keys = keys + info.documents.long()[:, None, None] * (keys.max() + 1)
    return AttentionRecord(layer.layer_index, buckets.long(), sort_by_bucket(keys).order, weights)


def _with_unit_values(heads: Projections) -> Projections:
    value = heads.value
    batch, count, tokens, _ = value.shape
    extra = 0 if heads.extra is None else heads.extra[0].shape[2]
    units = torch.eye(tokens + extra, dtype=value.dtype, device=value.device)
    own = units[:tokens].expand(batch, count, -1, -1)
    if heads.extra is None:
        return heads._replace(value=own)
    behind = units[tokens:].expand(batch, heads.extra[0].shape[1], -1, -1)
    return heads._replace(value=own, extra=(heads.extra[0], behind))
