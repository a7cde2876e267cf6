"""Local and full attention against explicit T x T matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reformer_lm.ops import shared_qk
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


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16, 33])
@pytest.mark.parametrize("exact_window", [True, False])
@pytest.mark.parametrize("self_bias", [0.0, SELF_ATTENTION_BIAS])
@pytest.mark.parametrize("masked", [False, True])
def test_local_attention_to_both_sides(tokens: int, exact_window: bool, self_bias: float, masked: bool) -> None:
    inputs = random_qkv(tokens)
    window = 8
    i = torch.arange(tokens).unsqueeze(1)
    j = torch.arange(tokens)
    block = min(window, tokens)
    allowed = (i - j).abs() < window if exact_window else (i // block - j // block).abs() <= 1
    masks: dict[str, Tensor] = {}
    if masked:
        generator = torch.Generator().manual_seed(tokens)
        masks["mask_BT"] = torch.rand(2, tokens, generator=generator) < 0.6
        masks["documents_BT"] = torch.randint(0, 3, (2, tokens), generator=generator).sort(dim=1).values
        same = masks["documents_BT"].unsqueeze(2) == masks["documents_BT"].unsqueeze(1)
        allowed = (allowed & masks["mask_BT"].unsqueeze(1) & same | (i == j)).unsqueeze(1)
    actual = local_attention(
        *inputs, window=window, exact_window=exact_window, causal=False, self_bias=self_bias, **masks
    )
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


def dense_full(
    qk: Tensor,
    v: Tensor,
    key_norm: str = "rms",
    num_shifted_heads: int = 0,
    causal: bool = True,
    extra: tuple[Tensor, Tensor] | None = None,
    extra_mask_BE: Tensor | None = None,
    **masks: Tensor,
) -> Tensor:
    """Full attention of each token over the keys [extra vectors, tokens], written out."""
    batch, heads, tokens, dim = qk.shape
    extra_qk, extra_v = (qk[:, :, :0], v[:, :, :0]) if extra is None else extra
    extras = extra_qk.shape[2]
    keys = torch.cat((extra_qk.expand(batch, -1, -1, -1), qk), dim=2)
    logits = qk @ normalize_keys(keys, key_norm).transpose(-1, -2) / math.sqrt(dim)
    own = v.clone()
    own[:, heads - num_shifted_heads :] = 0.0
    followed = torch.cat((v[:, :, 1:], torch.zeros_like(v[:, :, :1])), dim=2)
    heads_that_shift = (torch.arange(heads) >= heads - num_shifted_heads).view(-1, 1, 1)
    values = torch.cat((extra_v.expand(batch, -1, -1, -1), torch.where(heads_that_shift, followed, v)), dim=2)
    real, attention, documents = (masks.get(name) for name in ("mask_BT", "attention_mask_BTT", "documents_BT"))
    rows, columns = torch.arange(tokens).unsqueeze(1), torch.arange(tokens)
    sees = (columns <= rows if causal else torch.ones(tokens, tokens, dtype=torch.bool)).repeat(batch, 1, 1)
    sees_extra = torch.ones(batch, tokens, extras, dtype=torch.bool)
    if attention is not None:
        sees &= attention
    if documents is not None:
        sees &= documents.unsqueeze(2) == documents.unsqueeze(1)
    if real is not None:
        sees &= real.unsqueeze(2) & real.unsqueeze(1)
        sees_extra &= real.unsqueeze(2)
    if extra_mask_BE is not None:
        sees_extra &= extra_mask_BE.unsqueeze(1)
    others = sees & (rows != columns)
    # The value behind a match must be one that may be read, or the query's own.
    followed_by_readable = others.clone()
    followed_by_readable[:, :, :-1] &= (sees | (rows == columns))[:, :, 1:]
    visible = torch.stack([followed_by_readable if shifts else others for shifts in heads_that_shift], dim=1)
    visible = torch.cat((sees_extra.unsqueeze(1).expand(-1, heads, -1, -1), visible), dim=3)
    alone = ~visible.any(dim=-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(~visible & ~alone, -math.inf), dim=-1)
    return torch.where(alone, own, weights @ values)


def assert_dense_full(inputs: list[Tensor], **options: Any) -> None:
    # The added nothing makes gradients 0 that would be missing, as of extra vectors that all are padding.
    nothing = 0.0 * sum(x.sum() for x in inputs)
    qk, v, *extra = inputs
    if extra:
        options["extra"] = tuple(extra)
    assert_same_gradients(shared_qk_attention(qk, v, **options) + nothing, dense_full(qk, v, **options), inputs)


def random_bools(*shape: int, seed: int, share: float = 0.7) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def random_full_inputs(
    batch: int, heads: int, tokens: int, dim: int, extras: int, extra_rows: int, seed: int
) -> list[Tensor]:
    """Shared vectors and values of the tokens, and of the extra vectors where there are any."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, tokens, dim), (batch, heads, tokens, dim + 1)]
    if extras:
        shapes += [(extra_rows, heads, extras, dim), (extra_rows, heads, extras, dim + 1)]
    return [(2.0 * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_() for shape in shapes]


@settings(max_examples=80)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.one_of(st.integers(1, 20), st.integers(21, 120)),
    dim=st.sampled_from([1, 4, 7]),
    key_norm=st.sampled_from(["rms", "unit"]),
    causal=st.booleans(),
    shifted=st.integers(0, 3),
    extras=st.integers(0, 25),
    masks=st.sets(
        st.sampled_from(["padding", "attention", "attention for all rows", "documents", "in pieces", "extra"])
    ),
    extra_for_all_rows=st.booleans(),
    query_rows=st.sampled_from([1, 7, 32, 512]),
    seed=st.integers(0, 2**31),
)
def test_full_shared_attention(
    batch: int,
    heads: int,
    tokens: int,
    dim: int,
    key_norm: str,
    causal: bool,
    shifted: int,
    extras: int,
    masks: set[str],
    extra_for_all_rows: bool,
    query_rows: int,
    seed: int,
) -> None:
    if tokens > 20:
        batch, query_rows = 1, max(query_rows, 7)
    options: dict[str, Any] = {
        "key_norm": key_norm,
        "causal": causal,
        "num_shifted_heads": min(shifted, heads) if causal else 0,
    }
    if "padding" in masks:
        options["mask_BT"] = random_bools(batch, tokens, seed=seed)
    if "attention" in masks:
        options["attention_mask_BTT"] = random_bools(batch, tokens, tokens, seed=seed + 1)
    elif "attention for all rows" in masks:
        options["attention_mask_BTT"] = random_bools(1, tokens, tokens, seed=seed + 1)
    if "documents" in masks:
        options["documents_BT"] = random_bools(batch, tokens, seed=seed + 2, share=0.2).cumsum(dim=1)
        if "in pieces" in masks:
            options["documents_BT"] %= 3
    if "extra" in masks and extras:
        options["extra_mask_BE"] = random_bools(batch, extras, seed=seed + 3)
    inputs = random_full_inputs(batch, heads, tokens, dim, extras, 1 if extra_for_all_rows else batch, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_qk, "_QUERY_ROWS", query_rows)
        assert_dense_full(inputs, **options)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("attention_rows", [0, 1, 2])
@pytest.mark.parametrize("documents", ["none", "together", "in pieces"])
@pytest.mark.parametrize("extra_rows", [0, 1, 2])
def test_full_shared_attention_with_every_combination_of_masks(
    padding: bool, attention_rows: int, documents: str, extra_rows: int
) -> None:
    options: dict[str, Any] = {"num_shifted_heads": 1}
    if padding:
        options["mask_BT"] = random_bools(2, 15, seed=0)
    if attention_rows:
        options["attention_mask_BTT"] = random_bools(attention_rows, 15, 15, seed=1)
    if documents != "none":
        names = random_bools(2, 15, seed=2, share=0.2).cumsum(dim=1)
        options["documents_BT"] = names if documents == "together" else names % 3
    if extra_rows:
        options["extra_mask_BE"] = random_bools(2, 3, seed=3)
    assert_dense_full(random_full_inputs(2, 2, 15, 3, 3 if extra_rows else 0, extra_rows, seed=4), **options)


@pytest.mark.parametrize("extras", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("shifted", [0, 2])
def test_full_shared_attention_of_few_tokens(tokens: int, extras: int, shifted: int) -> None:
    for masks in ({}, {"documents_BT": torch.arange(tokens).expand(2, -1)}):
        assert_dense_full(random_full_inputs(2, 2, tokens, 4, extras, 1, seed=0), num_shifted_heads=shifted, **masks)


def recorded_masks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    shapes = []

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        mask = kwargs.get("attn_mask")
        shapes.append(() if mask is None else tuple(mask.shape))
        return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(shared_qk, "scaled_dot_product_attention", attend)
    return shapes


def test_causal_attention_makes_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = recorded_masks(monkeypatch)
    for extras in (0, 1, 6):
        qk, v, *extra = random_full_inputs(2, 2, 30, 4, extras, 1, seed=0)
        documents = torch.arange(30).expand(2, -1) // 8
        for options in ({}, {"documents_BT": documents}):
            shared_qk_attention(qk, v, extra=tuple(extra) or None, **options)
    # Documents of 8 and 6 tokens: one call for each length.
    assert shapes == [()] * 3 * (1 + 2)


def test_masks_are_made_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = recorded_masks(monkeypatch)
    monkeypatch.setattr(shared_qk, "_QUERY_ROWS", 16)
    qk, v = random_full_inputs(2, 2, 40, 4, 0, 1, seed=0)
    shared_qk_attention(qk, v, mask_BT=random_bools(2, 40, seed=0))
    assert shapes == [(2, 1, 16, 16), (2, 1, 16, 32), (2, 1, 8, 40)]
    shapes.clear()
    shared_qk_attention(qk, v, causal=False)
    assert shapes == [(1, 1, 16, 40), (1, 1, 16, 40), (1, 1, 8, 40)]


@pytest.mark.parametrize("query_rows", [4, 512])
@pytest.mark.parametrize("masked", [False, True])
def test_full_attention_gradcheck_with_dropout(query_rows: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_qk, "_QUERY_ROWS", query_rows)
    inputs = random_full_inputs(1, 2, 6, 2, 2, 1, seed=1)
    mask = random_bools(1, 6, seed=2) if masked else None

    def attend(*given: Tensor) -> Tensor:
        torch.manual_seed(3)
        return shared_qk_attention(*given[:2], extra=given[2:], num_shifted_heads=1, dropout_p=0.3, mask_BT=mask)

    assert torch.autograd.gradcheck(attend, inputs, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_full_attention_reads_no_uninitialised_memory(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.empty filled with NaN: whatever is not written before it is read shows.
    empty_like, empty = torch.empty_like, torch.empty

    def poisoned_like(*args: object, **kwargs: object) -> Tensor:
        made = empty_like(*args, **kwargs)
        if made.is_floating_point():
            made.detach().fill_(torch.nan)
        return made

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made = empty(*args, **kwargs)
        if made.is_floating_point():
            made.detach().fill_(torch.nan)
        return made

    monkeypatch.setattr(shared_qk, "_QUERY_ROWS", 8)
    inputs = random_full_inputs(2, 2, 21, 4, 3, 1, seed=2)
    options: dict[str, Any] = {"num_shifted_heads": 1, "documents_BT": torch.arange(21).expand(2, -1) // 9}
    if masked:
        options["mask_BT"] = random_bools(2, 21, seed=4)

    def outputs_and_gradients() -> tuple[Tensor, ...]:
        out = shared_qk_attention(*inputs[:2], extra=tuple(inputs[2:]), **options)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    expected = outputs_and_gradients()
    monkeypatch.setattr(torch, "empty_like", poisoned_like)
    monkeypatch.setattr(torch, "empty", poisoned)
    for one, other in zip(outputs_and_gradients(), expected, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_full_attention_in_lower_precision(dtype: torch.dtype, masked: bool) -> None:
    inputs = random_full_inputs(1, 2, 150, 16, 4, 1, seed=3)
    mask = random_bools(1, 150, seed=5) if masked else None
    expected = shared_qk_attention(*inputs[:2], extra=tuple(inputs[2:]), mask_BT=mask)
    low = [x.detach().to(dtype) for x in inputs]
    actual = shared_qk_attention(*low[:2], extra=tuple(low[2:]), mask_BT=mask)
    assert actual.dtype == dtype
    bound = {torch.bfloat16: 0.04, torch.float16: 0.01, torch.float32: 1e-5}[dtype]
    assert (actual.double() - expected).norm() / expected.norm() < bound


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shifted_heads": 3}, "num_shifted_heads must lie between 0 and the 2 heads"),
        ({"num_shifted_heads": 1, "causal": False}, "num_shifted_heads=1 needs causal=True"),
        ({"mask_BT": torch.ones(1, 7, dtype=torch.bool)}, "mask_BT must be bool"),
        ({"attention_mask_BTT": torch.ones(3, 8, 8, dtype=torch.bool)}, "attention_mask_BTT must be bool"),
        ({"documents_BT": torch.zeros(1, 8)}, "documents_BT must be integers"),
        ({"extra_mask_BE": torch.ones(1, 3, dtype=torch.bool)}, "extra_mask_BE is given without extra"),
        ({"extra": (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 2, 5))}, "extra values must be"),
        ({"extra": (torch.zeros(2, 2, 3, 4), torch.zeros(1, 2, 3, 5))}, "extra vectors must be"),
        ({"extra": (torch.zeros(2, 3, 4), torch.zeros(1, 2, 3, 5))}, "extra vectors must be"),
        (
            {
                "extra": (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5)),
                "extra_mask_BE": torch.ones(1, 2, dtype=torch.bool),
            },
            "extra_mask_BE must be bool",
        ),
        ({"key_norm": "l1"}, "key_norm must be"),
    ],
)
def test_wrong_arguments_of_full_attention_are_named(options: dict[str, Any], message: str) -> None:
    qk, v = random_full_inputs(1, 2, 8, 4, 0, 1, seed=0)
    with pytest.raises(ValueError, match=message):
        shared_qk_attention(qk, v, **options)


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
