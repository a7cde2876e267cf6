"""An output layer over the vocabulary, as causal and masked language models have it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from reformer_lm.backbone import ReformerLMModel
from reformer_lm.config import ReformerLMConfig
from reformer_lm.layers.linear import Linear
from reformer_lm.ops.loss import linear_cross_entropy
from reformer_lm.pretrained import ReformerLMPreTrainedModel


class ReformerLMVocabularyHead(ReformerLMPreTrainedModel):
    """The model with an output layer over the vocabulary; what it predicts is the subclass's business."""

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
        """Logits over the vocabulary [..., vocab_size] of the base model's hidden states [..., hidden_size]."""
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

    def mean_loss(self, hidden: Tensor, targets: Tensor, num_items: int | Tensor | None = None) -> Tensor:
        """Cross-entropy of hidden states against targets, without ever holding all logits.

        Args:
            hidden: the base model's hidden states [B, T, hidden_size].
            targets: int64 [B, T], -100 where none counts.
            num_items: what the sum is divided by, in place of the number of targets.

        Returns:
            Scalar, in nats.
        """
        projected = self._project(hidden).flatten(0, 1)
        total = linear_cross_entropy(projected, self._output_vectors(), self.lm_head.bias, targets.flatten())
        if num_items is None:
            return total / (targets != -100).sum()
        return total / torch.as_tensor(num_items, device=total.device)
