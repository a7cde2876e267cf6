"""Initial weights, and what else all heads have in common with transformers."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from reformer_lm.config import ReformerLMConfig
from reformer_lm.layers.attention import LSHSelfAttention
from reformer_lm.layers.linear import ResidualLinear
from reformer_lm.layers.norms import FinalNorm, ReZeroGate, ScaleNorm
from reformer_lm.layers.positions import PositionTable
from reformer_lm.layers.product_key_memory import ProductKeyMemory

# Standard deviation of initial position embeddings, as a share of initializer_range.
_POSITION_SHARE = 0.25


class ReformerLMPreTrainedModel(PreTrainedModel):
    """Weights initialisation, saving and loading, common to all heads."""

    config_class = ReformerLMConfig
    base_model_prefix = "reformer"
    main_input_name = "input_ids"
    _no_split_modules = ["ReversibleLayer"]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The model makes its own, LSHCache, on the first forward pass.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Gives a module its initial weights.

        Linear layers get N(0, initializer_range), those that write into the residual streams scaled down with depth,
        as in GPT-2; positions a quarter of it; token embeddings N(0, 1 / embedding_size).
        """
        # transformers visits every module that owns parameters, and none that merely contains such modules.
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            narrow = math.sqrt(2 * self.config.num_hidden_layers) if isinstance(module, ResidualLinear) else 1.0
            init.normal_(module.weight, mean=0.0, std=std / narrow)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, PositionTable):
            init.normal_(module.weight, mean=0.0, std=std * _POSITION_SHARE)
        elif isinstance(module, nn.ParameterList):  # of the axial embedding
            for weight in module:
                init.normal_(weight, mean=0.0, std=std * _POSITION_SHARE)
        elif isinstance(module, nn.Embedding):
            # Vectors of length 1, well above the positions': a hash should go by content before it goes by place.
            init.normal_(module.weight, mean=0.0, std=1.0 / math.sqrt(module.embedding_dim))
        elif isinstance(module, nn.EmbeddingBag):  # the values of a product-key memory
            init.normal_(module.weight, mean=0.0, std=1.0 / math.sqrt(module.embedding_dim))
        elif isinstance(module, ProductKeyMemory):
            init.normal_(module.keys, mean=0.0, std=1.0 / math.sqrt(module.keys.shape[-1]))
        elif isinstance(module, nn.LayerNorm):
            if isinstance(module, FinalNorm) and self.config.tie_word_embeddings:
                init.copy_(module.weight, torch.randint_like(module.weight, 2) * 2 - 1)
            else:
                init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ScaleNorm):
            # The length that a layer norm's output has.
            init.constant_(module.weight, math.sqrt(self.config.hidden_size))
        elif isinstance(module, ReZeroGate):
            init.zeros_(module.weight)
        elif isinstance(module, LSHSelfAttention) and module.memory is not None:
            # It stands in for hidden states behind a norm.
            init.normal_(module.memory)
