"""The linear layer for few rows, against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reformer_lm.layers.linear import Linear


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out_features", [6, 7])
@pytest.mark.parametrize("shape", [(1, 5), (1, 1, 5), (3, 1, 5), (2, 4, 5), (5,), (16, 5), (33, 5), (40, 5), (0, 5)])
def test_few_rows_are_what_torch_makes_of_them(shape: tuple[int, ...], out_features: int, bias: bool) -> None:
    layer = Linear(5, out_features, bias=bias).double()
    x = torch.randn(*shape, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        out = layer(x)
        # Also of a tensor whose rows do not lie one behind the other.
        strided = layer(x.unsqueeze(-1).expand(*shape, 2)[..., 0])
    assert out.is_contiguous() and out.shape == expected.shape
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(strided, expected.detach(), rtol=0, atol=1e-14)


def test_gradients_flow_as_ever() -> None:
    layer = Linear(5, 6)
    x = torch.randn(1, 5, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0], layer.weight.sum(dim=0))
    torch.testing.assert_close(layer.weight.grad, x.detach().expand(6, 5))


def test_autocast_and_half_precision_are_left_to_torch() -> None:
    layer = Linear(64, 64)
    x = torch.randn(1, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        assert layer(x).dtype == torch.bfloat16
    layer, x = layer.bfloat16(), x.bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
