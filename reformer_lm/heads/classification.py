"""Classification of whole sequences and of single tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from reformer_lm.backbone import ReformerLMModel
from reformer_lm.config import ReformerLMConfig
from reformer_lm.heads.masked_lm import scored_labels
from reformer_lm.layers.linear import Linear
from reformer_lm.pretrained import ReformerLMPreTrainedModel

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


class _Classifier(ReformerLMPreTrainedModel):
    """The model with a linear layer that gives each hidden state a score per label."""

    def __init__(self, config: ReformerLMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.reformer = ReformerLMModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.score = Linear(config.output_width, config.num_labels)
        self.post_init()


class ReformerLMForSequenceClassification(_Classifier):
    """One score per label for a whole sequence.

    A causal model is read at the last real token, the only one that has seen everything; a bidirectional one at the
    mean of the real tokens. So a row gets the scores that it gets alone, whatever stands beside it in the batch.
    """

    # transformers' Trainer: the loss is a mean over the batch, to be divided by the steps of gradient accumulation.
    accepts_loss_kwargs = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Computes scores and, given labels, the loss.

        Args:
            input_ids: see `ReformerLMModel.forward`, as the arguments not named here.
            attention_mask: see there. Without it every token counts as real, also one that looks like padding.
            labels: what ``config.problem_type`` says: "regression" float [B] or [B, num_labels] (mean squared error);
                "single_label_classification" int64 [B], -100 for a row that does not count (cross-entropy);
                "multi_label_classification" float [B, num_labels] of 0 and 1 (binary cross-entropy). Where it says
                nothing, one label means regression, whole numbers a single label, others several; it is then set.
            position_ids: see there.
            inputs_embeds: see there.
            output_hidden_states: see there.
            output_attentions: see there.
            return_dict: False for a tuple.
            **kwargs: ignored, for transformers' sake.

        Returns:
            `SequenceClassifierOutput` with ``loss`` and ``logits`` [B, num_labels]. A row of padding alone is read as a
            hidden state of zeros.

        Raises:
            ValueError: labels of another shape, an unknown problem type, and what `ReformerLMModel.forward` refuses.
        """
        output = self.reformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        pooled = self._pool(output.last_hidden_state, attention_mask)
        logits = self.score(self.dropout(pooled))
        loss = None if labels is None else self._loss(logits, labels.to(logits.device))
        result = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return result.to_tuple()
        return result

    def _pool(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """[B, T, hidden_size] -> [B, hidden_size]."""
        if attention_mask is None:
            return hidden[:, -1] if self.config.causal else hidden.mean(dim=1)
        real = attention_mask != 0
        if self.config.causal:
            places = torch.arange(hidden.shape[1], device=hidden.device)
            last = torch.where(real, places, 0).amax(dim=1)
            return hidden[torch.arange(len(last), device=hidden.device), last]
        # At padding the hidden states are 0.
        return hidden.sum(dim=1) / real.sum(dim=1, keepdim=True).clamp_min(1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        config, rows = self.config, logits.shape[0]
        if config.problem_type is None:
            # transformers' rule. It is written down, since pipelines read there what the scores mean.
            whole = not labels.is_floating_point() and labels.dtype != torch.bool
            kind = "single_label_classification" if whole else "multi_label_classification"
            config.problem_type = "regression" if self.num_labels == 1 else kind
        if config.problem_type not in PROBLEM_TYPES:
            raise ValueError(f"problem_type={config.problem_type!r} is not possible: choose {', '.join(PROBLEM_TYPES)}")
        single = config.problem_type == "single_label_classification"
        expected = (rows,) if single or self.num_labels == 1 else (rows, self.num_labels)
        if labels.numel() != rows * (1 if len(expected) == 1 else self.num_labels) or labels.shape[0] != rows:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, expected {expected} for problem_type={config.problem_type!r}"
            )
        # As wide as float32: a mean of half-precision squares would be rough.
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if single:
            return functional.cross_entropy(scores, labels.view(rows).long())
        wanted = labels.reshape(scores.shape).to(scores.dtype)
        if config.problem_type == "regression":
            return functional.mse_loss(scores, wanted)
        return functional.binary_cross_entropy_with_logits(scores, wanted)


class ReformerLMForTokenClassification(_Classifier):
    """One score per label for each token, as for parts of speech, word borders or names."""

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
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Computes scores and, given labels, the loss.

        Args:
            input_ids: see `ReformerLMModel.forward`, as the arguments not named here.
            attention_mask: see there.
            labels: int64 [B, T], the label of each token, -100 where none counts. What ``attention_mask`` marks as
                padding never counts.
            position_ids: see there.
            inputs_embeds: see there.
            document_ids: see there.
            output_hidden_states: see there.
            output_attentions: see there.
            return_dict: False for a tuple.
            num_items_in_batch: number that the summed loss is divided by, in place of the number of labels.
            **kwargs: ignored, for transformers' sake.

        Returns:
            `TokenClassifierOutput` with ``loss``, a mean cross-entropy in nats, and ``logits`` [B, T, num_labels].

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
        logits = self.score(self.dropout(hidden))
        loss = None
        if labels is not None:
            targets = scored_labels(labels, hidden, attention_mask)
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
            total = functional.cross_entropy(scores, targets.flatten(), reduction="sum")
            counted = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = total / torch.as_tensor(counted, device=total.device)
        result = TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return result.to_tuple()
        return result
