"""Local and full attention against explicit T x T matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reformer_lm.ops.keys import SELF_ATTENTION_BIAS, normalize_keys, shift_values
from reformer_lm.ops.local import local_attention
from reformer_lm.ops.shared_qk import shared_qk_attention

TIGHT = {"rtol": 0.0, "atol": 1e-10}


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, self_bias: float = 0.0) -> Tensor:
    tokens = q.shape[-2]
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + self_bias * torch.eye(tokens, dtype=q.dtype)
    return torch.softmax(logits.masked_fill(~allowed, -math.inf), dim=-1) @ v


def random_qkv(tokens: int, batch: int = 2, heads: int = 3, dim: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shape = (batch, heads, tokens, dim)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]


def assert_same_gradients(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    weights = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected, **TIGHT)
    # A single token reads its own value, whatever its query: that gradient is then missing, which means 0.
    found, wanted = (
        torch.autograd.grad(out, inputs, weights, allow_unused=True, materialize_grads=True)
        for out in (actual, expected)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16, 33])
@pytest.mark.parametrize("exact_window", [True, False])
@pytest.mark.parametrize("self_bias", [0.0, SELF_ATTENTION_BIAS])
def test_local_attention(tokens: int, exact_window: bool, self_bias: float) -> None:
    inputs = random_qkv(tokens)
    window = 8
    i = torch.arange(tokens).unsqueeze(1)
    j = torch.arange(tokens)
    if exact_window:
        allowed = (j <= i) & (j > i - window)
    else:
        block = min(window, tokens)
        allowed = (j <= i) & (j // block >= i // block - 1)
    actual = local_attention(*inputs, window=window, exact_window=exact_window, self_bias=self_bias)
    assert_same_gradients(actual, dense(*inputs, allowed, self_bias), inputs)


@pytest.mark.parametrize("tokens", [5, 8, 20])
def test_local_attention_skips_masked_keys(tokens: int) -> None:
    inputs = random_qkv(tokens)
    mask = torch.rand(2, tokens, generator=torch.Generator().manual_seed(0)) < 0.6
    i = torch.arange(tokens).unsqueeze(1)
    j = torch.arange(tokens)
    allowed = (j <= i) & (j > i - 4) & (mask[:, None, None, :] | (i == j))
    actual = local_attention(*inputs, window=4, mask_BT=mask)
    assert_same_gradients(actual, dense(*inputs, allowed), inputs)


@pytest.mark.parametrize("tokens", [1, 2, 3, 30])
@pytest.mark.parametrize("key_norm", ["rms", "unit"])
@pytest.mark.parametrize("masked", [False, True])
def test_full_shared_attention(tokens: int, key_norm: str, masked: bool) -> None:
    qk, _, v = random_qkv(tokens)
    i = torch.arange(tokens).unsqueeze(1)
    j = torch.arange(tokens)
    allowed = (j <= i).expand(2, 1, tokens, tokens)
    mask = None
    if masked:
        mask = torch.rand(2, tokens, generator=torch.Generator().manual_seed(1)) < 0.6
        allowed = allowed & (mask[:, None, None, :] | (i == j))
    expected = dense(qk, normalize_keys(qk, key_norm), v, allowed, SELF_ATTENTION_BIAS)
    actual = shared_qk_attention(qk, v, key_norm=key_norm, mask_BT=mask)
    assert_same_gradients(actual, expected, [qk, v])


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_full_shared_attention_with_shifted_heads(tokens: int) -> None:
    qk, _, v = random_qkv(tokens)
    strictly_earlier = torch.ones(tokens, tokens, dtype=torch.bool).tril(-1)
    logits = (qk @ normalize_keys(qk, "rms").transpose(-1, -2)) / 2.0
    weights = torch.softmax(logits.masked_fill(~strictly_earlier, -math.inf), dim=-1)
    followed = torch.cat((v[:, 1:, 1:], torch.zeros_like(v[:, 1:, :1])), dim=2)
    expected = torch.cat((torch.zeros_like(v[:, 1:, :1]), (weights[:, 1:] @ followed)[:, :, 1:]), dim=2)
    actual = shared_qk_attention(qk, v, num_shifted_heads=2)
    torch.testing.assert_close(actual[:, 1:], expected, **TIGHT)
    torch.testing.assert_close(actual[:, :1], shared_qk_attention(qk, v)[:, :1], **TIGHT)


def test_lsh_attention_with_one_bucket_is_full_attention() -> None:
    from reformer_lm.ops.lsh import lsh_attention

    qk, _, v = random_qkv(40)
    buckets = torch.zeros(2, 3, 2, 40, dtype=torch.int16)
    for shifted in (0, 2):
        full = shared_qk_attention(qk, v, num_shifted_heads=shifted)
        lsh = lsh_attention(qk, v, buckets, window=40, num_shifted_heads=shifted)
        torch.testing.assert_close(lsh, full, rtol=0.0, atol=1e-9)


def test_keys_have_their_length_and_zero_stays_zero() -> None:
    x = torch.randn(5, 16, dtype=torch.float64)
    x[2] = 0
    for key_norm, length in (("rms", 4.0), ("unit", 1.0)):
        norms = normalize_keys(x, key_norm).norm(dim=-1)
        expected = torch.full((5,), length, dtype=torch.float64)
        expected[2] = 0
        torch.testing.assert_close(norms, expected, **TIGHT)
    half = normalize_keys(torch.full((1, 64), 200.0, dtype=torch.float16), "rms")
    torch.testing.assert_close(half, torch.ones_like(half))
    with pytest.raises(ValueError, match="key_norm"):
        normalize_keys(x, "l1")


def test_value_shift_moves_the_last_heads_only() -> None:
    v = torch.arange(24.0).view(1, 2, 4, 3)
    shifted = shift_values(v, 1)
    assert torch.equal(shifted[:, 0], v[:, 0])
    assert torch.equal(shifted[:, 1, :3], v[:, 1, 1:])
    assert torch.equal(shifted[:, 1, 3], torch.zeros(1, 3))
