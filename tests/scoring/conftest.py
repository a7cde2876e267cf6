"""A small vocabulary, and a small model in float32 and float64."""

from __future__ import annotations

import pytest
import torch
from language_models import HANZI, SPECIALS

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.text import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join([*SPECIALS, *HANZI]), encoding="utf-8")
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def model(tokenizer):
    torch.manual_seed(0)
    config = ReformerLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bucket_size=8,
        num_hashes=2,
        # Larger than usual weights: with the default ones all probabilities are nearly the same.
        initializer_range=0.3,
    )
    return ReformerLMForCausalLM(config).eval()


@pytest.fixture(scope="session")
def exact_model(model):
    twin = ReformerLMForCausalLM(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.double().eval()
