"""How far a logit moves when only later tokens change: `python benchmarks/future_leak.py`.

Four rows of 64 random tokens, and the same with other tokens from position 40 on; measured is the largest change of a
logit before position 40. Writes benchmarks/results/future_leak.json, which the READMEs and docs/lsh_attention.md quote;
tests/parity/test_future_leak.py holds each model to its side of the line.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from machine import ROOT, describe_machine
from torch import Tensor

from reformer_lm import ReformerLMConfig, ReformerLMForCausalLM

RESULT = ROOT / "benchmarks" / "results" / "future_leak.json"
CHANGED_FROM = 40


def two_inputs() -> tuple[Tensor, Tensor]:
    """64 tokens, and the same with other tokens from position 40 on, each [4, 64]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 50, (4, 64), generator=generator)
    changed = x.clone()
    changed[:, CHANGED_FROM:] = torch.randint(1, 50, (4, 64 - CHANGED_FROM), generator=generator)
    return x, changed


def moved_before(first: Tensor, second: Tensor) -> float:
    """The largest change of a logit before the first changed token."""
    # Else the models would not have read the change.
    assert (first[:, CHANGED_FROM:] - second[:, CHANGED_FROM:]).abs().max() > 0.01
    return (first[:, :CHANGED_FROM] - second[:, :CHANGED_FROM]).abs().max().item()


@torch.no_grad()
def ours(**options: Any) -> float:
    """Ours, in float64."""
    defaults: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bucket_size": 8,
        "max_position_embeddings": 64,
        # Larger weights than a model starts with, so that what can move does.
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model = ReformerLMForCausalLM(ReformerLMConfig(**defaults | options)).double().eval()
    return moved_before(*(model(x).logits for x in two_inputs()))


@torch.no_grad()
def reformer_pytorch() -> float:
    """reformer-pytorch's ReformerLM in float64, the same rotations for both inputs."""
    from reformer_pytorch import ReformerLM

    torch.manual_seed(0)
    model = ReformerLM(
        num_tokens=50, dim=64, depth=2, max_seq_len=64, heads=4, dim_head=16, bucket_size=8, n_hashes=4, causal=True
    )
    model = model.double().eval()
    logits = []
    for x in two_inputs():
        torch.manual_seed(1)
        logits.append(model(x))
    torch.manual_seed(1)
    assert torch.equal(model(x), logits[-1])
    return moved_before(*logits)


@torch.no_grad()
def transformers() -> float:
    """Transformers' ReformerModelWithLMHead in float32, with hash_seed."""
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
    first, second = (model(x).logits for x in two_inputs())
    # Not by chance: hash_seed makes it repeat itself.
    assert torch.equal(model(two_inputs()[1]).logits, second)
    return moved_before(first, second)


def main() -> None:
    """Measures all four and writes the result file."""
    moved = {
        "reformer_pytorch": reformer_pytorch(),
        "transformers": transformers(),
        "ours_chunked": ours(lsh_mask="chunked", num_local_heads=0),
        "ours_causal": ours(),
    }
    results = {"machine": describe_machine(), "largest_change_of_an_earlier_logit": moved}
    RESULT.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(moved, indent=2))


if __name__ == "__main__":
    main()
