"""What a model is trained for, and what that means for its class and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from reformer_lm.config import ReformerLMConfig
from reformer_lm.encoder_decoder import ReformerLMForConditionalGeneration
from reformer_lm.errors import InputError
from reformer_lm.heads.masked_lm import ReformerLMForMaskedLM
from reformer_lm.model import ReformerLMForCausalLM


@dataclass(frozen=True)
class Task:
    """One of the tasks of ``--task``.

    Attributes:
        name: Its value.
        auto_class: transformers' class that makes and loads such models.
        own_class: Ours.
        settings: Of our model, unless a configuration says otherwise.
        for_others: Whether models of transformers' can be trained so, too.
    """

    name: str
    auto_class: Any
    own_class: type[PreTrainedModel]
    settings: Mapping[str, Any] = field(default_factory=dict)
    for_others: bool = False

    def build(self, config: PretrainedConfig) -> PreTrainedModel:
        """A new model, with random weights."""
        model: PreTrainedModel = self.auto_class.from_config(config)
        return model

    def require_kind(self, config: PretrainedConfig, origin: str) -> None:
        """Refuse a model that this task is not for.

        Args:
            config: Of the model.
            origin: Where it comes from, for the message.

        Raises:
            InputError: It is another package's, or one that looks to the wrong sides.
        """
        if self.name == "seq2seq":
            # Nothing else can have been built for it.
            return
        if not isinstance(config, ReformerLMConfig):
            if not self.for_others:
                raise InputError(
                    f"{origin}: --task {self.name} trains models of this package, not a {config.model_type}; "
                    "leave model_type out"
                )
            return
        if config.causal and self.name == "mlm":
            raise InputError(
                f"{origin}: this is a causal model, and --task mlm needs one that sees both sides; give a "
                '--model_config with its sizes ("causal": false is then meant), which reads its weights anew'
            )
        if not config.causal and self.name == "clm":
            raise InputError(
                f"{origin}: this is a bidirectional model, which cannot predict the next token; give --task mlm"
            )


TASKS = {
    "clm": Task("clm", AutoModelForCausalLM, ReformerLMForCausalLM, for_others=True),
    "mlm": Task("mlm", AutoModelForMaskedLM, ReformerLMForMaskedLM, {"causal": False, "lsh_mask": "chunked"}),
    "seq2seq": Task("seq2seq", AutoModelForSeq2SeqLM, ReformerLMForConditionalGeneration),
}
