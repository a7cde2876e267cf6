"""The Reformer language model as a transformers model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from reformer_lm.cache import LSHCache
from reformer_lm.config import ReformerLMConfig
from reformer_lm.layers.compaction import Compaction, document_positions
from reformer_lm.layers.linear import Linear
from reformer_lm.layers.norms import FinalNorm
from reformer_lm.layers.positions import PositionEmbedding
from reformer_lm.layers.reversible import ReversibleStack
from reformer_lm.layers.sequence import SequenceInfo, check_chunked_only
from reformer_lm.ops.loss import linear_cross_entropy
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
                ``lsh_mask="chunked"`` only, as the next two. All three are reformer-pytorch's.
            keys: [B, C, hidden_size], the vectors of another sequence that every token of the LSH heads sees.
            context_mask: bool [B, C], False for padding of ``keys``.
            past_key_values: the tokens before these, which these then join; ``attention_mask`` may cover all of
                them, or the new ones only. No gradients flow through attention then.
            use_cache: whether to begin a cache where none is given; ``lsh_mask="causal"`` only, else there is none.
            output_hidden_states: whether to return the embedding and each layer's output; keeps all activations.
            output_attentions: not available, since no matrix of attention weights is ever formed.
            return_dict: False for a tuple.
            **kwargs: ignored, for transformers' sake.

        Returns:
            `BaseModelOutputWithPast` with ``last_hidden_state`` [B, T, hidden_size] and, where there is one, the cache.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds``, an empty or too long sequence, a mask
                or positions of another shape, ``output_attentions``, or an input of the chunked mode in causal mode.
        """
        if output_attentions:
            raise ValueError("output_attentions=True is not possible: LSH attention forms no matrix of weights")
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
        check_chunked_only(self.config, shape, input_attn_mask, keys, context_mask)
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
            context_mask=context_mask,
            hash_step=self._next_hash_step(),
            cache=cache,
            counts=None if cache is None or order is None else order.real.sum(dim=1),
        )
        hidden, states = self._run(input_ids, inputs_embeds, info, bool(output_hidden_states))
        if cache is not None:
            cache.take_in(torch.ones(shape, dtype=torch.bool, device=given.device) if order is None else order.real)
        if order is not None:
            hidden = order.unpack(hidden)
            states = None if states is None else tuple(order.unpack(state) for state in states)
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return tuple(x for x in (hidden, cache, states) if x is not None)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache, hidden_states=states)

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


class ReformerLMForCausalLM(ReformerLMPreTrainedModel, GenerationMixin):
    """The model with an output layer over the vocabulary: a language model."""

    _tied_weights_keys = {"lm_head.weight": "reformer.token_embedding.weight"}

    def __init__(self, config: ReformerLMConfig) -> None:
        super().__init__(config)
        width = config.embedding_size or config.hidden_size
        if width == config.hidden_size and not config.tie_word_embeddings:
            width = config.output_width
        self.reformer = ReformerLMModel(config)
        self.head_projection = Linear(config.output_width, width) if width != config.output_width else None
        self.lm_head: nn.Linear = Linear(width, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the output layer."""
        self.lm_head = value

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [..., vocab_size] of the base model's hidden states [..., hidden_size]."""
        if self.config.unit_output_vectors:
            return functional.linear(self._project(hidden), self._output_vectors(), self.lm_head.bias)
        return self.lm_head(self._project(hidden))

    def _output_vectors(self) -> Tensor:
        """One vector per token of the vocabulary."""
        vectors = self.lm_head.weight
        return functional.normalize(vectors, dim=-1) if self.config.unit_output_vectors else vectors

    def _project(self, hidden: Tensor) -> Tensor:
        """To the width of a factorised embedding, where there is one."""
        return hidden if self.head_projection is None else self.head_projection(hidden)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """A cache from the beginning, as assisted decoding wants it; and a word at once on what cannot fit.

        Raises:
            ValueError: the text could grow beyond max_position_embeddings, which it would say only when it is there.
        """
        mask = model_kwargs.get("attention_mask")
        padding = 0 if mask is None or mask.dim() != 2 else int((mask == 0).sum(dim=1).min())
        tokens, longest = generation_config.max_length - padding, self.config.max_position_embeddings
        if tokens > longest:
            raise ValueError(
                f"prompt and new tokens would come to {tokens:,}, more than max_position_embeddings ({longest:,}): "
                "give a smaller max_new_tokens or a shorter prompt"
            )
        wanted = generation_config.use_cache is not False and self.config.lsh_mask == "causal"
        if wanted and model_kwargs.get("past_key_values") is None and generation_config.cache_implementation is None:
            model_kwargs["past_key_values"] = LSHCache(self.config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: LSHCache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The tokens that the cache has not seen; without a cache, and in chunked mode, all of them."""
        attention_mask = kwargs.get("attention_mask")
        if past_key_values is not None:
            # A prompt in chunks comes chunk by chunk, everything else as a whole; the mask covers what was seen, too.
            total = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
            unseen = total - past_key_values.get_seq_length()
            # Without a mask a chunk is known by its shortness.
            input_ids = input_ids[:, -unseen:] if unseen > 0 else input_ids
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": kwargs.get("logits_to_keep", 1),
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
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
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Computes next-token logits and, given labels, the loss.

        Args:
            input_ids: see `ReformerLMModel.forward`, as the arguments not named here.
            attention_mask: see there.
            labels: int64 [B, T], -100 where a token does not count. They are shifted here: the logits at t are
                scored against the label at t + 1. What ``attention_mask`` marks as padding never counts.
            position_ids: see there.
            inputs_embeds: see there.
            document_ids: see there. The first token of a document is still predicted from the last one of the
                document before, unless its label is -100.
            input_attn_mask: see there.
            keys: see there.
            context_mask: see there.
            past_key_values: see there.
            use_cache: see there.
            output_hidden_states: see there.
            output_attentions: see there.
            return_dict: False for a tuple.
            logits_to_keep: only the last so many positions get logits (0: all), or a tensor of positions.
            skip_logits: with labels, whether to leave the logits out, so that [T, vocabulary] is never held. By
                default so in training.
            num_items_in_batch: number that the summed loss is divided by, in place of the number of labels; for
                gradient accumulation over uneven batches.
            shift_labels: int64 [B, T], in place of ``labels``: the logits at t are scored against the label at t, as in
                transformers' loss functions. So the last token need not be an input. Of padding only the input side
                is known here; targets that are padding must be -100.
            **kwargs: ignored, for transformers' sake.

        Returns:
            `CausalLMOutputWithPast` with ``loss`` in nats, ``logits`` [B, T, vocab_size] and, where there is one, the
            cache in ``past_key_values``.
        """
        output = self.reformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            input_attn_mask=input_attn_mask,
            keys=keys,
            context_mask=context_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        hidden = output.last_hidden_state
        loss = None
        if shift_labels is not None or labels is not None:
            loss = self._loss(hidden, labels, shift_labels, attention_mask, num_items_in_batch)
        logits = None
        if not (loss is not None and (self.training if skip_logits is None else skip_logits)):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.compute_logits(hidden[:, kept])
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states
        )
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return result.to_tuple()
        return result

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        attention_mask: Tensor | None,
        num_items: int | Tensor | None,
    ) -> Tensor:
        name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
        assert given is not None
        if given.shape != hidden.shape[:2]:
            raise ValueError(f"{name} has shape {tuple(given.shape)}, expected {tuple(hidden.shape[:2])}")
        # Padding is never scored, nor is a token predicted from padding (the first one behind padding on the left).
        scored = None if attention_mask is None else attention_mask != 0
        targets = given.to(hidden.device)
        if shift_labels is None:
            hidden, targets = hidden[:, :-1], targets[:, 1:]
            scored = None if scored is None else scored[:, 1:] & scored[:, :-1]
        if scored is not None:
            targets = targets.masked_fill(~scored, -100)
        projected = self._project(hidden).flatten(0, 1)
        total = linear_cross_entropy(projected, self._output_vectors(), self.lm_head.bias, targets.flatten())
        if num_items is None:
            return total / (targets != -100).sum()
        return total / torch.as_tensor(num_items, device=total.device)


AutoConfig.register(ReformerLMConfig.model_type, ReformerLMConfig)
AutoModel.register(ReformerLMConfig, ReformerLMModel)
AutoModelForCausalLM.register(ReformerLMConfig, ReformerLMForCausalLM)

__all__ = ["ReformerLMForCausalLM", "ReformerLMModel", "ReformerLMPreTrainedModel"]
