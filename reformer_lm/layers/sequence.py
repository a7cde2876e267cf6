"""What every layer knows of the sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from reformer_lm.cache import LSHCache
from reformer_lm.config import ReformerLMConfig
from reformer_lm.layers.positions import rotary_factors


@dataclass(frozen=True)
class SequenceInfo:
    """What every layer knows of the sequence besides the hidden states.

    Attributes:
        position_ids: int64 [B or 1, T].
        mask: optional bool [B, T], True for real tokens. Needed in chunked mode only: in causal mode padding stands
            behind the last real token, where nothing real can see it.
        documents: optional int64 [B, T], constant over each document; tokens see their own document only.
        attention_mask: optional bool [B or 1, T, T], True where a query may see a key; chunked mode only.
        context: optional [B, C, hidden_size], vectors of another sequence that every token sees; chunked mode only.
        context_mask: optional bool [B, C], False for padding of the context.
        hash_step: number of the training step with ``rehash="step"``, else None (fixed rotations).
        cache: the tokens before these, which they then join; None where these are the first and none will follow.
        counts: int64 [B], with a cache: how many of the T tokens are real in each row, the first ones.
    """

    position_ids: Tensor
    mask: Tensor | None = None
    documents: Tensor | None = None
    attention_mask: Tensor | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None
    hash_step: int | None = None
    cache: LSHCache | None = None
    counts: Tensor | None = None
    _rotary: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    def rotary(self, dim: int, dtype: torch.dtype) -> Tensor:
        """`rotary_factors` of these positions for vectors of a dtype, computed once for all layers."""
        key = (dim, torch.promote_types(dtype, torch.float32))
        if key not in self._rotary:
            self._rotary[key] = rotary_factors(self.position_ids, *key)
        return self._rotary[key]


def check_chunked_only(
    config: ReformerLMConfig,
    shape: torch.Size,
    input_attn_mask: Tensor | None,
    keys: Tensor | None,
    context_mask: Tensor | None,
) -> None:
    """Makes sure that a model can use its optional inputs; see `ReformerLMModel.forward`.

    Args:
        config: of the model.
        shape: of the tokens, (B, T).
        input_attn_mask: or None.
        keys: or None.
        context_mask: or None.

    Raises:
        ValueError: one is given in causal mode, or has the wrong shape.
    """
    given = {"input_attn_mask": input_attn_mask, "keys": keys, "context_mask": context_mask}
    for name, tensor in given.items():
        if tensor is not None and config.lsh_mask != "chunked":
            raise ValueError(f'{name} needs lsh_mask="chunked": leave it out, or change the configuration')
    if keys is not None and (keys.dim() != 3 or keys.shape[::2] != (shape[0], config.hidden_size)):
        raise ValueError(f"keys has shape {tuple(keys.shape)}, expected ({shape[0]}, C, {config.hidden_size})")
    if context_mask is not None and (keys is None or context_mask.shape != keys.shape[:2]):
        raise ValueError("context_mask must be given with keys and have their first two sizes")
