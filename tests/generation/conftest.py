"""A small vocabulary, and a model in float64, where no rounding can tip a draw."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.text import load_tokenizer

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcde,."
HANZI = "山水云风花雪月春夏秋冬天地人，。"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    tokens = [*SPECIALS, *HANZI, *LETTERS, *("##" + letter for letter in LETTERS)]
    path.write_text("\n".join(tokens), encoding="utf-8")
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def build_model() -> Callable[[int], ReformerLMForCausalLM]:
    def build(vocabulary: int) -> ReformerLMForCausalLM:
        torch.manual_seed(0)
        config = ReformerLMConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            bucket_size=8,
            num_hashes=2,
            lm_head_bias=True,
            initializer_range=0.1,
        )
        return ReformerLMForCausalLM(config).double().eval()

    return build


@pytest.fixture
def model(tokenizer, build_model):
    return build_model(len(tokenizer))


@pytest.fixture
def endless_model(model, tokenizer):
    """It does not end an article."""
    with torch.no_grad():
        model.get_output_embeddings().bias[tokenizer.eos_token_id] -= 50.0
    return model
