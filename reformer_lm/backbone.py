"""The model without a head: embeddings, the reversible stack and the last norm."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from reformer_lm.cache import LSHCache
from reformer_lm.config import ReformerLMConfig
from reformer_lm.layers.compaction import Compaction, document_positions
from reformer_lm.layers.linear import Linear
from reformer_lm.layers.norms import FinalNorm
from reformer_lm.layers.positions import PositionEmbedding
from reformer_lm.layers.recording import AttentionRecord, record_attention
from reformer_lm.layers.reversible import ReversibleStack
from reformer_lm.layers.sequence import SequenceInfo
from reformer_lm.pretrained import ReformerLMPreTrainedModel


class ReformerLMModel(ReformerLMPreTrainedModel):
    """Token and position embeddings, the reversible stack and the last norm."""

    def __init__(self, config: ReformerLMConfig) -> None:
        super().__init__(config)
        width = config.embedding_size or config.hidden_size
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = PositionEmbedding(config)
        self.embedding_projection = Linear(width, config.hidden_size) if width != config.hidden_size else None
        self.embedding_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.stack = ReversibleStack(config)
        self.norm = FinalNorm(config.output_width, eps=config.layer_norm_eps)
        # Number of forward passes in training; with rehash="step" it seeds the rotations. A trainer that resumes
        # sets it again.
        self.hash_step = 0
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the token embedding."""
        self.token_embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        input_attn_mask: Tensor | None = None,
        keys: Tensor | None = None,
        context_mask: Tensor | None = None,
        past_key_values: LSHCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Computes hidden states.

        Args:
            input_ids: int64 [B, T], 1 <= T <= max_position_embeddings (padding not counted).
            attention_mask: [B, T], nonzero for real tokens; padding may stand on either side. Real tokens get the
                same output as without any padding; at padding the output is 0.
            position_ids: int64 [B, T]; by default real tokens count from 0, in each document anew.
            inputs_embeds: [B, T, embedding_size] in place of ``input_ids``.
            document_ids: int64 [B, T], the same number for all tokens of a document, which stand together. Documents
                packed into one row then do not see each other: each gets the output that it gets alone.
            input_attn_mask: bool [B or 1, T, T], True where a query (row) may see a key (column);
                ``lsh_mask="chunked"`` only. This and the next two are reformer-pytorch's.
            keys: [B, C, hidden_size], the vectors of another sequence, an encoder's output say, that every token of the
                LSH heads sees. With ``lsh_mask="causal"`` it sees all of them, at a cost of T * C products a head; in
                chunked mode they are hashed and sorted with the tokens. A cache keeps them: they are given once.
            context_mask: [B, C], nonzero but for padding of ``keys``.
            past_key_values: the tokens before these, which these then join; ``attention_mask`` may cover all of
                them, or the new ones only. No gradients flow through attention then.
            use_cache: whether to begin a cache where none is given; ``lsh_mask="causal"`` only, else there is none.
            output_hidden_states: whether to return the embedding and each layer's output; keeps all activations.
            output_attentions: whether to return attention weights. The model itself never forms them: they are
                computed besides (see `record_attention`), hold layers * heads * B * T * T numbers, and cost as much
                time as full attention. For looking at short inputs; without gradients.
            return_dict: False for a tuple.
            **kwargs: ignored, for transformers' sake.

        Returns:
            `BaseModelOutputWithPast` with ``last_hidden_state`` [B, T, hidden_size] and, where there is one, the cache;
            ``hidden_states``, one [B, T, hidden_size] for the embedding and each layer; and ``attentions``, one
            [B, H, T, S] per layer, the rounds combined: the share of the value at s in the output at t, local heads
            first. S is T; learned memory and ``keys`` follow in this order.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds``, an empty or too long sequence, a mask
                or positions of another shape, an input of the chunked mode in causal mode, or ``output_attentions`` or
                ``keys`` with a cache that holds tokens.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        shape = given.shape[:2]
        if shape[1] == 0:
            raise ValueError("the sequence is empty: give at least one token")
        for name, tensor in (
            ("attention_mask", attention_mask), ("position_ids", position_ids), ("document_ids", document_ids)
        ):  # fmt: skip
            if name == "attention_mask" and past_key_values is not None:
                continue
            if tensor is not None and (tensor.dim() != 2 or tensor.shape[1] != shape[1]):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} like the input")
        self._check_masks(shape, input_attn_mask, keys, context_mask)
        if past_key_values is not None and past_key_values.get_seq_length():
            for name, wanted in (("output_attentions", output_attentions), ("keys", keys is not None)):
                if wanted:
                    raise ValueError(f"{name} cannot be used with a cache that holds tokens: give the whole sequence")
        cache = past_key_values
        if cache is None and use_cache and self.config.lsh_mask == "causal":
            cache = LSHCache(self.config)
        earlier = None if cache is None else cache.lengths
        if cache is not None:
            cache.require_rows(shape[0])
            attention_mask = cache.mask_of_new_tokens(attention_mask, shape)
            if document_ids is not None:
                raise ValueError("document_ids cannot be used with a cache: give each document a row of its own")
        order = Compaction.of(attention_mask)
        if order is not None:
            input_ids, inputs_embeds, position_ids, document_ids = (
                None if x is None else order.pack(x) for x in (input_ids, inputs_embeds, position_ids, document_ids)
            )
            input_attn_mask = None if input_attn_mask is None else order.pack_pairs(input_attn_mask)
        if position_ids is None:
            position_ids = document_positions(
                given.shape[1] if order is None else order.longest, document_ids, given.device
            )
            if earlier is not None:
                position_ids = position_ids + earlier.unsqueeze(1)
        info = SequenceInfo(
            position_ids,
            mask=order.mask if order is not None and self.config.lsh_mask == "chunked" else None,
            documents=document_ids,
            attention_mask=input_attn_mask,
            context=keys,
            context_mask=None if context_mask is None or bool(context_mask.all()) else context_mask != 0,
            hash_step=self._next_hash_step(),
            cache=cache,
            counts=None if cache is None or order is None else order.real.sum(dim=1),
        )
        longest = info.position_ids.shape[1]
        records: list[AttentionRecord] = []
        with contextlib.ExitStack() as stack:
            if output_attentions:
                # Recorded in place, as the layers run: with the masks and the buckets that they use.
                records = stack.enter_context(record_attention(self, longest))
            hidden, states = self._run(input_ids, inputs_embeds, info, bool(output_hidden_states))
        weights = tuple(record.weights for record in records) if output_attentions else None
        if cache is not None:
            cache.take_in(torch.ones(shape, dtype=torch.bool, device=given.device) if order is None else order.real)
        if order is not None:
            hidden = order.unpack(hidden)
            states = None if states is None else tuple(order.unpack(state) for state in states)
            weights = None if weights is None else tuple(order.unpack_weights(w) for w in weights if w is not None)
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return tuple(x for x in (hidden, cache, states, weights) if x is not None)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=cache, hidden_states=states, attentions=weights
        )

    def _check_masks(
        self, shape: torch.Size, input_attn_mask: Tensor | None, keys: Tensor | None, context_mask: Tensor | None
    ) -> None:
        if input_attn_mask is not None and self.config.lsh_mask != "chunked":
            raise ValueError('input_attn_mask needs lsh_mask="chunked": leave it out, or change the configuration')
        if keys is not None and (keys.dim() != 3 or keys.shape[::2] != (shape[0], self.config.hidden_size)):
            raise ValueError(f"keys has shape {tuple(keys.shape)}, expected ({shape[0]}, C, {self.config.hidden_size})")
        if context_mask is not None and (keys is None or context_mask.shape != keys.shape[:2]):
            raise ValueError("context_mask must be given with keys and have their first two sizes")

    def _next_hash_step(self) -> int | None:
        if not (self.training and self.config.rehash == "step"):
            return None
        self.hash_step += 1
        return self.hash_step - 1

    def _run(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, info: SequenceInfo, output_hidden_states: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        tokens = info.position_ids.shape[1]
        if info.cache is not None and info.cache.lengths is not None:
            tokens += int(info.cache.lengths.max())
        longest = self.config.max_position_embeddings
        if tokens > longest:
            raise ValueError(
                f"the sequence has {tokens:,} tokens, more than max_position_embeddings ({longest:,}): shorten it, "
                "or train with a larger max_position_embeddings"
            )
        x = self._embed(input_ids, inputs_embeds, info.position_ids)
        states: tuple[Tensor, ...] | None = None
        if output_hidden_states:
            collected = [x]
            x1 = x2 = x
            for x1, x2 in self.stack.hidden_states(x, x, info):
                collected.append((x1 + x2) / 2)
        else:
            x1, x2 = self.stack(x, x, info)
        merged = torch.cat((x1, x2), dim=-1) if self.config.merge_streams == "concatenate" else (x1 + x2) / 2
        hidden = self.norm(merged.to(self.norm.weight.dtype))
        if output_hidden_states:
            states = (*collected[:-1], hidden)
        return hidden, states

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, position_ids: Tensor) -> Tensor:
        x = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        positions = self.position_embedding(position_ids, torch.promote_types(x.dtype, torch.float32))
        if positions is not None:
            x = x + positions.to(x.dtype)
        if self.embedding_projection is not None:
            x = self.embedding_projection(x)
        # The residual streams stay float32 in mixed precision: they are added up and taken apart again.
        return self.embedding_dropout(x).to(torch.promote_types(x.dtype, torch.float32))
