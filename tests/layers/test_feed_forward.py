"""The feed-forward block: pieces of the sequence give what the whole gives."""

from __future__ import annotations

import pytest
import torch

from reformer_lm import ReformerLMConfig
from reformer_lm.config import FEED_FORWARD_ACTIVATIONS
from reformer_lm.layers.feed_forward import FeedForward


def block(**options: object) -> FeedForward:
    torch.manual_seed(0)
    config = ReformerLMConfig(vocab_size=5, hidden_size=8, num_attention_heads=2, **options)
    return FeedForward(config).double()


@pytest.mark.parametrize("activation", FEED_FORWARD_ACTIVATIONS)
@pytest.mark.parametrize("chunk", [1, 3, 10, 11])
def test_chunks_equal_the_whole(activation: str, chunk: int) -> None:
    x = torch.randn(2, 10, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for size in (0, chunk):
        out = block(ff_activation=activation, ff_chunk_size=size)(x)
        results.append((out, *torch.autograd.grad(out.sin().sum(), x)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_gated_form() -> None:
    module = block(ff_activation="geglu", intermediate_size=6)
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    a, b = module.inner(x).split(6, dim=-1)
    torch.testing.assert_close(module(x), module.output(torch.nn.functional.gelu(a) * b))
