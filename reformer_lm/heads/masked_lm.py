"""A masked language model: a bidirectional encoder that fills in what was masked."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import MaskedLMOutput

from reformer_lm.config import ReformerLMConfig
from reformer_lm.heads.vocabulary import ReformerLMVocabularyHead


class ReformerLMForMaskedLM(ReformerLMVocabularyHead):
    """The bidirectional model with an output layer over the vocabulary, as BERT is trained.

    Its attention is that of reformer-pytorch's ``ReformerLM(causal=False)``: fixed chunks of the sorted order, local
    heads that see the block before, their own and the block behind.

    Raises:
        ValueError: the configuration is that of a causal model.

    Source: Devlin et al. 2019 (arXiv 1810.04805), section 3.1, "Masked LM".
    """

    def __init__(self, config: ReformerLMConfig) -> None:
        if config.causal:
            raise ValueError(
                'a masked language model sees both sides: set causal=False and lsh_mask="chunked" (weights of a causal '
                "model can be loaded so, with num_shifted_heads=0 besides)"
            )
        super().__init__(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Computes logits at every token and, given labels, the loss.

        Args:
            input_ids: see `ReformerLMModel.forward`, as the arguments not named here.
            attention_mask: see there.
            labels: int64 [B, T], the token that belongs at each place, -100 where none is asked for: the logits at t
                are scored against the label at t. What ``attention_mask`` marks as padding never counts.
            position_ids: see there.
            inputs_embeds: see there.
            document_ids: see there.
            output_hidden_states: see there.
            output_attentions: see there.
            return_dict: False for a tuple.
            skip_logits: with labels, whether to leave the logits out, so that [T, vocabulary] is never held. By default
                so in training.
            num_items_in_batch: number that the summed loss is divided by, in place of the number of labels.
            **kwargs: ignored, for transformers' sake.

        Returns:
            `MaskedLMOutput` with ``loss`` in nats and ``logits`` [B, T, vocab_size].

        Raises:
            ValueError: labels of another shape, and whatever `ReformerLMModel.forward` refuses.
        """
        output = self.reformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        hidden = output.last_hidden_state
        loss = logits = None
        if labels is not None:
            targets = scored_labels(labels, hidden, attention_mask)
            # Most places are not asked about: only the others meet the output matrix.
            asked = targets != -100
            loss = self.mean_loss(hidden[asked].unsqueeze(0), targets[asked].unsqueeze(0), num_items_in_batch)
        if not (loss is not None and (self.training if skip_logits is None else skip_logits)):
            logits = self.compute_logits(hidden)
        result = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return result.to_tuple()
        return result


def scored_labels(labels: Tensor, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Labels of tokens, with -100 at the padding.

    Args:
        labels: int64 [B, T].
        hidden: [B, T, hidden_size], what the labels belong to.
        attention_mask: [B, T], nonzero for real tokens, or None.

    Returns:
        int64 [B, T] on the device of ``hidden``.

    Raises:
        ValueError: labels of another shape.
    """
    if labels.shape != hidden.shape[:2]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:2])}")
    labels = labels.to(hidden.device)
    return labels if attention_mask is None else labels.masked_fill(attention_mask.to(labels.device) == 0, -100)
