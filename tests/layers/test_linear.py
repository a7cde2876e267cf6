"""The linear layer's own products, against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reformer_lm.layers import linear
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(5, 7), (64, 64), (256, 33), (300, 1)])
@pytest.mark.parametrize("shape", [(33,), (3, 40), (2, 3, 17), (1, 1000)])
def test_many_rows_are_what_torch_makes_of_them(shape: tuple[int, ...], sizes: tuple[int, int], bias: bool) -> None:
    layer = Linear(*sizes, bias=bias)
    layer.few_shapes = True
    x = torch.randn(*shape, sizes[0])
    wide = [None if t is None else t.double() for t in (x, layer.weight, layer.bias)]
    expected = nn.functional.linear(*wide).float()
    with torch.no_grad():
        out = layer(x)
        strided = layer(torch.randn(*shape, sizes[0], 2).copy_(x.unsqueeze(-1))[..., 0])
        expanded = layer(x[:1].expand(40, *x.shape[1:]))
    assert out.is_contiguous() and out.shape == expected.shape
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=3e-6)
    torch.testing.assert_close(strided, expected.detach(), rtol=0, atol=3e-6)
    torch.testing.assert_close(expanded[7], expected[0].detach(), rtol=0, atol=3e-6)


@pytest.mark.skipif(not linear._HAS_ONEDNN, reason="this build of torch has no oneDNN")
def test_a_row_does_not_depend_on_the_number_of_rows() -> None:
    layer = Linear(96, 130)
    layer.few_shapes = True
    x = torch.randn(1000, 96)
    with torch.no_grad():
        whole = layer(x)
        for rows in (33, 34, 47, 64, 100, 999):
            assert torch.equal(layer(x[1 : 1 + rows]), whole[1 : 1 + rows]), rows


def test_products_are_torchs_with_and_without_gradients_unless_few_shapes_are_promised() -> None:
    # A reversible layer's forward pass is without, and its backward pass takes away what that added.
    layer = Linear(96, 130)
    x = torch.randn(200, 96)
    with torch.no_grad():
        without = layer(x)
    assert torch.equal(without, layer(x))


def test_gradients_flow_as_ever() -> None:
    layer = Linear(5, 6)
    x = torch.randn(1, 5, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0], layer.weight.sum(dim=0))
    torch.testing.assert_close(layer.weight.grad, x.detach().expand(6, 5))


def test_autocast_and_half_precision_are_left_to_torch() -> None:
    for rows in (1, 40):
        layer = Linear(64, 64)
        layer.few_shapes = True
        x = torch.randn(rows, 64)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
            assert layer(x).dtype == torch.bfloat16
        layer, x = layer.bfloat16(), x.bfloat16()
        with torch.no_grad():
            assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
