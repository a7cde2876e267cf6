"""Product-key memory against a search through all pairs of keys; tests/parity has the peer's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reformer_lm import ReformerLMConfig
from reformer_lm.layers import product_key_memory
from reformer_lm.layers.product_key_memory import HEADS, KEY_DIM, VALUES_READ, ProductKeyMemory


def make_memory(**options: object) -> ProductKeyMemory:
    torch.manual_seed(0)
    fields = {"hidden_size": 6, "num_attention_heads": 1, "local_rotary": False, "product_keys": 7}
    return ProductKeyMemory(ReformerLMConfig(**fields | options)).double()


def of_all_pairs(memory: ProductKeyMemory, x: Tensor) -> Tensor:
    """What a token [D] reads, by scoring all pairs."""
    out = torch.zeros_like(x)
    queries = memory.query_norm((memory.queries.weight @ x).view(2, HEADS, KEY_DIM))
    for head in range(HEADS):
        first, second = (memory.keys[head, :, half] @ queries[half, head] for half in (0, 1))
        scores = (first[:, None] + second[None, :]).flatten()
        best = scores.argsort(descending=True)[: min(product_key_memory.VALUES_READ, memory.num_keys)]
        out = out + torch.softmax(scores[best], dim=0) @ memory.values.weight[best]
    return out


@pytest.mark.parametrize("num_keys", [1, 7, 40])
def test_outputs_and_gradients(num_keys: int) -> None:
    memory = make_memory(product_keys=num_keys, ff_chunk_size=2)
    assert VALUES_READ == 32
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    actual = memory(x)
    expected = torch.stack([torch.stack([of_all_pairs(memory, token) for token in row]) for row in x])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    inputs = [x, *memory.parameters()]
    found, wanted = (torch.autograd.grad(out, inputs, weights, retain_graph=True) for out in (actual, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_layers_that_have_one_are_named() -> None:
    for fields in ({"product_key_layers": [6]}, {"product_key_layers": [0], "share_layer_weights": True}):
        with pytest.raises(ValueError, match="product_key_layers=.* is not possible"):
            ReformerLMConfig(**fields)
