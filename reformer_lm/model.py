"""The Reformer as a causal language model of transformers, and where all its models are registered there."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    GenerationMixin,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from reformer_lm.backbone import ReformerLMModel
from reformer_lm.cache import LSHCache
from reformer_lm.config import ReformerLMConfig
from reformer_lm.heads.classification import ReformerLMForSequenceClassification, ReformerLMForTokenClassification
from reformer_lm.heads.masked_lm import ReformerLMForMaskedLM
from reformer_lm.heads.vocabulary import ReformerLMVocabularyHead
from reformer_lm.pretrained import ReformerLMPreTrainedModel


class ReformerLMForCausalLM(ReformerLMVocabularyHead, GenerationMixin):
    """The model with an output layer over the vocabulary that predicts the next token: a language model.

    Raises:
        ValueError: the configuration is that of a bidirectional model (``causal=False``).
    """

    def __init__(self, config: ReformerLMConfig) -> None:
        if not config.causal:
            raise ValueError("a causal language model needs causal=True: use ReformerLMForMaskedLM, or change it")
        super().__init__(config)

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
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
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
        return self.mean_loss(hidden, targets, num_items)


AutoConfig.register(ReformerLMConfig.model_type, ReformerLMConfig)
AutoModel.register(ReformerLMConfig, ReformerLMModel)
AutoModelForCausalLM.register(ReformerLMConfig, ReformerLMForCausalLM)
AutoModelForMaskedLM.register(ReformerLMConfig, ReformerLMForMaskedLM)
AutoModelForSequenceClassification.register(ReformerLMConfig, ReformerLMForSequenceClassification)
AutoModelForTokenClassification.register(ReformerLMConfig, ReformerLMForTokenClassification)

__all__ = [
    "ReformerLMForCausalLM",
    "ReformerLMForMaskedLM",
    "ReformerLMForSequenceClassification",
    "ReformerLMForTokenClassification",
    "ReformerLMModel",
    "ReformerLMPreTrainedModel",
]
