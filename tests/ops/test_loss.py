"""Chunked linear cross-entropy against torch's, outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from reformer_lm.ops import loss as loss_module
from reformer_lm.ops.loss import linear_cross_entropy


@pytest.mark.parametrize("tokens", [1, 7, 50])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk_elements", [1, 13 * 4, 1 << 23])
def test_equals_cross_entropy(
    tokens: int, with_bias: bool, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(13, dtype=torch.float64, requires_grad=True) if with_bias else None
    labels = torch.randint(0, 13, (tokens,))
    labels[::3] = -100
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    expected = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(hidden, weight, bias), labels, reduction="sum"
    )
    actual = linear_cross_entropy(hidden, weight, bias, labels)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(3 * actual, inputs), torch.autograd.grad(3 * expected, inputs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(9, 4)
    loss = linear_cross_entropy(hidden, weight, None, torch.randint(0, 9, (5,)))
    loss.backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, None, torch.randint(0, 9, (5,))).requires_grad


def test_no_counted_label_gives_zero() -> None:
    hidden = torch.randn(5, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(9, 4), None, torch.full((5,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_autocast_computes_the_product_in_bf16_and_the_softmax_in_float32() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(64, 32, requires_grad=True)
    weight = torch.randn(50, 32, requires_grad=True)
    labels = torch.randint(0, 50, (64,))
    exact = linear_cross_entropy(hidden, weight, None, labels)
    expected = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = linear_cross_entropy(hidden, weight, None, labels)
    assert rough.dtype == torch.float32
    assert rough.item() != exact.item()
    assert rough.item() == pytest.approx(exact.item(), rel=0.01)
    for one, other in zip(torch.autograd.grad(rough, (hidden, weight)), expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() / other.norm() < 0.03
