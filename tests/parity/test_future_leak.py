"""What sets this package apart: in the peers, logits of causal LSH attention depend on later tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM

CHANGED_FROM = 40


def two_inputs() -> tuple[Tensor, Tensor]:
    """64 tokens, and the same with other tokens from position 40 on."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 50, (4, 64), generator=generator)
    changed = x.clone()
    changed[:, CHANGED_FROM:] = torch.randint(1, 50, (4, 64 - CHANGED_FROM), generator=generator)
    return x, changed


def moved_before(first: Tensor, second: Tensor) -> float:
    """The largest change of a logit before the first changed token."""
    assert (first[:, CHANGED_FROM:] - second[:, CHANGED_FROM:]).abs().max() > 0.01
    return (first[:, :CHANGED_FROM] - second[:, :CHANGED_FROM]).abs().max().item()


OPTIONS: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bucket_size": 8,
    "max_position_embeddings": 64,
    # Larger weights than a model starts with, so that what can move does.
    "initializer_range": 0.2,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_local_heads": 0, "num_shifted_heads": 0},
        {"num_local_heads": 0, "position_type": "rotary", "full_attention_threshold": 16},
        {"num_local_heads": 4},
    ],
    ids=str,
)
def test_ours_do_not_move(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ReformerLMForCausalLM(ReformerLMConfig(**OPTIONS | options)).double().eval()
    with torch.no_grad():
        first, second = (model(x).logits for x in two_inputs())
    assert moved_before(first, second) < 1e-12


def test_ours_move_in_chunked_mode() -> None:
    torch.manual_seed(0)
    config = ReformerLMConfig(**OPTIONS, lsh_mask="chunked", num_local_heads=0)
    model = ReformerLMForCausalLM(config).double().eval()
    with torch.no_grad():
        first, second = (model(x).logits for x in two_inputs())
    assert moved_before(first, second) > 1e-3


def test_those_of_reformer_pytorch_move() -> None:
    package = pytest.importorskip("reformer_pytorch", reason="reformer-pytorch is not installed")
    torch.manual_seed(0)
    model = package.ReformerLM(
        num_tokens=50, dim=64, depth=2, max_seq_len=64, heads=4, dim_head=16, bucket_size=8, n_hashes=4, causal=True
    )
    model = model.double().eval()
    logits = []
    with torch.no_grad():
        for x in two_inputs():
            # The same rotations for both.
            torch.manual_seed(1)
            logits.append(model(x))
        torch.manual_seed(1)
        assert torch.equal(model(x), logits[-1])
    assert moved_before(*logits) > 1e-3


def test_those_of_transformers_move() -> None:
    from transformers import ReformerConfig, ReformerModelWithLMHead

    config = ReformerConfig(
        vocab_size=50, hidden_size=64, attention_head_size=16, num_attention_heads=4, feed_forward_size=128,
        attn_layers=["lsh", "lsh"], lsh_attn_chunk_length=8, num_buckets=8, num_hashes=4, is_decoder=True,
        axial_pos_shape=[8, 8], axial_pos_embds_dim=[32, 32], max_position_embeddings=64, hash_seed=0,
        pad_token_id=0, eos_token_id=1, use_cache=False, initializer_range=0.2, axial_norm_std=0.2,
        hidden_dropout_prob=0.0, lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ReformerModelWithLMHead(config).eval()
    with torch.no_grad():
        first, second = (model(x).logits for x in two_inputs())
        # Not by chance: hash_seed makes them repeat themselves.
        assert torch.equal(model(two_inputs()[1]).logits, second)
    assert moved_before(first, second) > 1e-3
