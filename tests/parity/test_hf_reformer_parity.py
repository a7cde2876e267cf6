"""A whole ReformerModelWithLMHead of transformers, converted: logits and gradients, reversible against reversible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ReformerConfig, ReformerModelWithLMHead

from reformer_lm import ReformerLMForCausalLM
from reformer_lm.convert import from_transformers
from reformer_lm.convert.hf_reformer import our_name
from reformer_lm.convert.verification import RecordedRotations, compare_with_transformers, given_rotations

# Their float32 constants for forbidden logits are exact in float64 too; both backward passes rebuild their inputs.
TIGHT = {"rtol": 1e-9, "atol": 1e-9}

# Google's two models, scaled down: kinds of layers, proportions and buckets are theirs.
ENWIK8: dict[str, Any] = {
    "attn_layers": ["local", "local", "lsh", "local"] * 2, "hidden_size": 16, "num_attention_heads": 2,
    "attention_head_size": 6, "feed_forward_size": 24, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (4, 12),
    "max_position_embeddings": 64, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 8, "num_buckets": 16,
    "num_hashes": 3, "vocab_size": 19,
}  # fmt: skip
CRIME: dict[str, Any] = {
    "attn_layers": ["local", "lsh", "local", "lsh", "local", "lsh"], "hidden_size": 12, "num_attention_heads": 2,
    "attention_head_size": 6, "feed_forward_size": 16, "axial_pos_shape": (4, 16), "axial_pos_embds_dim": (4, 8),
    "max_position_embeddings": 64, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": [2, 4],
    "num_hashes": 1, "vocab_size": 23,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "enwik8": ENWIK8,
    "crime and punishment": CRIME,
    "LSH alone": ENWIK8 | {"attn_layers": ["lsh", "lsh"], "num_buckets": [4, 2, 6]},
    "local alone": ENWIK8 | {"attn_layers": ["local", "local"]},
    "absolute positions": CRIME | {"axial_pos_embds": False, "hidden_act": "gelu_new"},
    "pieces": CRIME | {"chunk_size_feed_forward": 16, "layer_norm_eps": 1e-5, "hidden_act": "swish"},
}
NO_DROPOUT = {
    "is_decoder": True, "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0,
    "lsh_attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def random_tokens(vocabulary: int, batch: int, tokens: int) -> Tensor:
    return torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def make_peer(options: dict[str, Any], steps: int = 0) -> ReformerModelWithLMHead:
    torch.manual_seed(0)
    peer = ReformerModelWithLMHead(ReformerConfig(**NO_DROPOUT | options)).double().train()
    # In transformers 5 the bias is a parameter that nothing reads.
    peer.lm_head.decoder.bias = peer.lm_head.bias
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    optimizer = torch.optim.Adam(peer.parameters(), lr=1e-2)
    for step in range(steps):
        x = random_tokens(options["vocab_size"], 2, 64).roll(step, 1)
        optimizer.zero_grad()
        peer(x, labels=x, use_cache=False).loss.backward()
        optimizer.step()
    return peer


def by_factor(peer: ReformerModelWithLMHead, drawn: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """Their rotations of all factors in one tensor, as ours: the factor that weighs most first."""
    given = peer.config.num_buckets
    halves = [n // 2 for n in (given if isinstance(given, list) else [given])]
    return [tuple(reversed(rotation.split(halves, dim=-1))) for rotation in drawn]


def run(peer: ReformerModelWithLMHead, ours: ReformerLMForCausalLM, x: Tensor) -> tuple[Tensor, Tensor]:
    with RecordedRotations() as recorded:
        expected = peer(x, use_cache=False).logits
    with given_rotations(ours, by_factor(peer, recorded.drawn)):
        # The backward pass takes the buckets that were kept.
        return expected, ours(x).logits


@pytest.mark.parametrize("reversible", ["full", "keep_attention", "off"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients(options: dict[str, Any], reversible: str) -> None:
    peer = make_peer(options, steps=2)
    ours = from_transformers(peer).train()
    assert ours.dtype == torch.float64
    ours.reformer.stack.reversible = reversible
    x = random_tokens(options["vocab_size"], 2, 64)
    expected, actual = run(peer, ours, x)
    torch.testing.assert_close(actual, expected, **TIGHT)
    weights = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    peer.zero_grad()
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    mine = dict(ours.named_parameters())
    compared = set()
    for name, parameter in peer.named_parameters():
        counterpart = mine[our_name("lm_head.bias" if name == "lm_head.decoder.bias" else name)]
        assert parameter.grad is not None and counterpart.grad is not None, name
        gradient = counterpart.grad.view_as(parameter)
        torch.testing.assert_close(gradient, parameter.grad, **TIGHT, msg=lambda text, name=name: f"{name}: {text}")
        compared.add(id(counterpart))
    assert compared == {id(parameter) for parameter in mine.values()}


@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 8, 16, 40, 62, 64])
@pytest.mark.parametrize("options", [ENWIK8, CRIME], ids=["enwik8", "crime and punishment"])
def test_lengths_in_evaluation(options: dict[str, Any], tokens: int) -> None:
    # Their padding up to a multiple of both chunk lengths, here 8, is what ours needs for the LSH chunks.
    peer = make_peer(options).eval()
    expected, actual = run(peer, from_transformers(peer), random_tokens(options["vocab_size"], 2, tokens))
    torch.testing.assert_close(actual, expected, **TIGHT)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_comparison_of_the_command_line_agrees(options: dict[str, Any]) -> None:
    peer = make_peer(options).eval()
    agreement = compare_with_transformers(from_transformers(peer), peer)
    assert agreement.largest_difference < 1e-9 < agreement.largest_logit
    assert max(agreement.tokens) == 64


def test_the_comparison_finds_a_wrong_weight() -> None:
    peer = make_peer(CRIME).eval()
    ours = from_transformers(peer)
    with torch.no_grad():
        ours.reformer.stack.layers[1].attention.query_key.weight[0, 0] += 0.5
    assert compare_with_transformers(ours, peer).largest_difference > 1e-6
