"""Position embeddings against the package's own forward, and rotary properties."""

from __future__ import annotations

import pytest
import torch

from reformer_lm import ReformerLMConfig
from reformer_lm.layers.positions import PositionEmbedding, apply_rotary, rotary_angles, rotary_factors


def embedding(**options: object) -> PositionEmbedding:
    return PositionEmbedding(
        ReformerLMConfig(vocab_size=5, hidden_size=8, num_attention_heads=2, max_position_embeddings=30, **options)
    )


@pytest.mark.parametrize("axial_dims", [None, [3, 5]])
@pytest.mark.parametrize("tokens", [1, 7, 30])
def test_axial_equals_the_package(axial_dims: list[int] | None, tokens: int) -> None:
    position = embedding(axial_shape=[5, 6], axial_dims=axial_dims)
    expected = position.axial(torch.zeros(1, tokens, 8))
    assert torch.equal(position(torch.arange(tokens).unsqueeze(0), torch.float32), expected)


def test_axial_takes_positions_in_any_order() -> None:
    position = embedding(axial_shape=[5, 6])
    whole = position(torch.arange(30).unsqueeze(0), torch.float32)
    index = torch.tensor([[29, 0, 17], [3, 3, 4]])
    assert torch.equal(position(index, torch.float32), whole[0, index])


def test_sinusoidal_is_sin_and_cos_of_the_same_angles() -> None:
    out = embedding(position_type="sinusoidal")(torch.arange(4).unsqueeze(0), torch.float64)[0]
    for t in range(4):
        for i in range(4):
            angle = torch.tensor(t / 10000 ** (2 * i / 8), dtype=torch.float64)
            torch.testing.assert_close(out[t, i], angle.sin())
            torch.testing.assert_close(out[t, 4 + i], angle.cos())


def test_rotary_adds_nothing_and_absolute_looks_up() -> None:
    assert embedding(position_type="rotary")(torch.arange(4).unsqueeze(0), torch.float32) is None
    position = embedding(position_type="absolute")
    assert torch.equal(position(torch.tensor([[7]]), torch.float32)[0, 0], position.absolute.weight[7])


def test_rotary_products_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def product(i: int, j: int) -> torch.Tensor:
        rotated = [apply_rotary(x, rotary_factors(torch.tensor([[p]]), 16, torch.float64)) for x, p in ((q, i), (k, j))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(product(9, 4), product(1_000_005, 1_000_000), rtol=0, atol=1e-8)
    assert abs(product(9, 4) - product(9, 5)) > 1e-3
    torch.testing.assert_close(product(3, 3), (q * k).sum())


def test_rotary_angles_of_a_millionth_position_are_exact_in_float32() -> None:
    position = torch.tensor([[1_048_575]])
    for single, double in zip(
        rotary_angles(position, 64, torch.float32), rotary_angles(position, 64, torch.float64), strict=True
    ):
        torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-7)
