"""An encoder and a decoder that sees what the encoder made of another text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from reformer_lm.backbone import ReformerLMModel
from reformer_lm.cache import LSHCache
from reformer_lm.config import ReformerLMConfig
from reformer_lm.model import ReformerLMForCausalLM


class ReformerEncDecConfig(PreTrainedConfig):
    """Configuration of `ReformerLMForConditionalGeneration`.

    Args:
        encoder: keys of a `ReformerLMConfig`, or one. Where they do not say otherwise, the encoder is bidirectional
            (``causal=False``, ``lsh_mask="chunked"``).
        decoder: the same for the decoder, which is causal. With ``lsh_mask="causal"`` it is exactly so: its LSH heads
            see the whole source and decoding goes on from a cache. With "chunked" the source is hashed and sorted with
            the tokens, as in reformer-pytorch, and each new token runs the whole prefix.
        pad_token_id: by default the decoder's, as the next two.
        bos_token_id: begins a text.
        eos_token_id: ends one.
        decoder_start_token_id: what the decoder is given first; by default ``bos_token_id``.
        **kwargs: of transformers' `PreTrainedConfig`.

    Raises:
        ValueError: parts that do not fit together, naming the key, its value and the remedy.
    """

    model_type = "reformer_enc_dec"
    sub_configs = {"encoder": ReformerLMConfig, "decoder": ReformerLMConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        encoder: ReformerLMConfig | dict[str, Any] | None = None,
        decoder: ReformerLMConfig | dict[str, Any] | None = None,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        decoder_start_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.encoder = _part(encoder, {"causal": False, "lsh_mask": "chunked"})
        self.decoder = _part(decoder, {})
        if self.encoder.hidden_size != self.decoder.hidden_size:
            raise ValueError(
                f"encoder.hidden_size={self.encoder.hidden_size} is not possible: the decoder projects the encoder's "
                f"output like its own hidden states, so give both the same ({self.decoder.hidden_size})"
            )
        if self.encoder.merge_streams != "mean":
            raise ValueError(
                'encoder.merge_streams="concatenate" is not possible: the decoder reads hidden_size; leave it'
            )
        if not self.decoder.causal:
            raise ValueError("decoder.causal=False is not possible: a decoder writes from left to right; leave it out")
        heads = self.decoder.num_attention_heads
        if all(self.decoder.local_heads_of(layer) == heads for layer in range(self.decoder.num_hidden_layers)):
            raise ValueError(
                f"decoder.num_local_heads={self.decoder.num_local_heads} is not possible: only LSH heads see the "
                f"source, so give fewer than num_attention_heads ({heads}) in some layer"
            )
        kwargs.setdefault("is_encoder_decoder", True)
        given = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        special = {name: getattr(self.decoder, name, None) if token is None else token for name, token in given.items()}
        start = special["bos_token_id"] if decoder_start_token_id is None else decoder_start_token_id
        super().__init__(**special, decoder_start_token_id=start, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: both parts whole, so that nobody need know what an encoder is by default."""
        parts = {"encoder": self.encoder.to_dict(), "decoder": self.decoder.to_dict()}
        return {**super().to_diff_dict(), **parts}

    @property
    def max_position_embeddings(self) -> int:
        """The longest source and target: the shorter of what both parts allow."""
        longest: int = min(self.encoder.max_position_embeddings, self.decoder.max_position_embeddings)
        return longest

    @property
    def vocab_size(self) -> int:
        """The decoder's, as the next two."""
        return self.decoder.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the residual streams."""
        return self.decoder.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the decoder."""
        return self.decoder.num_hidden_layers


def _part(given: ReformerLMConfig | dict[str, Any] | None, defaults: dict[str, Any]) -> ReformerLMConfig:
    return given if isinstance(given, ReformerLMConfig) else ReformerLMConfig(**{**defaults, **(given or {})})


class ReformerLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Writes a text for a source text.

    The encoder's output stands beside the decoder's tokens as further keys and values of its LSH heads, projected by
    the same matrices (``keys`` of `ReformerLMModel.forward`); there is no attention layer of its own for it.

    Source: reformer-pytorch's ReformerEncDec.
    """

    config_class = ReformerEncDecConfig
    base_model_prefix = "encoder_decoder"
    main_input_name = "input_ids"
    _no_split_modules = ["ReversibleLayer"]

    def __init__(self, config: ReformerEncDecConfig) -> None:
        super().__init__(config)
        self.encoder = ReformerLMModel(config.encoder)
        self.decoder = ReformerLMForCausalLM(config.decoder)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The decoder's is an LSHCache.
        return False

    def get_encoder(self, modality: str | None = None) -> ReformerLMModel:
        """The encoder."""
        return self.encoder

    def get_decoder(self, *args: Any, **kwargs: Any) -> ReformerLMForCausalLM:
        """The decoder, with its output layer."""
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's token embedding; the decoder has one of its own."""
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the encoder's token embedding."""
        self.encoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The decoder's output layer."""
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the decoder's output layer."""
        self.decoder.set_output_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resizes the embeddings of both parts, and the output layer.

        Raises:
            ValueError: the parts have vocabularies of different sizes, so that one number cannot be meant for both.
        """
        sizes = self.config.encoder.vocab_size, self.config.decoder.vocab_size
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"encoder and decoder have vocabularies of {sizes[0]:,} and {sizes[1]:,} tokens: resize the one meant, "
                "model.encoder or model.decoder"
            )
        resized: nn.Embedding = self.encoder.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.decoder.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        return resized

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        past_key_values: LSHCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """Computes next-token logits of the target and, given labels, the loss.

        Args:
            input_ids: int64 [B, S], the source; see `ReformerLMModel.forward`.
            attention_mask: [B, S], nonzero for real tokens of the source.
            decoder_input_ids: int64 [B, T], the target so far; by default the labels, shifted to the right behind
                ``decoder_start_token_id``.
            decoder_attention_mask: [B, T], nonzero for real tokens of the target; where the inputs come from the
                labels, by default those that are not -100.
            labels: int64 [B, T], -100 where none counts: the logits at t are scored against the label at t.
            encoder_outputs: of an earlier call, in place of the source; then ``attention_mask`` still belongs to it.
            inputs_embeds: [B, S, embedding_size] in place of ``input_ids``.
            decoder_inputs_embeds: [B, T, embedding_size] in place of ``decoder_input_ids``.
            past_key_values: the target's tokens before these. They remember the source, which is then not looked at.
            use_cache: whether to begin a cache where none is given; only with ``decoder.lsh_mask="causal"``.
            output_hidden_states: see `ReformerLMModel.forward`.
            output_attentions: see there.
            return_dict: False for a tuple.
            logits_to_keep: see `ReformerLMForCausalLM.forward`, as the next two.
            skip_logits: see there.
            num_items_in_batch: see there.
            **kwargs: ignored, for transformers' sake.

        Returns:
            `Seq2SeqLMOutput` with ``loss`` in nats, ``logits`` [B, T, vocab_size] and, where there is one, the cache.
            ``decoder_attentions`` [B, H, T, T] and ``cross_attentions`` [B, H, T, S] are shares of one softmax.

        Raises:
            ValueError: nothing to begin the target with, and whatever the parts refuse.
        """
        begun = past_key_values is not None and past_key_values.get_seq_length() > 0
        if encoder_outputs is None and not begun:
            encoder_outputs = self.encoder(
                input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                return_dict=True,
            )
        encoded = BaseModelOutput()
        if encoder_outputs is not None:
            is_tuple = isinstance(encoder_outputs, tuple)
            encoded = BaseModelOutput(*encoder_outputs[:3]) if is_tuple else encoder_outputs
        source = None if begun else encoded.last_hidden_state
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shifted_right(labels)
            if decoder_attention_mask is None:
                decoder_attention_mask = torch.ones_like(decoder_input_ids)
                decoder_attention_mask[:, 1:] = labels[:, :-1] != -100
        decoded = self.decoder(
            decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            shift_labels=labels,
            keys=source,
            context_mask=None if source is None or attention_mask is None else attention_mask != 0,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            logits_to_keep=logits_to_keep,
            skip_logits=skip_logits,
            num_items_in_batch=num_items_in_batch,
        )
        own = cross = None
        if decoded.attentions is not None and source is not None:
            columns = source.shape[1]
            tokens = decoded.attentions[0].shape[2]
            own = tuple(weights[..., :tokens] for weights in decoded.attentions)
            # A layer of local heads alone does not see the source.
            cross = tuple(
                weights[..., -columns:] if weights.shape[3] > tokens else weights.new_zeros(*weights.shape[:3], columns)
                for weights in decoded.attentions
            )
        result = Seq2SeqLMOutput(
            loss=decoded.loss,
            logits=decoded.logits,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=own,
            cross_attentions=cross,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return result.to_tuple()
        return result

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Labels [B, T], shifted to the right behind the start token; transformers' collators ask for it."""
        return self._shifted_right(labels)

    def _shifted_right(self, labels: Tensor) -> Tensor:
        start = self.config.decoder_start_token_id
        if start is None:
            raise ValueError(
                "there is nothing to begin the target with: give decoder_input_ids, or set decoder_start_token_id"
            )
        padding = start if self.config.pad_token_id is None else self.config.pad_token_id
        shifted = torch.cat((torch.full_like(labels[:, :1], start), labels[:, :-1]), dim=1)
        return shifted.masked_fill(shifted == -100, padding)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """A cache of the decoder from the beginning; and a word at once on what cannot fit.

        Raises:
            ValueError: the target could grow beyond the decoder's max_position_embeddings.
        """
        decoder = self.config.decoder
        if generation_config.max_length > decoder.max_position_embeddings:
            raise ValueError(
                f"the target would come to {generation_config.max_length:,} tokens, more than the decoder's "
                f"max_position_embeddings ({decoder.max_position_embeddings:,}): give a smaller max_new_tokens"
            )
        wanted = generation_config.use_cache is not False and decoder.lsh_mask == "causal"
        if wanted and model_kwargs.get("past_key_values") is None and generation_config.cache_implementation is None:
            model_kwargs["past_key_values"] = LSHCache(decoder)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: LSHCache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The target's tokens that the cache has not seen, and the source; without a cache all of them."""
        if past_key_values is not None:
            input_ids = input_ids[:, past_key_values.get_seq_length() :]
        return {
            "decoder_input_ids": input_ids,
            "decoder_attention_mask": kwargs.get("decoder_attention_mask"),
            "attention_mask": kwargs.get("attention_mask"),
            "encoder_outputs": kwargs.get("encoder_outputs"),
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": kwargs.get("logits_to_keep", 1),
        }


AutoConfig.register(ReformerEncDecConfig.model_type, ReformerEncDecConfig)
AutoModelForSeq2SeqLM.register(ReformerEncDecConfig, ReformerLMForConditionalGeneration)

__all__ = ["ReformerEncDecConfig", "ReformerLMForConditionalGeneration"]
