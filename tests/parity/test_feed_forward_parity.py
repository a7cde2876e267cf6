"""The feed-forward block against reformer-pytorch's, in one piece and in several."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from reformer_lm import ReformerLMConfig
from reformer_lm.layers.feed_forward import FeedForward

TIGHT = {"rtol": 1e-12, "atol": 1e-12}

# Their activation and gate -> ours.
ACTIVATIONS = {
    "gelu": (None, False),
    "gelu_tanh": ("GELU_", False),
    "relu": ("ReLU", False),
    "silu": ("SiLU", False),
    "geglu": (None, True),
    "reglu": ("ReLU", True),
    "swiglu": ("SiLU", True),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "chunk_size", "chunks"), [(1, 0, 1), (9, 0, 1), (9, 4, 3), (9, 1, 9), (9, 50, 2)])
@pytest.mark.parametrize("multiple", [1, 3])
def test_feed_forward(
    peer: ModuleType,
    copy: Any,
    assert_same_module: Any,
    activation: str,
    tokens: int,
    chunk_size: int,
    chunks: int,
    multiple: int,
) -> None:
    name, gated = ACTIVATIONS[activation]
    kind = None if name is None else getattr(peer, name, None) or getattr(torch.nn, name)
    torch.manual_seed(0)
    theirs = peer.FeedForward(7, mult=multiple, activation=kind, glu=gated).double()
    config = ReformerLMConfig(
        vocab_size=2,
        hidden_size=7,
        num_attention_heads=1,
        intermediate_size=7 * multiple,
        ff_activation=activation,
        ff_chunk_size=chunk_size,
        local_rotary=False,
    )
    ours = FeedForward(config).double()
    copy(theirs, ours)
    x = (2.0 * torch.randn(2, tokens, 7, dtype=torch.float64)).requires_grad_()
    expected = peer.Chunk(chunks, theirs, along_dim=-2)(x)
    assert_same_module((theirs, ours), (expected, ours(x)), TIGHT, x)
