"""What a causal model must remember to go on with a text, at a cost per token that does not grow with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from reformer_lm.config import ReformerLMConfig
from reformer_lm.ops.keys import SELF_ATTENTION_BIAS
from reformer_lm.ops.local_ring import LocalRing
from reformer_lm.ops.lsh_rings import LSHRings


@dataclass(frozen=True)
class CachedContext:
    """What the LSH heads of a layer see of another sequence besides the tokens.

    Attributes:
        extra: shared vectors [B, H, E, D] and values [B, H, E, D_v], the layer's learned memory first.
        mask: bool [B, E], False for what a row does not see; or None.
    """

    extra: tuple[Tensor, Tensor]
    mask: Tensor | None

    def select(self, indices: Tensor) -> CachedContext:
        """Row i becomes what row ``indices[i]`` was."""
        vectors, values = (x.index_select(0, indices) for x in self.extra)
        return CachedContext((vectors, values), None if self.mask is None else self.mask.index_select(0, indices))

    def bytes(self) -> int:
        """Memory held."""
        return sum(x.numel() * x.element_size() for x in (*self.extra, self.mask) if x is not None)


class LSHCacheLayer(CacheLayerMixin):
    """One layer: rings of buckets for its LSH heads, a ring of the last tokens for its local heads.

    Attributes:
        lsh: None where the layer has no LSH heads, or has seen nothing yet.
        local: None where the layer has no local heads, or has seen nothing yet.
        context: None where the first tokens were given none.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, config: ReformerLMConfig, layer_index: int) -> None:
        super().__init__()
        self._config = config
        self._layer_index = layer_index
        self.lsh: LSHRings | None = None
        self.local: LocalRing | None = None
        self.context: CachedContext | None = None
        self.is_initialized: bool = False

    def prepare(self, batch: int, device: torch.device) -> None:
        """Makes empty rings for a batch, where there are none yet."""
        if self.is_initialized:
            return
        config = self._config
        local = config.local_heads_of(self._layer_index)
        heads = config.num_attention_heads - local
        assert (
            config.buckets_per_round is not None and config.lsh_window is not None and config.local_window is not None
        )
        if heads:
            self.lsh = LSHRings(
                batch, heads, config.num_hashes, config.buckets_per_round, window=config.lsh_window,
                key_norm=config.key_norm, num_shifted_heads=config.shifted_heads_of(self._layer_index),
                allow_duplicates=config.allow_duplicate_attention,
                full_attention_threshold=config.full_attention_threshold,
                most_tokens=config.max_position_embeddings, device=device,
            )  # fmt: skip
        if local:
            bias = SELF_ATTENTION_BIAS if config.local_keys == "shared" else 0.0
            self.local = LocalRing(batch, window=config.local_window, self_bias=bias, device=device)
        self.is_initialized = True

    def _parts(self) -> list[LSHRings | LocalRing]:
        return [part for part in (self.lsh, self.local) if part is not None]

    def bytes(self) -> int:
        """Memory held."""
        of_context = 0 if self.context is None else self.context.bytes()
        return sum(part.bytes() for part in self._parts()) + of_context

    def crop_rows(self, lengths_B: Tensor) -> None:
        """Forgets the tokens behind the first so many of each row."""
        # The one that may refuse comes first, so that nothing is half done.
        for part in reversed(self._parts()):
            part.crop(lengths_B)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Makes row i what row ``indices[i]`` was."""
        for part in self._parts():
            part.select(indices)
        if self.context is not None:
            self.context = self.context.select(indices)

    def reset(self) -> None:
        """Forgets everything."""
        self.lsh = self.local = self.context = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Part of transformers' interface; see `prepare`."""
        self.prepare(key_states.shape[0], key_states.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not how this cache is filled.

        Raises:
            TypeError: always.
        """
        raise TypeError("LSHCache holds more than keys and values: only a reformer_lm model can fill it")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Part of transformers' interface: keys that a mask would cover, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        parts = self._parts()
        return int(parts[0].lengths.max()) if parts else 0

    def get_max_length(self) -> int:
        """The model's longest sequence."""
        return self._config.max_position_embeddings

    def get_max_cache_shape(self) -> int:
        """As `get_max_length`; its name in earlier versions of transformers."""
        return self._config.max_position_embeddings


class LSHCache(Cache):
    """The state of all layers, for ``generate()`` and for going on with a text by hand.

        cache = LSHCache(model.config)
        model(prompt, past_key_values=cache)
        model(next_tokens, past_key_values=cache)

    Memory is taken for the tokens there are, in doublings. Rows of a batch may have different numbers of tokens: which
    columns were padding is remembered.

    Args:
        config: of the model.

    Attributes:
        real: bool [B, columns], which of the columns seen so far are tokens.

    Raises:
        ValueError: the model is not causal (``lsh_mask="chunked"``): later tokens change what earlier ones see there.
    """

    def __init__(self, config: ReformerLMConfig) -> None:
        if config.lsh_mask != "causal":
            raise ValueError(
                f'LSHCache needs lsh_mask="causal", not {config.lsh_mask!r}: generate with use_cache=False'
            )
        super().__init__(layers=[LSHCacheLayer(config, index) for index in range(config.num_hidden_layers)])
        self.real: Tensor | None = None

    @property
    def lengths(self) -> Tensor | None:
        """int64 [B], tokens so far; None before the first."""
        return None if self.real is None else self.real.sum(dim=1)

    def require_rows(self, rows: int) -> None:
        """Makes sure that an input has as many rows as the cache.

        Raises:
            ValueError: it has not.
        """
        if self.real is not None and self.real.shape[0] != rows:
            raise ValueError(f"the cache holds {self.real.shape[0]} rows, and the input has {rows}")

    def mask_of_new_tokens(self, attention_mask: Tensor | None, shape: torch.Size) -> Tensor | None:
        """The columns of a mask that belong to new tokens [B, T].

        Args:
            attention_mask: over all tokens, or over the new ones only, or None.
            shape: of the new tokens, (B, T).

        Raises:
            ValueError: it has another number of columns.
        """
        if attention_mask is None:
            return None
        earlier, new = self.get_seq_length(), shape[1]
        if attention_mask.dim() != 2 or attention_mask.shape[1] not in (new, earlier + new):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, expected {shape[0]} rows and as many columns "
                f"as there are new tokens ({new}), or these and the {earlier} before them"
            )
        return attention_mask[:, -new:]

    def take_in(self, real: Tensor) -> None:
        """Notes new columns, bool [B, T]: which are tokens."""
        self.real = real if self.real is None else torch.cat((self.real, real), dim=1)

    def bytes(self) -> int:
        """Memory held by all layers."""
        return sum(layer.bytes() for layer in self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included, as transformers counts."""
        return 0 if self.real is None else self.real.shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets columns: -n the last n of them; n > 0 all but the first n, as earlier versions had it.

        Raises:
            ValueError: local heads have forgotten what stood there: they remember a window more than they see.
        """
        columns = self.get_seq_length()
        kept = columns + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if self.real is None or kept >= columns:
            return
        real = self.real[:, : max(0, kept)]
        for layer in self.layers:
            layer.crop_rows(real.sum(dim=1))
        self.real = real

    def batch_select_indices(self, indices: Tensor) -> None:
        """Makes row i what row ``indices[i]`` was."""
        if self.real is not None:
            indices = indices.to(self.real.device)
            self.real = self.real.index_select(0, indices)
            for layer in self.layers:
                layer.batch_select_indices(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`batch_select_indices`, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row so many times."""
        if self.real is not None:
            rows = torch.arange(self.real.shape[0], device=self.real.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.real = None


__all__ = ["LSHCache", "LSHCacheLayer"]
