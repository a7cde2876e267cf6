"""A small saved model, and predict.py called in this process."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM
from reformer_lm.prediction import main
from reformer_lm.text import load_tokenizer

# The longest text that the model reads, in tokens.
MAXIMUM = 64


@pytest.fixture(scope="session")
def saved_model_dir(tmp_path_factory):
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    config = ReformerLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAXIMUM,
        bucket_size=8,
        num_hashes=2,
        initializer_range=0.5,
    )
    directory = tmp_path_factory.mktemp("run") / "model"
    ReformerLMForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def predict(saved_model_dir, capfd, monkeypatch):
    """Run predict.py in this process: its exit status and what it wrote."""

    def run(*arguments: str, stdin: bytes = b"", model_dir: Path = saved_model_dir) -> SimpleNamespace:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        status = main([*arguments, "--model_dir", str(model_dir), "--device", "cpu"])
        out, err = capfd.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run
